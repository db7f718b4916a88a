// The live chart: posterior and guidance scale, drawn on the node that samples while they arrive from the server.
// The last run's chart is kept in the node's properties, so that it is saved and loaded with the workflow.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const EVENT = "dynamic_negative_guidance.chart";
const PROPERTY = "dng_chart";
const WIDGET = "dng_chart";
const HEIGHT = 170;
const KEPT_STEPS = 100;
const COLOURS = ["#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#3b82c4", "#d55e00"];
const SVG = "http://www.w3.org/2000/svg";

/** Runs that went on while their workflow was not the one shown: chart by workflow and node. */
const unseen = new Map();

app.registerExtension({
  name: "dynamicnegativeguidancedng.live_chart", // under the name that the registry shows, as its lint wants it

  setup() {
    api.addEventListener(EVENT, ({ detail }) => receive(detail));
  },

  loadedGraphNode(node) {
    const key = address(rootOf(node)?.id, executionId(node));
    if (unseen.has(key)) node.properties[PROPERTY] = unseen.get(key);
    unseen.delete(key);
    if (node.properties?.[PROPERTY]) show(node);
  },
});

function receive(message) {
  const graph = app.rootGraph ?? app.graph; // older front ends have the latter alone
  const shown = graph && (!message.workflow || message.workflow === graph.id);
  const node = shown ? nodeAt(graph, message.node) : null;
  const key = address(message.workflow, message.node);
  const chart = extended(node ? node.properties[PROPERTY] : unseen.get(key), message);
  if (!node) {
    unseen.set(key, chart);
    return;
  }
  node.properties[PROPERTY] = chart;
  show(node);
  // Otherwise the front end would notice the change, and keep it for a reload of the page, only at the next click.
  if (message.done) app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.captureCanvasState?.();
}

/** The chart with a message's steps in place: they follow the first `start` steps of what was there before. */
function extended(chart, { start, steps, images, posterior, scale, looked, done }) {
  const join = (before, after) => [...(before ?? []).slice(0, start), ...after];
  const taken = start + posterior.length;
  const stride = done ? Math.ceil(taken / KEPT_STEPS) : 1;
  const kept = (_, index) => index % stride === 0 || index === taken - 1;
  return {
    steps: Math.max(steps ?? taken, taken),
    images,
    at: Array.from({ length: taken }, (_, index) => index + 1).filter(kept),
    posterior: join(start ? chart?.posterior : [], posterior).filter(kept),
    scale: join(start ? chart?.scale : [], scale).filter(kept),
    looked: join(start ? chart?.looked : [], looked).filter(kept),
  };
}

const address = (workflow, node) => `${workflow ?? ""}/${node}`;

const rootOf = (node) => node.graph?.rootGraph ?? node.graph;

/** The node that the server names by its path of ids through nested subgraphs, such as "12:5". */
function nodeAt(root, path) {
  let node = null;
  let graph = root;
  for (const id of String(path).split(":")) {
    node = graph?.getNodeById(id) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

/** The path by which the server names a node; subgraphs are searched for the one that holds it. */
function executionId(node) {
  const find = (graph, prefix) => {
    if (graph === node.graph) return prefix + node.id;
    for (const host of graph?.nodes ?? []) {
      const found = host.subgraph && find(host.subgraph, `${prefix}${host.id}:`);
      if (found) return found;
    }
    return null;
  };
  return find(rootOf(node), "");
}

/** Draw a node's chart, on a widget that is added to it the first time. */
function show(node) {
  let widget = node.widgets?.find(({ name }) => name === WIDGET);
  if (!widget) {
    const element = document.createElement("div");
    element.className = "dng-chart";
    Object.assign(element.style, { position: "relative", minHeight: `${HEIGHT}px`, overflow: "hidden" });
    widget = node.addDOMWidget(WIDGET, "dng_chart", element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
      getValue: () => "",
    });
    widget.serialize = false;
    new ResizeObserver(() => draw(element, node.properties[PROPERTY])).observe(element);
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  }
  draw(widget.element, node.properties[PROPERTY]);
  node.setDirtyCanvas?.(true, true);
}

function draw(element, chart) {
  const width = element.clientWidth;
  const height = Math.max(element.clientHeight, HEIGHT);
  if (!width || !chart?.posterior?.length) return;

  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.setAttribute("aria-label", "Posterior and guidance scale over the steps");
  Object.assign(svg.style, { position: "absolute", inset: "0", width: "100%", height: "100%" }); // gives no size back
  const left = 34;
  const gap = 20;
  const panel = (height - 2 * gap - 16) / 2;
  const steps = chart.at.at(-1);
  const held = chart.at.filter((_, index) => isHeld(chart, index));
  const saved = held.length ? `, ${held.length} held` : "";
  const summary = `${chart.images} ${chart.images === 1 ? "image" : "images"}, step ${steps} of ${chart.steps}${saved}`;
  const highest = Math.max(...chart.scale.flat(2), 0.1);
  const frame = { left, right: width - 8, height: panel, steps: chart.steps, at: chart.at };
  drawPanel(svg, { ...frame, top: gap, title: "posterior", note: summary, limit: 1 }, chart.posterior, chart.images);
  drawPanel(svg, { ...frame, top: 2 * gap + panel, title: "guidance scale", limit: highest }, chart.scale, chart.images);
  for (const step of held) {
    const x = frame.left + ((frame.right - frame.left) * (step - 1)) / Math.max(chart.steps - 1, 1);
    const line = { x1: x, x2: x, y1: gap + panel, y2: gap + panel + 5, stroke: "var(--descrip-text, #888)" };
    svg.append(make("line", { ...line, class: "dng-held" }));
  }
  element.replaceChildren(svg);
}

/** Whether the undesired was evaluated for no concept at a step: the last difference was held there. */
const isHeld = (chart, index) => Boolean(chart.looked?.[index]?.length) && !chart.looked[index].some(Boolean);

/** One curve for each concept and image, or, where the images were summed up in quantiles, bands and their median. */
function drawPanel(svg, frame, values, images) {
  const { left, right, top, height, steps, at, title, note, limit } = frame;
  const x = (step) => left + ((right - left) * (step - 1)) / Math.max(steps - 1, 1);
  const y = (value) => top + height * (1 - value / limit);
  const ink = "var(--descrip-text, #888)";

  svg.append(
    make("rect", { x: left, y: top, width: right - left, height, fill: "none", stroke: "var(--border-color, #888)" }),
    label(title, left, top - 5, "start", ink),
    label(limit === 1 ? "1" : limit.toPrecision(2), left - 4, top + 8, "end", ink),
    label("0", left - 4, top + height, "end", ink),
  );
  if (note) svg.append(label(note, right, top - 5, "end", ink));

  const points = (concept, line) =>
    at
      .map((step, index) => [step, values[index]?.[concept]?.[line]])
      .filter(([, value]) => Number.isFinite(value))
      .map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`);
  const concepts = values[0].length;
  const lines = values[0][0].length;
  const summed = images > lines;
  for (let concept = 0; concept < concepts; concept++) {
    for (let band = 0; summed && band < (lines - 1) / 2; band++) {
      const outline = [...points(concept, band), ...points(concept, lines - 1 - band).reverse()];
      const fill = COLOURS[concept % COLOURS.length];
      svg.append(make("polygon", { points: outline.join(" "), fill, "fill-opacity": 0.2, stroke: "none" }));
    }
    for (const line of summed ? [(lines - 1) / 2] : Array.from({ length: lines }, (_, index) => index)) {
      const stroke = COLOURS[(concepts > 1 || summed ? concept : line) % COLOURS.length];
      const curve = { points: points(concept, line).join(" "), fill: "none", stroke, "stroke-width": 1.5 };
      svg.append(make("polyline", { ...curve, "stroke-linejoin": "round" }));
    }
  }
}

function label(text, x, y, anchor, fill) {
  const element = make("text", { x, y, "text-anchor": anchor, fill, "font-size": 10, "font-family": "sans-serif" });
  element.textContent = text;
  return element;
}

function make(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
