"""A workflow that cannot run is refused with the node, the input and the remedy."""

import copy
import json
from pathlib import Path

import pytest

from dng_core.headless.errors import HeadlessError
from dng_core.headless.workflow import (
    Prompt,
    check_node_types,
    describe_failure,
    describe_rejection,
    literal_inputs,
    load_workflow,
    seeds,
    set_inputs,
    title,
)

PROMPT: Prompt = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0]}, "_meta": {"title": "Draw digits"}},
    "4": {"class_type": "LoadModel", "inputs": {"name": "digits"}},
    "5": {"class_type": "LoadModel", "inputs": {"name": "letters"}},
}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000 + "]" * 100_000, "is not JSON: it is nested too deeply"),
        ('{"nodes": [], "links": []}', r"UI format[\s\S]*Export \(API\)"),
        ("[]", "not a workflow in API format"),
        ("{}", "not a workflow in API format"),
        ('{"1": {"inputs": {}}}', "not a workflow in API format"),
        ('{"1": {"class_type": "A", "inputs": []}}', "not a workflow in API format"),
    ],
)
def test_a_file_that_is_no_api_workflow_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(content)
    with pytest.raises(HeadlessError, match=message):
        load_workflow(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeadlessError, match=r"none\.json cannot be read: No such file"):
        load_workflow(tmp_path / "none.json")


def test_a_workflow_is_loaded_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_text(json.dumps(PROMPT))
    assert load_workflow(path) == PROMPT


@pytest.mark.parametrize(
    ("assignment", "node", "name", "value"),
    [
        ("3.seed=7", "3", "seed", 7),
        ("Draw digits.seed=7", "3", "seed", 7),
        ("KSampler.seed=1e3", "3", "seed", 1000.0),
        ("4.name=a=b", "4", "name", "a=b"),
        ('4.name="7"', "4", "name", "7"),
        ("4.name=", "4", "name", ""),
        ('3.model=["5", 0]', "3", "model", ["5", 0]),
    ],
)
def test_an_input_is_set_by_id_title_or_class(assignment: str, node: str, name: str, value: object) -> None:
    prompt = copy.deepcopy(PROMPT)
    set_inputs(prompt, [assignment])
    assert prompt[node]["inputs"][name] == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed=7", "the form is NODE.INPUT=VALUE"),
        ("3.seed", "the form is NODE.INPUT=VALUE"),
        ("9.seed=7", r"no node is called 9[\s\S]*Draw digits"),
        ("LoadModel.name=x", "2 nodes are called LoadModel"),
        ("3.seed=" + "[" * 100_000, "--set 3.seed: the value is nested too deeply"),
        ("3.steps=7", r"node 3 has no input steps[\s\S]*seed, model"),
    ],
)
def test_an_assignment_that_fits_nothing_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(HeadlessError, match=message):
        set_inputs(copy.deepcopy(PROMPT), [assignment])


def test_an_input_of_a_choice_is_set_and_may_be_new() -> None:
    prompt: Prompt = {"8": {"class_type": "KSamplerDNG", "inputs": {"settings": "exact"}, "_meta": {"title": "a.b"}}}
    set_inputs(prompt, ["8.settings=custom", "a.b.settings.prior=0.3", "KSamplerDNG.settings.rule=probe"])
    assert prompt["8"]["inputs"] == {"settings": "custom", "settings.prior": 0.3, "settings.rule": "probe"}
    with pytest.raises(HeadlessError, match=r"node 8 has no input other\.prior"):
        set_inputs(prompt, ["8.other.prior=0.3"])


def test_missing_node_classes_are_listed_with_why_a_pack_did_not_load() -> None:
    with pytest.raises(HeadlessError) as caught:
        check_node_types(PROMPT, {"LoadModel": {}}, "  | IMPORT FAILED")
    assert '"Draw digits" (node 3, KSampler)' in str(caught.value)
    assert "LoadModel" not in str(caught.value)
    assert "IMPORT FAILED" in str(caught.value)
    assert "--all-custom-nodes" in caught.value.remedy


def test_a_missing_model_is_told_with_the_remedy() -> None:
    error = {"type": "value_not_in_list", "message": "Value not in list", "details": "name: 'digits' not in []"}
    answer = {"error": {"message": "Prompt outputs failed validation"}, "node_errors": {"4": {"errors": [error]}}}
    described = describe_rejection(PROMPT, answer)
    assert "\"LoadModel\" (node 4, LoadModel): Value not in list: name: 'digits' not in []" in described.problem
    assert "models folder" in described.remedy


def test_a_failed_node_is_named_with_its_own_message_last() -> None:
    details = {
        "node_id": "3",
        "exception_type": "builtins.ValueError",
        "exception_message": "prior must lie inside (0, 1)\n",
        "traceback": ['  File "a.py", line 1\n'],
    }
    text = str(describe_failure(PROMPT, details))
    assert text.startswith('Node "Draw digits" (node 3, KSampler) failed.')
    assert text.endswith("ValueError: prior must lie inside (0, 1)")


def test_a_full_disk_is_told_without_a_traceback() -> None:
    message = "[Errno 28] No space left on device: '/tmp/x.png'"
    details = {"node_id": "3", "exception_type": "OSError", "exception_message": message, "traceback": ["  File\n"]}
    error = describe_failure(PROMPT, details)
    assert error.problem == f'Node "Draw digits" (node 3, KSampler) failed because a disk is full: {message}'
    assert "Free some space" in error.remedy


@pytest.mark.parametrize("meta", [None, [], {"title": None}, {"title": 7}])
def test_a_node_without_a_usable_title_is_called_by_its_class(meta: object) -> None:
    prompt: Prompt = {"1": {"class_type": "LoadModel", "inputs": {"name": "x"}, "_meta": meta}}
    assert title(prompt, "1") == '"LoadModel" (node 1, LoadModel)'
    set_inputs(prompt, ["LoadModel.name=y"])
    assert prompt["1"]["inputs"] == {"name": "y"}


def test_a_node_of_an_expansion_has_the_title_of_the_node_it_came_from() -> None:
    assert title(PROMPT, "3.0.0.2") == '"Draw digits" (node 3.0.0.2, KSampler)'


def test_settings_leave_out_wires_and_seeds_are_found() -> None:
    assert literal_inputs(PROMPT["3"]) == {"seed": 1}
    assert seeds(PROMPT) == {"3": 1}
