"""The subgraph blueprints that ship: ComfyUI serves them as this pack's, and each says what it is."""

import json
import urllib.request
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from dng_core.headless.server import PACK_NAME, Server

FOLDER = Path(__file__).resolve().parents[2] / "subgraphs"
BLUEPRINTS = sorted(FOLDER.glob("*.json"))
TITLE_HEIGHT = 30

blueprints = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def get(server: Server, path: str) -> Any:
    with urllib.request.urlopen(f"{server.url}{path}") as response:
        return json.load(response)


def test_comfyui_lists_the_blueprints_as_this_packs_and_serves_them(comfyui_server: Server) -> None:
    listed = get(comfyui_server, "/global_subgraphs")
    own = {key: entry for key, entry in listed.items() if entry["info"]["node_pack"] == f"custom_nodes.{PACK_NAME}"}
    assert sorted(entry["name"] for entry in own.values()) == [path.stem for path in BLUEPRINTS] != []
    for key, entry in own.items():
        assert entry["source"] == "custom_node"
        served = get(comfyui_server, f"/global_subgraphs/{key}")["data"]
        assert json.loads(served) == read(FOLDER / f"{entry['name']}.json")


@blueprints
def test_a_blueprint_is_one_subgraph_with_the_name_of_its_file_and_a_description(path: Path) -> None:
    """By these the node library of the front end lists it."""
    blueprint = read(path)
    (node,) = blueprint["nodes"]
    (subgraph,) = blueprint["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"]
    assert node["title"] == subgraph["name"] == path.stem
    assert subgraph["category"] == "Dynamic Negative Guidance"
    assert subgraph["description"].endswith(".")


@blueprints
def test_a_blueprints_nodes_are_known_and_wired_and_do_not_overlap(path: Path, comfyui_server: Server) -> None:
    (subgraph,) = read(path)["definitions"]["subgraphs"]
    definitions = get(comfyui_server, "/object_info")
    inputs, outputs = subgraph["inputs"], subgraph["outputs"]
    assert all(slot["linkIds"] for slot in [*inputs, *outputs])
    assert {node["type"] for node in subgraph["nodes"]} <= set(definitions)
    for one, other in combinations(subgraph["nodes"], 2):
        (x, y), (width, height) = one["pos"], one["size"]
        (x0, y0), (wide, tall) = other["pos"], other["size"]
        beside = x + width <= x0 or x0 + wide <= x
        assert beside or y + height <= y0 - TITLE_HEIGHT or y0 + tall <= y - TITLE_HEIGHT
