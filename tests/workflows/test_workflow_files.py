"""The workflows that ship: both forms say the same, real ComfyUI takes them, and their canvases are in order."""

import io
import json
import re
import urllib.request
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dng_core.headless.client import run_workflow
from dng_core.headless.errors import HeadlessError
from dng_core.headless.server import Server
from dng_core.headless.workflow import Prompt, load_workflow, set_inputs

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
GRAPHS = sorted(FOLDER.glob("*.json"))
PROMPTS = sorted((FOLDER / "api").glob("*.json"))
NOTES = ("MarkdownNote", "Note")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
ANY_TYPE = "*"
TITLE_HEIGHT = 30
LOADERS = {
    "CheckpointLoaderSimple": ("ckpt_name", "checkpoints"),
    "UNETLoader": ("unet_name", "diffusion_models"),
    "CLIPLoader": ("clip_name", "text_encoders"),
    "VAELoader": ("vae_name", "vae"),
}
"""Of each loader, the input that names a file, and the folder that the file belongs in."""

PICTURE_BYTES = 200_000
MACHINE_PATH = re.compile(r"://|(?:^|[\s\"'(=])(?:~/|/[\w.-]+|[A-Za-z]:[\\/])")

graphs = pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
prompts = pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def definitions(comfyui_server: Server) -> dict[str, Any]:
    """Every node's inputs and outputs, as ComfyUI tells its front end."""
    with urllib.request.urlopen(f"{comfyui_server.url}/object_info") as response:
        return dict(json.load(response))


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def nodes_of(graph: dict[str, Any]) -> list[dict[str, Any]]:
    """The graph's nodes but its notes."""
    return [node for node in graph["nodes"] if node["type"] not in NOTES]


def inputs_of(declared: dict[str, Any]) -> dict[str, Any]:
    return {**declared.get("required", {}), **declared.get("optional", {})}


def widgets(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The values of the node's widgets by name. The front end saves them in this order."""
    values = iter(node.get("widgets_values", []))
    found = dict(_widgets(inputs_of(definitions[node["type"]]["input"]), values))
    assert list(values) == []
    return found


def _widgets(inputs: dict[str, Any], values: Iterator[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, (kind, *rest) in inputs.items():
        options = rest[0] if rest else {}
        if kind == DYNAMIC_COMBO:
            choice = next(values)
            yield prefix + name, choice
            (chosen,) = (option["inputs"] for option in options["options"] if option["key"] == choice)
            yield from _widgets(inputs_of(chosen), values, f"{prefix}{name}.")
        elif (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput"):
            yield prefix + name, next(values)
            if options.get("control_after_generate"):
                yield "control_after_generate", next(values)


def as_prompt(graph: dict[str, Any], definitions: dict[str, Any]) -> Prompt:
    """What the front end would send to the server for this graph."""
    origins = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in nodes_of(graph):
        definition = definitions[node["type"]]
        inputs = widgets(node, definitions)
        inputs.pop("control_after_generate", None)
        inputs |= {slot["name"]: origins[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        title = node.get("title", definition["display_name"])  # saved only where it is another than the class's
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def strings(value: Any) -> Iterator[str]:
    """All text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)


def test_there_are_the_three_workflows() -> None:
    expected = {"mnist_class_removal", "stable_diffusion_ksampler", "stable_diffusion_model_patch"}
    assert expected <= {path.stem for path in GRAPHS}


@graphs
def test_a_graph_has_a_picture_of_its_name(path: Path) -> None:
    content = path.with_suffix(".jpg").read_bytes()
    picture = Image.open(io.BytesIO(content))
    assert picture.format == "JPEG"
    assert 600 <= picture.width <= 800
    assert len(content) < PICTURE_BYTES


@graphs
def test_a_graph_and_its_api_form_say_the_same(path: Path, definitions: dict[str, Any]) -> None:
    assert as_prompt(read(path), definitions) == load_workflow(FOLDER / "api" / path.name)


@graphs
def test_wires_join_outputs_and_inputs_that_the_nodes_have(path: Path, definitions: dict[str, Any]) -> None:
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"])
    for link, origin, output, target, slot, kind in graph["links"]:
        assert definitions[nodes[origin]["type"]]["output"][output] == kind
        assert link in nodes[origin]["outputs"][output]["links"]
        socket = nodes[target]["inputs"][slot]
        known = definitions[nodes[target]["type"]]["input"]
        accepted = inputs_of(known)[socket["name"]][0]
        assert accepted in (kind, ANY_TYPE)
        assert socket["link"] == link
    attached = [slot["link"] for node in graph["nodes"] for slot in node["inputs"] if slot.get("link") is not None]
    assert sorted(attached) == sorted(link[0] for link in graph["links"])


@graphs
def test_a_second_run_draws_from_the_same_seed(path: Path, definitions: dict[str, Any]) -> None:
    graph = read(path)
    seeded = 0
    for node in nodes_of(graph):
        values = widgets(node, definitions)
        assert values.get("control_after_generate", "fixed") == "fixed", node["id"]
        seeded += "control_after_generate" in values
    assert seeded


@graphs
def test_nodes_and_notes_do_not_overlap(path: Path) -> None:
    boxes = []
    for node in read(path)["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((f"{node['type']} {node['id']}", x, y - TITLE_HEIGHT, x + width, y + height))
    for (name, left, top, right, bottom), (other, x0, y0, x1, y1) in combinations(boxes, 2):
        assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top, f"{name} overlaps {other}"


@graphs
def test_every_node_lies_within_a_group(path: Path) -> None:
    graph = read(path)
    for node in nodes_of(graph):
        (x, y), (width, height) = node["pos"], node["size"]
        assert any(
            left <= x and top <= y - TITLE_HEIGHT and x + width <= left + wide and y + height <= top + tall
            for left, top, wide, tall in (group["bounding"] for group in graph["groups"])
        ), f"{node['type']} {node['id']}"


@graphs
def test_a_graph_is_explained_by_groups_and_a_note(path: Path) -> None:
    graph = read(path)
    assert all(group["title"] for group in graph["groups"])
    assert graph["groups"]
    assert any(node["type"] in NOTES for node in graph["nodes"])


@pytest.mark.parametrize("path", [*GRAPHS, *PROMPTS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_files_name_no_path_of_a_machine_and_no_address_but_a_models(path: Path) -> None:
    models = {model["url"] for node in read(path).get("nodes", []) for model in node["properties"].get("models", [])}
    assert [text for text in strings(read(path)) if text not in models and MACHINE_PATH.search(text)] == []


@graphs
def test_a_loader_says_where_its_file_can_be_had(path: Path) -> None:
    """As the templates of ComfyUI do, so that its dialog on missing models can offer the download."""
    for node in read(path)["nodes"]:
        if node["type"] in LOADERS:
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0]
            assert model["directory"] == LOADERS[node["type"]][1]
            assert model["url"].startswith("https://") and model["name"] in model["url"]


@graphs
def test_a_graph_with_a_checkpoint_says_what_was_run(path: Path) -> None:
    nodes = read(path)["nodes"]
    if any(node["type"] in LOADERS for node in nodes):
        notes = [text for node in nodes if node["type"] in NOTES for text in node["widgets_values"]]
        assert any("**What was run:**" in note for note in notes)


@graphs
def test_app_mode_shows_inputs_and_outputs_that_the_graph_has(path: Path, definitions: dict[str, Any]) -> None:
    """The front end drops, without a word, what it does not find."""
    graph = read(path)
    nodes = {str(node["id"]): node for node in graph["nodes"]}
    app = graph["extra"]["linearData"]
    assert app["inputs"] and app["outputs"]
    for node, name in app["inputs"]:
        assert name in widgets(nodes[node], definitions), (node, name)
    shown = [slot.get("label", name) for node, name in app["inputs"] for slot in nodes[node]["inputs"]
             if slot["name"] == name]  # fmt: skip
    assert len(set(shown)) == len(app["inputs"])
    assert all(definitions[nodes[node]["type"]]["output_node"] for node in app["outputs"])


@prompts
def test_what_is_counted_is_what_is_avoided(path: Path) -> None:
    """One input changes the class that a workflow avoids and the class that its reports count."""
    prompt = load_workflow(path)
    for node in prompt.values():
        if node["class_type"] == "DNGClassReport":
            origin, output = node["inputs"]["forbidden"]
            assert prompt[origin]["class_type"] == "DNGClassLabel" and output == 1
            assert any(other["inputs"].get("negative") == [origin, 0] for other in prompt.values())


@graphs
def test_the_seed_of_an_app_is_the_only_one(path: Path) -> None:
    """Runs that are compared draw from one seed, which App mode could not change in all of them."""
    graph = read(path)
    shown = [name for _, name in graph["extra"].get("linearData", {}).get("inputs", [])]
    samplers = [node for node in nodes_of(graph) if "Sampler" in node["type"]]
    assert not {"seed", "noise_seed"} & set(shown) or len(samplers) == 1 or path.stem == "wan_2_2_two_stages"


def test_comfyuis_template_browser_lists_every_graph_with_its_picture(comfyui_server: Server) -> None:
    with urllib.request.urlopen(f"{comfyui_server.url}/workflow_templates") as response:
        listed = json.load(response)
    (pack,) = (name for name, files in listed.items() if "mnist_class_removal" in files)
    assert sorted(listed[pack]) == [path.stem for path in GRAPHS]
    for path in GRAPHS:
        address = f"{comfyui_server.url}/api/workflow_templates/{pack}/{path.stem}.jpg"
        with urllib.request.urlopen(address) as response:
            assert response.read() == path.with_suffix(".jpg").read_bytes()


@prompts
def test_comfyui_takes_a_prompt_but_for_a_missing_checkpoint(path: Path, comfyui_server: Server) -> None:
    prompt = load_workflow(path)
    loaders = {key: node["class_type"] for key, node in prompt.items() if node["class_type"] in LOADERS}
    if loaders:
        # Named so that no machine has it: what is validated is never run.
        absent = "a-file-that-nobody-has.safetensors"
        set_inputs(prompt, [f"{key}.{LOADERS[loader][0]}={absent}" for key, loader in loaders.items()])
        with pytest.raises(HeadlessError) as caught:
            run_workflow(comfyui_server, prompt)
        objections = [line for line in str(caught.value).splitlines() if "(node " in line]
        assert len(objections) == len(loaders)
        for key, loader in loaders.items():
            (objection,) = (line for line in objections if f"(node {key}, " in line)
            assert f"(node {key}, {loader}): Value not in list: {LOADERS[loader][0]}" in objection
            assert absent in objection
        return

    calibrates = any(node["class_type"] == "DNGCalibrate" for node in prompt.values())  # on images of every class
    for key, node in prompt.items():
        small = {"batch_size": 16, "steps": 12} if calibrates else {"batch_size": 2, "steps": 2}
        set_inputs(prompt, [f"{key}.{name}={value}" for name, value in small.items() if name in node["inputs"]])
    result = run_workflow(comfyui_server, prompt, timeout=300)
    savers = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert savers
    for saver in savers:
        assert [content[:4] for _, content in result.files[saver]] == [b"\x89PNG"]
