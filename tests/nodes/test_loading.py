"""The pack loads in the ComfyUI that people have, and an older one is told in one sentence what is needed."""

import asyncio
import importlib
import sys
from types import ModuleType

import pytest


def entry(pack: ModuleType, monkeypatch: pytest.MonkeyPatch, version: str) -> list:
    """The nodes that ComfyUI of that version gets."""
    named = ModuleType("comfyui_version")
    named.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfyui_version", named)
    return asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())


def test_the_nodes_load_in_this_comfyui(pack):
    nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    assert "KSamplerDNG" in {node.GET_SCHEMA().node_id for node in nodes}


@pytest.mark.parametrize("version", ["0.3.64", "0.16.2", "0.16.2-1", "0.9.10"])
def test_an_older_comfyui_is_told_which_one_is_needed(pack, monkeypatch, version):
    with pytest.raises(RuntimeError) as told:
        entry(pack, monkeypatch, version)
    assert str(told.value) == (
        f"Dynamic Negative Guidance needs ComfyUI {pack.OLDEST_COMFYUI} or newer, and this is ComfyUI {version}: "
        "update ComfyUI, then restart it"
    )


@pytest.mark.parametrize("version", ["0.16.3", "0.16.10", "0.100.0", "1.0.0", "v0.33.1-4-gabc1234"])
def test_that_release_and_every_newer_one_load_it(pack, monkeypatch, version):
    assert entry(pack, monkeypatch, version)


def test_nodes_stand_beside_comfyuis_own_and_those_of_the_oracle_in_its_dev_mode_alone(pack):
    loaded = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    schemas = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in loaded}
    stock = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    patch = importlib.import_module("comfy_extras.nodes_nag").NAGuidance.GET_SCHEMA()
    assert schemas["KSamplerDNG"].category == stock["KSampler"].CATEGORY
    assert schemas["DNGConcept"].category == stock["CLIPTextEncode"].CATEGORY
    assert schemas["DynamicNegativeGuidance"].category == patch.category
    assert {key for key, schema in schemas.items() if schema.is_dev_only} == {
        key for key, schema in schemas.items() if "Oracle" in key
    }
