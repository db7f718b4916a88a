"""The runner against a real ComfyUI: what comes back, and what is said when ComfyUI objects."""

import importlib
import json
import os
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from dng_core.headless.client import RunResult, run_workflow
from dng_core.headless.errors import HeadlessError
from dng_core.headless.record import settings
from dng_core.headless.server import Server, running_server
from dng_core.headless.workflow import Prompt

PNG = b"\x89PNG"


def blank(width: int) -> Prompt:
    """A blank picture of that width, saved."""
    size = {"width": width, "height": 32, "batch_size": 2, "color": 255}
    return {
        "1": {"class_type": "EmptyImage", "inputs": size, "_meta": {"title": "A blank"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "deep/blank"}},
    }


def test_outputs_and_timings_come_back(comfyui_server: Server) -> None:
    result = run_workflow(comfyui_server, blank(64))
    assert [content[:4] for _, content in result.files["2"]] == [PNG, PNG]
    assert set(result.node_seconds) == {"1", "2"}
    assert comfyui_server.stats["system"]["comfyui_version"]


def test_a_run_that_comfyui_answers_from_its_cache_still_brings_its_files(comfyui_server: Server) -> None:
    first, second = (run_workflow(comfyui_server, blank(96)) for _ in range(2))
    assert second.cached
    assert [content for _, content in second.files["2"]] == [content for _, content in first.files["2"]]


def test_a_node_that_fails_is_named_with_comfyuis_own_error(comfyui_server: Server) -> None:
    bad_pattern = {"string": "a", "regex_pattern": "(", "replace": "b"}
    prompt: Prompt = {
        "7": {"class_type": "RegexReplace", "inputs": bad_pattern, "_meta": {"title": "Tidy up"}},
        "8": {"class_type": "PreviewAny", "inputs": {"source": ["7", 0]}},
    }
    with pytest.raises(HeadlessError) as caught:
        run_workflow(comfyui_server, prompt)
    message = str(caught.value)
    assert message.startswith('Node "Tidy up" (node 7, RegexReplace) failed.')
    assert "nodes_string.py" in message
    assert "unterminated subpattern" in message.splitlines()[-1]


def test_a_value_that_comfyui_refuses_is_named_with_its_node_and_input(comfyui_server: Server) -> None:
    with pytest.raises(HeadlessError, match=r'"A blank" \(node 1, EmptyImage\)[\s\S]*width'):
        run_workflow(comfyui_server, blank(-1))


def test_a_missing_model_file_is_named_with_the_remedy(comfyui_server: Server) -> None:
    prompt: Prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "nobody-has-this.safetensors"}},
        "2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
    }
    with pytest.raises(HeadlessError, match=r"node 1, [\s\S]*nobody-has-this\.safetensors[\s\S]*models folder"):
        run_workflow(comfyui_server, prompt)


def test_a_missing_node_class_is_named(comfyui_server: Server) -> None:
    prompt = {**blank(64), "3": {"class_type": "NobodyHasThis", "inputs": {}}}
    with pytest.raises(HeadlessError, match=r"does not know these nodes[\s\S]*node 3, NobodyHasThis"):
        run_workflow(comfyui_server, prompt)


def test_the_command_line_runs_on_a_server_that_runs_already(
    comfyui_server: Server, dng: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    file = tmp_path / "blank.json"
    file.write_text(json.dumps(blank(32)))
    options = ["--server", comfyui_server.url, "--output", str(tmp_path / "out"), "--set", "A blank.width=48"]
    run = dng(["run", str(file), *options], os.environ)
    printed, messages = run.communicate(timeout=120)
    assert run.returncode == 0, messages
    assert "record.json" in printed
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["prompt"]["1"]["inputs"]["width"] == 48
    assert record["versions"]["torch"]
    assert len(record["outputs"]["2"]["files"]) == 2
    assert running_server(comfyui_server.url).stats  # it was not ours to stop


def test_every_node_of_the_pack_is_known_to_comfyui(comfyui_server: Server, pack: ModuleType) -> None:
    ours = {node.GET_SCHEMA().node_id for node in importlib.import_module(f"{pack.__name__}.nodes").NODES}
    with urllib.request.urlopen(f"{comfyui_server.url}/object_info") as response:
        known = json.load(response)
    assert ours
    assert ours <= known.keys()
    assert comfyui_server.log is not None
    log = comfyui_server.log.read_text()
    for trouble in ("(IMPORT FAILED)", "Error while calling comfy_entrypoint", "Unable to parse pyproject.toml"):
        assert trouble not in log


def test_the_installed_comfyui_imports_all_its_nodes(comfyui_server: Server) -> None:
    """An older release may have nodes (`nodes_glsl.py`) that need packages which the installed one does not bring."""
    assert comfyui_server.log is not None
    assert "IMPORT FAILED" not in comfyui_server.log.read_text()


def test_settings_of_the_packs_nodes_are_recognised(comfyui_server: Server, pack: ModuleType) -> None:
    with urllib.request.urlopen(f"{comfyui_server.url}/object_info") as response:
        known = json.load(response)
    for node in importlib.import_module(f"{pack.__name__}.nodes").NODES:
        name = node.GET_SCHEMA().node_id
        prompt: Prompt = {"1": {"class_type": name, "inputs": {"x": 1}}}
        assert settings(prompt, RunResult("", node_info={name: known[name]})) == {"1": {"class_type": name, "x": 1}}
