"""Write what a run made into a folder: its files, its texts and a JSON record. No file is ever half written."""

import json
import platform
import re
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import PARTIAL, read_json, write_json, write_whole
from .client import RunResult, file_items
from .server import Server
from .workflow import Prompt, given_title, literal_inputs, seeds

RECORD = "record.json"
UNFINISHED = "record.unfinished.json"  # what a save writes and replaces, until it is done
NAME_BYTES = 200  # file systems take 255; the rest is for what is added: a number, an ending, ".partial"
ENDING_LETTERS = 12  # what follows a dot is a file's kind if it is no longer than this: a choice
# A node is this pack's own if its class, name or category matches.
OURS = re.compile(r"\bDNG|Dynamic ?Negative ?Guidance", re.IGNORECASE)


def save_run(folder: Path, workflow: Path, prompt: Prompt, server: Server, result: RunResult) -> list[Path]:
    """Save a run's files and texts and, last, its record; returns their paths.

    They take the place of those of an earlier run, so that a folder with a record holds one whole run and its
    pictures alone. A list of what is about to be written or replaced comes first: where a save is cut short, the next
    one finds there what it left.
    """
    earlier = recorded_files(folder)
    contents: dict[Path, bytes] = {}
    outputs: dict[str, dict[str, Any]] = {}
    for node_id, ui in result.ui.items():
        made = [(safe_name(filename), content) for filename, content in result.files[node_id]]
        if text := node_text(ui):
            ending = ".md" if re.search(r"^\s*(\||#)", text, re.MULTILINE) else ".txt"
            stem = given_title(prompt.get(node_id, {})) or f"node_{node_id}"
            made.append((safe_name(stem) + ending, (text.rstrip() + "\n").encode()))
        names = []
        for name, content in made:
            path = unused_name(folder, name, [*contents, folder / RECORD, folder / UNFINISHED])
            contents[path] = content
            names.append(path.name)
        outputs[node_id] = {"files": names, "ui": without_files(ui)}
    # What lies there already and is in no list may be the user's: it is overwritten, but never deleted later.
    listed = earlier | {path for path in contents if not path.exists()}
    write_json(folder / UNFINISHED, {"outputs": {"": {"files": sorted(path.name for path in listed)}}})
    (folder / RECORD).unlink(missing_ok=True)
    for path, content in contents.items():
        write_whole(path, content)
    record = describe_run(workflow, prompt, server, result, outputs)
    write_whole(folder / RECORD, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    for path in earlier - contents.keys():
        path.unlink(missing_ok=True)
    (folder / UNFINISHED).unlink()
    return [*contents, folder / RECORD]


def recorded_files(folder: Path) -> set[Path]:
    """The files in `folder` that its record names, and the list of an unfinished save, half-written ones included.

    There are none where there is no record and no such list, or a damaged one.
    """
    names: set[str] = set()
    for listing in (RECORD, UNFINISHED):
        try:
            outputs = read_json(folder / listing)["outputs"].values()
            found = {str(name) for output in outputs for name in output["files"]}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue
        names |= found if listing == RECORD else found | {name + PARTIAL for name in found}
    return {folder / name for name in names if name == safe_name(name) and (folder / name).is_file()}


def describe_run(
    workflow: Path, prompt: Prompt, server: Server, result: RunResult, outputs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The record: enough to run the same again and to know what came out."""
    system = server.stats.get("system", {})
    return {
        "workflow_file": workflow.name,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings(prompt, result),
        "seeds": seeds(prompt),
        "figures": [figure for ui in result.ui.values() for figure in ui.get("figures") or ()],
        "outputs": outputs,
        "versions": {
            "dynamic-negative-guidance": __version__,
            "comfyui": system.get("comfyui_version"),
            "torch": system.get("pytorch_version"),
            "python": system.get("python_version"),
            "platform": platform.platform() if server.process else system.get("os"),
        },
        "devices": [device.get("name") for device in server.stats.get("devices", ())],
        "seconds": {
            "start": round(server.start_seconds, 3),
            "run": round(result.seconds, 3),
            "nodes": {node_id: round(seconds, 3) for node_id, seconds in result.node_seconds.items()},
        },
        "cached_nodes": result.cached,
        "prompt": prompt,
    }


def settings(prompt: Prompt, result: RunResult) -> dict[str, dict[str, Any]]:
    """The values set on every node of this pack."""
    found = {}
    for node_id, node in prompt.items():
        info = result.node_info.get(node["class_type"], {})
        names = (node["class_type"], info.get("display_name"), info.get("category"))
        if any(OURS.search(str(name)) for name in names):
            found[node_id] = {"class_type": node["class_type"], **literal_inputs(node)}
    return found


def node_text(ui: Mapping[str, Any]) -> str:
    """What a node reports under "text", as one text."""
    value = ui.get("text") or ()
    return value if isinstance(value, str) else "\n".join(str(line) for line in value)


def without_files(ui: Mapping[str, Any]) -> dict[str, Any]:
    """A node's report without its files, texts and figures, which are recorded elsewhere."""
    files = file_items(ui)
    kept = {key: value for key, value in ui.items() if key not in ("text", "figures")}
    return {key: value for key, value in kept.items() if not (isinstance(value, list) and value and value[0] in files)}


def safe_name(name: str) -> str:
    """`name` as a plain file name: what a server says never leads out of the output folder."""
    cleaned = re.sub(r"[^\w.\-]+", "_", re.split(r"[/\\]", name)[-1]).strip(".")
    stem, dot, ending = cleaned.rpartition(".")
    if not stem or len(ending) > ENDING_LETTERS:
        stem, dot, ending = cleaned, "", ""
    return stem.encode()[:NAME_BYTES].decode(errors="ignore") + dot + ending or "output"


def unused_name(folder: Path, name: str, taken: Collection[Path]) -> Path:
    """A path in `folder` for `name` that is not taken yet."""
    path = folder / name
    number = 2
    while path in taken:
        path = folder / f"{Path(name).stem}_{number}{Path(name).suffix}"
        number += 1
    return path
