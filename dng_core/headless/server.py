"""A ComfyUI server: one that is started here and stopped again, or one that runs already."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import parse_json
from .errors import FULL_DISK_REMEDY, HeadlessError
from .link import link_folder, unlink_folder
from .locate import Location, has_accelerator
from .paths import is_pack
from .process import start, stop
from .scratch import scratch_folder

HOST = "127.0.0.1"
START_SECONDS = 600.0  # like the numbers below, a choice
POLL_SECONDS = 0.3
PORT_ATTEMPTS = 3
LOG_TAIL_LINES = 25
FULL_BYTES = 1 << 16  # with less space than this left, a disk is taken to be full
LOADING_ERROR = re.compile(r"Cannot import .* module for custom nodes|Error while calling comfy_entrypoint")
IMPORT_ERROR = re.compile(r"(ModuleNotFoundError|ImportError): ")  # the last words where a package is missing
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# No user's copy should have this name, so that ComfyUI loads the copy that is meant.
PACK_NAME = "dynamic-negative-guidance-checkout"


@dataclass
class Server:
    """A ComfyUI that answers at `url`; `process`, `log` and `location` are set for one that was started here."""

    url: str
    stats: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    log: Path | None = None
    location: Location | None = None
    start_seconds: float = 0.0

    def check_alive(self) -> None:
        """Raise HeadlessError, with the end of its log, where a server that was started here has ended."""
        if self.process is not None and (status := self.process.poll()) is not None:
            if full := self.full_disk():
                raise HeadlessError(f"ComfyUI ended because the disk of {full} is full.", FULL_DISK_REMEDY)
            log = f"The end of its log:\n{self.log_tail()}"
            last = self.log_lines()[-1:]
            if self.location and status > 0 and last and IMPORT_ERROR.match(last[0]):
                raise HeadlessError(
                    f"{self.location.python} cannot run the ComfyUI in {self.location.path}: {last[0]}. {log}",
                    self.location.remedy,
                )
            raise HeadlessError(
                f"ComfyUI ended unexpectedly ({describe_status(status)}). {log}",
                "If memory ran out, use smaller batches; else the log says what failed.",
            )

    def full_disk(self) -> Path | None:
        """The folder that a server started here writes to and that is full, if one is."""
        written = (self.log.parent, Path(tempfile.gettempdir())) if self.log else ()
        return next((folder for folder in written if shutil.disk_usage(folder).free < FULL_BYTES), None)

    def log_lines(self) -> list[str]:
        """The log so far, without colours; empty for a server that was not started here."""
        if self.log is None or not self.log.is_file():
            return []
        return ANSI_COLOUR.sub("", self.log.read_text(encoding="utf-8", errors="replace")).splitlines()

    def log_tail(self) -> str:
        """The last lines of the log, indented."""
        return "\n".join(f"  | {line}" for line in self.log_lines()[-LOG_TAIL_LINES:])

    def loading_errors(self) -> str:
        """What the log says of node packs that did not load, each with the traceback above it, indented."""
        lines = self.log_lines()
        failures = [number for number, line in enumerate(lines) if LOADING_ERROR.search(line)]
        shown = sorted({near for last in failures for near in range(max(0, last - LOG_TAIL_LINES), last + 1)})
        return "\n".join(f"  | {lines[number]}" for number in shown)


@contextlib.contextmanager
def comfyui_server(
    location: Location,
    pack: Path | None = None,
    *,
    log: Path | None = None,
    port: int | None = None,
    input_folder: Path | None = None,
    all_custom_nodes: bool = False,
    further: Sequence[Path] = (),
    options: Sequence[str] = (),
) -> Iterator[Server]:
    """Start the ComfyUI at `location` on loopback with the node pack `pack`, and stop it at the end, whatever happens.

    The server reads its usual models, and writes into folders that are deleted at the end. It loads the nodes in the
    folders `further`, and other custom nodes only with `all_custom_nodes`. `options` are further options of ComfyUI.
    Without a GPU it runs on the CPU. Raises HeadlessError where the server does not start, or where the given `port`
    is taken.
    """
    started = time.monotonic()
    with scratch_folder("dng-") as folder:
        device = [] if "--cpu" in options or has_accelerator(location) else ["--cpu"]
        with visible_pack(location, pack, folder, all_custom_nodes, further) as pack_options:
            arguments = [*server_options(folder, input_folder), *pack_options, *device, *options]
            server = start_on_some_port(location, arguments, log or folder / "comfyui.log", port)
            try:
                server.start_seconds = time.monotonic() - started
                yield server
            finally:
                if server.process is not None:
                    stop(server.process)


def server_options(folder: Path, input_folder: Path | None) -> list[str]:
    """ComfyUI's options for a server that keeps everything it writes inside `folder`."""
    options = [
        "--listen",
        HOST,
        "--disable-auto-launch",
        "--disable-api-nodes",
        "--database-url",
        "sqlite:///:memory:",
    ]
    for kind in ("input", "output", "temp", "user"):
        (folder / kind).mkdir(exist_ok=True)
        chosen = input_folder if kind == "input" and input_folder else folder / kind
        options += [f"--{kind}-directory", str(chosen.absolute())]
    return options


@contextlib.contextmanager
def visible_pack(
    location: Location, pack: Path | None, folder: Path, all_custom_nodes: bool, further: Sequence[Path] = ()
) -> Iterator[list[str]]:
    """ComfyUI's options that make it load `pack` once, through a link in `folder`, without touching the user's files.

    A copy of the pack in the user's custom_nodes is used instead in three cases: every custom node is to be loaded
    (two copies would clash), the copy leads to the same files, or there is no `pack`. The folders `further` hold other
    nodes to load, and come through links too.
    """
    own = installed_pack(location)
    if own is not None and not (all_custom_nodes or pack is None or own.resolve() == pack.resolve()):
        own = None
    linked = {} if own is not None or pack is None else {PACK_NAME: pack}
    linked |= {f"dng-{other.name}": other for other in further}
    names = [*([own.name] if own is not None else []), *linked]
    options = [] if all_custom_nodes else ["--disable-all-custom-nodes"]
    if names and not all_custom_nodes:
        options += ["--whitelist-custom-nodes", *names]
    if not linked:
        yield options
        return
    custom_nodes = folder / "custom_nodes"
    custom_nodes.mkdir()
    config = folder / "extra_model_paths.yaml"
    config.write_text(json.dumps({"dng": {"custom_nodes": str(custom_nodes)}}), encoding="utf-8")  # JSON is YAML
    with contextlib.ExitStack() as links:
        for name, target in linked.items():
            link_folder(target, custom_nodes / name)
            links.callback(unlink_folder, custom_nodes / name)
        yield [*options, "--extra-model-paths-config", str(config)]


def installed_pack(location: Location) -> Path | None:
    """The copy of this pack in the custom_nodes of the ComfyUI at `location`, if there is one."""
    folder = location.path / "custom_nodes"
    if not folder.is_dir():
        return None
    copies = (entry for entry in sorted(folder.iterdir()) if not entry.name.endswith(".disabled") and is_pack(entry))
    return next(copies, None)


def start_on_some_port(location: Location, arguments: list[str], log: Path, port: int | None) -> Server:
    """Start ComfyUI on `port`, or on a free one. Try another free port where another program took the first."""
    attempts = 1 if port else PORT_ATTEMPTS
    for attempt in range(1, attempts + 1):
        chosen = port or free_port()
        if not is_free(chosen):
            raise port_in_use(chosen)
        command = [str(location.path / "main.py"), *arguments, "--port", str(chosen)]
        log.unlink(missing_ok=True)
        with log.open("xb") as output:  # "x" follows no link that lies there
            process = start(location.python, command, output, location.path)
        server = Server(f"http://{HOST}:{chosen}", process=process, log=log, location=location)
        try:
            server.stats = wait_until_ready(server, arguments)
            return server
        except BaseException as error:
            stop(process)
            lost_the_port = isinstance(error, HeadlessError) and "is already in use" in server.log_tail()
            if not lost_the_port:
                raise
            if attempt == attempts:
                raise port_in_use(chosen) from error
    raise AssertionError("unreachable: the last attempt returns or raises")


def wait_until_ready(server: Server, arguments: Sequence[str]) -> dict[str, Any]:
    """Wait for the server's answer and return its system statistics.

    Another ComfyUI may have taken the port meanwhile. So the answer must show our own arguments, among them our own
    folders. Raises HeadlessError where the server ends or never answers.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        server.check_alive()
        with contextlib.suppress(OSError, ValueError):
            stats = system_stats(server.url, timeout=5)
            if set(arguments) <= set(stats["system"].get("argv", ())):
                return stats
        time.sleep(POLL_SECONDS)
    raise HeadlessError(f"ComfyUI did not answer in {START_SECONDS:.0f} s. The end of its log:\n{server.log_tail()}")


def running_server(url: str) -> Server:
    """The server that runs at `url` already; raises HeadlessError where none answers or it is not a ComfyUI."""
    url = url.rstrip("/") if "://" in url else f"http://{url.rstrip('/')}"
    try:
        return Server(url, system_stats(url, timeout=30))
    except (OSError, ValueError) as error:
        raise HeadlessError(
            f"No ComfyUI answers at {url}: {error}",
            "Start it, correct --server or DNG_SERVER, or leave them out so that one is started here.",
        ) from error


def system_stats(url: str, timeout: float) -> dict[str, Any]:
    """What ComfyUI says of itself; raises OSError without an answer, and ValueError if something else answers."""
    # No proxy is used: a proxy for the internet cannot reach loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/system_stats", timeout=timeout) as response:
        stats = parse_json(response.read().decode())
    if not isinstance(stats, dict) or "comfyui_version" not in stats.get("system", {}):
        raise ValueError("the answer is not ComfyUI's")
    return stats


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.create_server((HOST, 0)) as probe:
        number: int = probe.getsockname()[1]
        return number


def is_free(port: int) -> bool:
    """Whether nothing listens on the loopback port."""
    try:
        with socket.create_server((HOST, port), reuse_port=False):
            return True
    except OSError:
        return False


def port_in_use(port: int) -> HeadlessError:
    """The error for a port that another program holds."""
    return HeadlessError(
        f"Port {port} is in use by another program.", "Leave out --port to have a free one chosen, or name another."
    )


def describe_status(status: int) -> str:
    """An exit status in words."""
    return f"killed by signal {-status}" if status < 0 and os.name == "posix" else f"exit status {status}"
