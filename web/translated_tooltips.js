// The tooltips of inputs that a choice shows, such as settings.prior, in the language of the front end. It translates all
// other texts of a node by itself, these tooltips not: they are shown as the node defines them. So they are translated
// here, before the node is registered.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const FOLDER = decodeURIComponent(new URL(import.meta.url).pathname.split("/").at(-2));

/** What the server has for the front end's language: texts of nodes by their names. It is asked once. */
let asked;

app.registerExtension({
  name: "dynamicnegativeguidancedng.translated_tooltips",

  async beforeRegisterNodeDef(_, definition) {
    if (definition.python_module !== `custom_nodes.${FOLDER}`) return;
    asked ??= nodeTexts(app.extensionManager?.setting?.get("Comfy.Locale"));
    const inputs = (await asked)[definition.name]?.inputs ?? {};
    for (const [outer, [, options]] of entries(definition.input))
      for (const choice of options?.options ?? [])
        for (const [inner, [, shown]] of entries(choice.inputs))
          shown.tooltip = inputs[`${outer}_${inner}`]?.tooltip ?? shown.tooltip;
  },
});

async function nodeTexts(language) {
  try {
    return (await (await api.fetchApi("/i18n")).json())[language]?.nodeDefs ?? {};
  } catch {
    return {}; // tooltips are then English
  }
}

const entries = (inputs) => Object.entries({ ...inputs?.required, ...inputs?.optional });
