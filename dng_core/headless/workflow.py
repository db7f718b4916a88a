"""API-format workflows: read and check them, set inputs, and say in words what ComfyUI finds wrong with them."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import read_json
from .errors import FULL_DISK, FULL_DISK_REMEDY, HeadlessError

Prompt = dict[str, dict[str, Any]]
OURS = re.compile("DNG|DynamicNegativeGuidance")  # part of the name of every class of this pack
SEED_INPUTS = ("seed", "noise_seed")


def load_workflow(path: Path) -> Prompt:
    """The workflow in the file `path`; raises HeadlessError where it cannot be read or is not in API format."""
    try:
        content = read_json(path)
    except OSError as error:
        raise HeadlessError(f"The workflow {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise HeadlessError(f"The workflow {path} is not JSON: {error}.") from error
    if isinstance(content, dict) and isinstance(content.get("nodes"), list):
        raise HeadlessError(
            f"{path} is a graph in UI format; only the API format can be run without a browser.",
            "In ComfyUI open it and choose Workflow > Export (API); this pack's own are in workflows/api/.",
        )
    is_prompt = isinstance(content, dict) and all(
        isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
        for node in content.values()
    )
    if not content or not is_prompt:
        raise HeadlessError(
            f"{path} is not a workflow in API format: that maps each node's id to its class_type and inputs.",
            "In ComfyUI open the graph and choose Workflow > Export (API).",
        )
    return dict(content)


def given_title(node: Mapping[str, Any]) -> str:
    """The title that a node was given in the editor; "" where it has none."""
    meta = node.get("_meta")
    found = meta.get("title") if isinstance(meta, dict) else None
    return found if isinstance(found, str) else ""


def nodes_of_this_pack(prompt: Prompt) -> list[str]:
    """The ids of the prompt's nodes whose classes are of this pack."""
    return [node_id for node_id, node in prompt.items() if OURS.search(node["class_type"])]


def title(prompt: Prompt, node_id: str) -> str:
    """A node's name for messages: its title (or else its class), its id and its class."""
    # A node that another one expanded into has an id like "12.0.0.3"; its title is that of node 12.
    node = prompt.get(node_id) or prompt.get(node_id.split(".")[0].split(":")[0]) or {}
    class_type = node.get("class_type", "unknown class")
    name = given_title(node) or class_type
    return f'"{name}" (node {node_id}, {class_type})'


def set_inputs(prompt: Prompt, assignments: Iterable[str]) -> None:
    """Apply assignments NODE.INPUT=VALUE in place; NODE is an id, a title or a class that only one node has.

    INPUT may be one of a choice (settings.prior), which need not be there yet where the choice is (settings).
    VALUE is read as JSON if it is valid (numbers, true, "text"), as plain text otherwise. Raises HeadlessError for
    an assignment of another form and for a node or an input that is not there.
    """
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        node_name, input_name = _split(prompt, target)
        if not (equals and node_name and input_name):
            raise HeadlessError(f"--set {assignment}: the form is NODE.INPUT=VALUE, for example 3.seed=7.")
        inputs = prompt[_find_node(prompt, node_name, assignment)]["inputs"]
        choice, _, _ = input_name.rpartition(".")
        if input_name not in inputs and choice not in inputs:
            raise HeadlessError(
                f"--set {assignment}: node {node_name} has no input {input_name}.",
                f"Its inputs are: {', '.join(inputs) or 'none'}.",
            )
        try:
            inputs[input_name] = json.loads(text)
        except ValueError:
            inputs[input_name] = text
        except RecursionError as error:
            raise HeadlessError(f"--set {target}: the value is nested too deeply.") from error


def _split(prompt: Prompt, target: str) -> tuple[str, str]:
    """The node's name and the input's. Both may hold dots: a title, and an input of a choice (settings.prior)."""
    names = {*prompt, *(name for node in prompt.values() for name in (given_title(node), node["class_type"]))}
    dots = [at for at, character in enumerate(target) if character == "."]
    at = next((at for at in reversed(dots) if target[:at] in names), dots[-1] if dots else 0)
    return target[:at], target[at + 1 :]


def _find_node(prompt: Prompt, name: str, assignment: str) -> str:
    if name in prompt:
        return name
    found = [node_id for node_id, node in prompt.items() if name in (given_title(node), node["class_type"])]
    if len(found) != 1:
        what = f"{len(found)} nodes are called {name}" if found else f"no node is called {name}"
        raise HeadlessError(
            f"--set {assignment}: {what}.", "Name it by its id: " + ", ".join(title(prompt, key) for key in prompt)
        )
    return found[0]


def check_node_types(prompt: Prompt, known: Mapping[str, Any], loading_errors: str) -> None:
    """Raise HeadlessError, with the server's `loading_errors`, where it lacks a node class that the workflow uses."""
    missing = [node_id for node_id, node in prompt.items() if node["class_type"] not in known]
    if not missing:
        return
    listing = "\n".join(f"  {title(prompt, node_id)}" for node_id in missing)
    reasons = f"\nA node pack did not load:\n{loading_errors}" if loading_errors else ""
    raise HeadlessError(
        f"This ComfyUI does not know these nodes of the workflow:\n{listing}{reasons}",
        "Install the packs that they come from; packs in its custom_nodes are loaded with --all-custom-nodes only. "
        "A server that runs already must be restarted once this pack is in its custom_nodes.",
    )


def describe_rejection(prompt: Prompt, answer: Mapping[str, Any]) -> HeadlessError:
    """The error for a prompt that ComfyUI's validation refused, naming each node and input."""
    lines = []
    remedies = []
    for node_id, report in (answer.get("node_errors") or {}).items():
        for error in report.get("errors", ()):
            lines.append(f"  {title(prompt, node_id)}: {error.get('message')}: {error.get('details')}")
            if error.get("type") == "value_not_in_list":
                remedies.append(
                    "A value that is not in the list is most often a model file that is missing: put it into "
                    "ComfyUI's models folder, or choose one that is there with --set NODE.INPUT=VALUE."
                )
    error = answer.get("error")
    if isinstance(error, dict):
        lines.insert(0, f"  {error.get('message')} {error.get('details') or ''}".rstrip())
    elif error:
        lines.insert(0, f"  {error}")
    return HeadlessError("ComfyUI refuses the workflow:\n" + "\n".join(lines), "\n".join(dict.fromkeys(remedies)))


def describe_failure(prompt: Prompt, details: Mapping[str, Any]) -> HeadlessError:
    """The error for a node that failed while it ran, with the message that it raised."""
    node_id = str(details.get("node_id"))
    kind = str(details.get("exception_type", "")).rpartition(".")[2]
    message = str(details.get("exception_message", "")).strip()
    if FULL_DISK.search(message):
        return HeadlessError(
            f"Node {title(prompt, node_id)} failed because a disk is full: {message}", FULL_DISK_REMEDY
        )
    traceback = "".join(details.get("traceback") or ()).rstrip()
    indented = "\n".join(f"  | {line}" for line in traceback.splitlines())
    where = f"\n{indented}" if indented else ""
    return HeadlessError(f"Node {title(prompt, node_id)} failed.{where}\n{kind}: {message}")


def literal_inputs(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node's inputs that are values, not wires ([node id, output index])."""
    return {name: value for name, value in node["inputs"].items() if not _is_wire(value)}


def _is_wire(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def seeds(prompt: Prompt) -> dict[str, Any]:
    """Every seed in the workflow, by node id."""
    return {
        node_id: node["inputs"][name]
        for node_id, node in prompt.items()
        for name in SEED_INPUTS
        if name in node["inputs"] and not _is_wire(node["inputs"][name])
    }
