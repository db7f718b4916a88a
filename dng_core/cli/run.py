"""`dng run`: run an API-format workflow in a real ComfyUI and collect what it makes."""

import argparse
import errno
import os
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from ..headless.environment import missing_modules, restart_under
from ..headless.errors import HeadlessError
from ..headless.install import ensure_installed, managed, tell
from ..headless.locate import Location, find_comfyui
from ..headless.paths import checkout
from ..headless.server import Server, comfyui_server, installed_pack, running_server
from ..headless.workflow import Prompt, load_workflow, nodes_of_this_pack, set_inputs, title

NEEDS = ("aiohttp", "tqdm")
MOST_PORT = 65535
TRIAL_BYTES = 1 << 20  # about a log and a picture: a choice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dng run`."""
    parser.description = (
        "Run a workflow in a real ComfyUI. The first of these that is given decides which: --comfyui, --server "
        "or --install; DNG_SERVER or DNG_COMFYUI; comfy-cli's default workspace. Otherwise this project's own is "
        "used, and first installed if necessary. A ComfyUI that is started here gets input, output, temporary and "
        "user folders of its own and is stopped at the end."
    )
    parser.add_argument("workflow", type=Path, help="workflow file in API format")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--comfyui", type=Path, metavar="FOLDER", help="the ComfyUI to start")
    where.add_argument("--server", metavar="URL", help="a ComfyUI that runs already and has this pack")
    where.add_argument("--install", action="store_true", help="the ComfyUI that this project installs")
    parser.add_argument("--comfyui-python", type=Path, metavar="PYTHON", help="the Python that runs --comfyui")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: output/WORKFLOW/TIME")
    parser.add_argument("--input", type=Path, metavar="FOLDER", help="where Load Image finds its files")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change an input; NODE is a node's id, title or class (repeatable)",
    )
    parser.add_argument("--all-custom-nodes", action="store_true", help="load that ComfyUI's other custom nodes too")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU although there is a GPU")
    parser.add_argument("--port", type=int, help="port to start ComfyUI on (default: a free one)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up on the workflow after this time")


def run(args: argparse.Namespace) -> int:
    """Run the workflow; raises HeadlessError with what went wrong."""
    prompt = load_workflow(args.workflow)
    set_inputs(prompt, args.set)
    if args.input and not args.input.is_dir():
        raise HeadlessError(f"--input names {args.input}, which is not a folder.")
    if args.port is not None and not 1 <= args.port <= MOST_PORT:
        raise HeadlessError(f"--port must lie between 1 and {MOST_PORT}, not {args.port}.")
    url = args.server or (None if args.comfyui or args.install else os.environ.get("DNG_SERVER"))
    if url and args.comfyui_python:
        raise no_comfyui_for_python()
    location = None if url else choose_location(args, prompt)
    if missing := missing_modules(NEEDS):
        return restart_under(runner_python(location, missing), sys.argv[1:], missing)

    folder = output_folder(args.output, Path("output", args.workflow.stem))
    if location is None:
        run_on(running_server(str(url)), args, prompt, folder)
        return 0
    tell(f"Starting ComfyUI from {location.path} ({location.origin})")
    with comfyui_server(
        location,
        checkout(),
        log=folder / "comfyui.log",
        port=args.port,
        input_folder=args.input,
        all_custom_nodes=args.all_custom_nodes,
        options=["--cpu"] if args.cpu else [],
    ) as server:
        run_on(server, args, prompt, folder)
    return 0


def output_folder(named: Path | None, parent: Path) -> Path:
    """The folder `named`, or a new one in `parent`, named after the time and never that of another run.

    Raises HeadlessError where it takes no files.
    """
    folder = named or parent / datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        if named:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = new_folder(folder)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(TRIAL_BYTES))
            os.fsync(trial.fileno())
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def new_folder(wanted: Path) -> Path:
    """Make the folder `wanted`, or one with a number after its name if there is such a one already."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}_{number}")


def cannot_write(folder: Path, error: OSError) -> HeadlessError:
    """The error for an output folder that takes no files."""
    free = "Free some space there, or name" if error.errno == errno.ENOSPC else "Name"
    return HeadlessError(
        f"The output folder {folder} cannot be written: {error.strerror or error}.", f"{free} another with --output."
    )


def choose_location(args: argparse.Namespace, prompt: Prompt) -> Location:
    """The ComfyUI to start, installed first where none is found or the managed one is asked for.

    Raises HeadlessError, before anything is installed, where it would lack the nodes of the prompt.
    """
    found = None if args.install else find_comfyui(args.comfyui, args.comfyui_python)
    if found is None and args.comfyui_python:
        raise no_comfyui_for_python()
    ours = nodes_of_this_pack(prompt)
    if ours and not (checkout() or args.all_custom_nodes or installed_pack(found or managed().location)):
        listing = "\n".join(f"  {title(prompt, node_id)}" for node_id in ours)
        raise HeadlessError(
            f"The workflow uses nodes of this project, and only the library dng_core is installed here:\n{listing}",
            "Run it in a checkout of the project (python3 -m dng_core run), or put the pack into the custom_nodes of "
            "the ComfyUI that --comfyui names.",
        )
    return found or ensure_installed()


def no_comfyui_for_python() -> HeadlessError:
    """The error for a Python of a ComfyUI where no ComfyUI is named."""
    return HeadlessError(
        "--comfyui-python names the Python of a ComfyUI that is to be started, and none is named.",
        "Name it with --comfyui or DNG_COMFYUI.",
    )


def runner_python(location: Location | None, missing: list[str]) -> Path:
    """A Python that has what this command needs; raises HeadlessError where there is none."""
    if location is not None:
        return location.python
    if managed().is_whole():
        return managed().location.python
    raise HeadlessError(
        f"Talking to a server needs {' and '.join(missing)}.",
        f"Install them: {sys.executable} -m pip install {' '.join(missing)}",
    )


def run_on(server: Server, args: argparse.Namespace, prompt: dict[str, dict[str, object]], folder: Path) -> None:
    """Run the prompt on the server, save its outputs and say where they are."""
    # These need aiohttp and tqdm, which a bare Python does not have.
    from ..headless.client import run_workflow
    from ..headless.record import node_text, save_run

    version = server.stats.get("system", {}).get("comfyui_version", "")
    tell(f"Running {args.workflow.name} in ComfyUI {version} at {server.url}")
    result = run_workflow(server, prompt, timeout=args.timeout, progress=True)
    try:
        saved = save_run(folder, args.workflow, prompt, server, result)
    except OSError as error:
        raise cannot_write(folder, error) from error
    texts = dict.fromkeys(text for ui in result.ui.values() if (text := node_text(ui)))
    for text in texts:
        if not any(text in other for other in texts if other != text):  # print a growing table only once
            print(text)
    print("Saved:", *saved, sep="\n  ")
