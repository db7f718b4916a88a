"""The MNIST template run in the browser: it finishes, its outputs appear, and the live chart draws and stays."""

from dataclasses import dataclass
from typing import Any

import pytest

from .conftest import NODES_2, WORKFLOWS, Frontend, read

TEMPLATE = "mnist_class_removal"
STEPS, IMAGES = 12, 4
RUN_SECONDS = 300
WATCH = """() => {
  window.watched = { drawn: [], status: null };
  app.api.addEventListener("dynamic_negative_guidance.chart", ({ detail }) => requestAnimationFrame(() => {
    const curve = document.querySelector(".dng-chart polyline");
    const points = curve?.getAttribute("points").split(" ").length ?? 0;
    window.watched.drawn.push({ points, done: detail.done });
  }));
  for (const status of ["execution_success", "execution_error"])
    app.api.addEventListener(status, () => { window.watched.status = status; });
}"""
CHART = """() => {
  const curves = [...document.querySelectorAll(".dng-chart polyline")];
  return curves.map((curve) => curve.getAttribute("points").split(" ").length);
}"""


@dataclass
class Run:
    """The tab after the run, and what was watched during it."""

    frontend: Frontend
    status: str
    drawn: list[dict[str, Any]]


@pytest.fixture(scope="module")
def run(frontend: Frontend) -> Run:
    graph = read(WORKFLOWS / f"{TEMPLATE}.json")
    for node in graph["nodes"]:
        if node["type"] == "DNGEmptyPixelLatent":
            node["widgets_values"] = [IMAGES]
        if node["type"].startswith("KSampler"):
            node["widgets_values"][2] = STEPS
    frontend.load(TEMPLATE, graph)
    show(frontend)
    frontend.tab.evaluate(WATCH)
    frontend.tab.evaluate("() => app.queuePrompt(0)")
    frontend.tab.wait_for_function("() => window.watched.status", timeout=RUN_SECONDS * 1000)
    frontend.tab.wait_for_timeout(1000)
    watched = frontend.tab.evaluate("() => window.watched")
    frontend.picture("live_chart")
    return Run(frontend, watched["status"], watched["drawn"])


def show(frontend: Frontend) -> None:
    frontend.look_at("KSamplerDNG")


def test_the_template_finishes_and_its_outputs_appear(run: Run) -> None:
    assert run.status == "execution_success"
    outputs = run.frontend.tab.evaluate("() => JSON.parse(JSON.stringify(app.nodeOutputs))")
    savers = [str(node["id"]) for node in run.frontend.graph()["nodes"] if node["type"] == "SaveImage"]
    assert savers
    for saver in savers:
        assert outputs[saver]["images"]
    shown = run.frontend.tab.evaluate(
        """async () => {
          const savers = app.graph.nodes.filter(({ type }) => type === "SaveImage");
          app.canvas.ds.scale = 0.3;
          app.canvas.ds.offset = [100 - savers[0].pos[0], 100 - savers[0].pos[1]];
          app.canvas.draw(true, true);
          for (let wait = 0; wait < 50 && !savers.every((node) => node.imgs?.[0]?.naturalWidth); wait++)
            await new Promise((resolve) => setTimeout(resolve, 100));
          return savers.map((node) => node.imgs?.[0]?.naturalWidth ?? 0);
        }"""
    )
    assert all(width > 28 for width in shown)


def test_the_live_chart_draws_during_the_run(run: Run) -> None:
    during = [update["points"] for update in run.drawn if not update["done"]]
    assert len(during) > 2
    assert during == sorted(during)
    assert during[0] < during[-1] <= STEPS


def test_the_chart_has_a_curve_for_each_image_over_all_steps(run: Run) -> None:
    show(run.frontend)
    run.frontend.tab.wait_for_timeout(500)
    assert run.frontend.tab.evaluate(CHART) == [STEPS] * (2 * IMAGES)  # posterior and scale


def test_the_chart_neither_changes_what_is_sent_nor_the_nodes_settings(run: Run) -> None:
    before = read(WORKFLOWS / f"{TEMPLATE}.json")
    after = {node["id"]: node for node in run.frontend.graph()["nodes"]}
    for node in before["nodes"]:
        if node["type"] == "KSamplerDNG":
            assert len(after[node["id"]]["widgets_values"]) == len(node["widgets_values"])
            assert after[node["id"]]["widgets_values"][3:] == node["widgets_values"][3:]
    (sent,) = (node for node in run.frontend.prompt().values() if node["class_type"] == "KSamplerDNG")
    assert "dng_chart" not in sent["inputs"]


def test_the_chart_is_still_there_after_the_page_is_loaded_again(run: Run) -> None:
    run.frontend.tab.wait_for_timeout(1500)  # the front end keeps its draft half a second after a change
    run.frontend.open()
    show(run.frontend)
    run.frontend.tab.locator(".dng-chart polyline").first.wait_for(state="attached")
    assert run.frontend.tab.evaluate(CHART) == [STEPS] * (2 * IMAGES)


def test_the_chart_is_saved_and_loaded_with_the_workflow(run: Run) -> None:
    saved = run.frontend.graph()
    run.frontend.load("stable_diffusion_ksampler")
    assert run.frontend.tab.locator(".dng-chart").count() == 0
    run.frontend.load("again", saved)
    show(run.frontend)
    run.frontend.tab.locator(".dng-chart polyline").first.wait_for(state="attached")
    assert run.frontend.tab.evaluate(CHART) == [STEPS] * (2 * IMAGES)


def test_the_chart_is_drawn_in_nodes_2_too(run: Run) -> None:
    saved = run.frontend.graph()
    run.frontend.tab.evaluate(NODES_2, True)
    try:
        run.frontend.load("in Nodes 2.0", saved)
        show(run.frontend)
        run.frontend.tab.locator("[data-node-id] .dng-chart polyline").first.wait_for(state="attached")
        assert run.frontend.tab.evaluate(CHART) == [STEPS] * (2 * IMAGES)
        run.frontend.picture("live_chart_nodes_2")
    finally:
        run.frontend.tab.evaluate(NODES_2, False)
