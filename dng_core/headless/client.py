"""Run one workflow on a ComfyUI server: send it, follow it over the WebSocket, fetch what it made."""

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from tqdm import tqdm

from ..files import parse_json
from .errors import HeadlessError
from .server import Server
from .workflow import Prompt, check_node_types, describe_failure, describe_rejection, given_title, title

REQUEST_SECONDS = 120.0  # like the numbers below, a choice
# After this silence, check that the server still lives.
LISTEN_SECONDS = 2.0
HISTORY_SECONDS = 30.0  # after this silence, ask whether the run ended without a message
HUNG_SECONDS = 120.0  # without an answer to that, give up: a node may block the server, but not so long
LOST_ATTEMPTS = 5
CANCEL_SECONDS = 10.0
TERMINAL_REDRAW_SECONDS = 0.1
LOG_REDRAW_SECONDS = 10.0


@dataclass
class RunResult:
    """What a run made: each node's report (`ui`), its files' contents, and the seconds of the run and its nodes."""

    prompt_id: str
    ui: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, list[tuple[str, bytes]]] = field(default_factory=dict)
    node_info: dict[str, dict[str, Any]] = field(default_factory=dict)
    node_seconds: dict[str, float] = field(default_factory=dict)
    cached: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_workflow(server: Server, prompt: Prompt, *, timeout: float | None = None, progress: bool = False) -> RunResult:
    """Run `prompt` on `server` to its end and fetch its outputs.

    Raises HeadlessError where ComfyUI lacks a node class, refuses the workflow, a node fails, the server dies, or
    `timeout` seconds pass. An error or Ctrl-C before the end cancels this prompt and no other.
    """
    return asyncio.run(_run(server, prompt, timeout, progress))


async def _run(server: Server, prompt: Prompt, timeout: float | None, progress: bool) -> RunResult:
    limits = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with aiohttp.ClientSession(server.url, timeout=limits) as session:
        connection = Connection(server, session, prompt)
        try:
            async with asyncio.timeout(timeout) as limit:
                return await connection.run(progress)
        except TimeoutError as error:
            if limit.expired():
                raise HeadlessError(
                    f"The workflow did not end in {timeout} s.", "Allow more with --timeout."
                ) from error
            raise does_not_answer(server, REQUEST_SECONDS) from error
        except aiohttp.ClientError as error:
            server.check_alive()
            raise HeadlessError(f"The connection to ComfyUI at {server.url} failed: {error}") from error


def does_not_answer(server: Server, seconds: float) -> HeadlessError:
    """The error for a server that lets `seconds` pass without an answer, with the end of the log if it is ours."""
    log = f", though its process still runs. The end of its log:\n{server.log_tail()}" if server.process else "."
    return HeadlessError(
        f"ComfyUI at {server.url} has not answered for {seconds:.0f} s{log}",
        "It hangs, or the machine is overloaded: see what it did last, and try again with less at once.",
    )


class Connection:
    """One prompt's conversation with a server."""

    def __init__(self, server: Server, session: aiohttp.ClientSession, prompt: Prompt) -> None:
        self.server = server
        self.session = session
        self.prompt = prompt
        self.client_id = uuid.uuid4().hex
        self.prompt_id = ""
        self.result = RunResult("")

    async def run(self, progress: bool) -> RunResult:
        """Check, submit, follow, fetch."""
        info = await self.get_json("/object_info")
        check_node_types(self.prompt, info, self.server.loading_errors())
        used = sorted({node["class_type"] for node in self.prompt.values()})
        started = time.monotonic()
        async with self.submitted():
            self.result = RunResult(self.prompt_id, node_info={name: info[name] for name in used})
            with Progress(self.prompt, self.result, shown=progress) as bar:
                history = await self.follow(bar)
        self.result.seconds = time.monotonic() - started
        for node_id, ui in history.get("outputs", {}).items():
            self.result.ui[node_id] = ui
            self.result.files[node_id] = [(item["filename"], await self.fetch(item)) for item in file_items(ui)]
        return self.result

    @asynccontextmanager
    async def submitted(self) -> AsyncIterator[None]:
        """Submit the prompt. Cancel it if an error ends this context early."""
        websocket = await self.listen()
        self.websocket = websocket
        try:
            body = {"prompt": self.prompt, "client_id": self.client_id}
            async with self.session.post("/prompt", json=body) as response:
                answer = await decode(response)
            if "prompt_id" not in answer:
                raise describe_rejection(self.prompt, answer)
            self.prompt_id = answer["prompt_id"]
            try:
                if answer.get("node_errors"):
                    raise describe_rejection(self.prompt, answer)
                yield
            except BaseException:
                await shielded(self.cancel())
                raise
        finally:
            await self.websocket.close()

    async def listen(self) -> aiohttp.ClientWebSocketResponse:
        """Open the WebSocket on which the server reports progress."""
        return await self.session.ws_connect(f"/ws?clientId={self.client_id}", max_msg_size=0)

    async def follow(self, bar: "Progress") -> dict[str, Any]:
        """Report progress until the run ends; returns its history. Raises HeadlessError where it failed."""
        lost = 0
        asked = time.monotonic()
        while True:
            self.server.check_alive()
            try:
                message = await self.websocket.receive(timeout=LISTEN_SECONDS)
            except TimeoutError:
                message = None
            if message is None or message.type in (
                aiohttp.WSMsgType.CLOSE,
                aiohttp.WSMsgType.CLOSING,
                aiohttp.WSMsgType.CLOSED,
                aiohttp.WSMsgType.ERROR,
            ):
                silent = message is None
                if silent and time.monotonic() - asked < HISTORY_SECONDS:
                    continue
                try:
                    async with asyncio.timeout(HUNG_SECONDS):
                        history = await self.history()
                    if history:
                        return history
                    if not silent:
                        await asyncio.sleep(LISTEN_SECONDS / 2)
                        self.websocket = await self.listen()
                    lost = 0
                except TimeoutError as error:
                    self.server.check_alive()
                    raise does_not_answer(self.server, HUNG_SECONDS) from error
                except aiohttp.ClientError as error:
                    await asyncio.sleep(LISTEN_SECONDS)
                    self.server.check_alive()
                    lost += 1
                    if lost == LOST_ATTEMPTS:
                        raise HeadlessError(f"ComfyUI at {self.server.url} no longer answers: {error}") from error
                asked = time.monotonic()
            elif message.type == aiohttp.WSMsgType.TEXT:
                event = json_object(message.data, "reports")
                data = event.get("data") or {}
                if data.get("prompt_id") != self.prompt_id:
                    continue
                if bar.see(event["type"], data) and (history := await self.history()):
                    return history

    async def history(self) -> dict[str, Any] | None:
        """The record of the ended run, or None before its end; raises HeadlessError where the run failed."""
        entry = (await self.get_json(f"/history/{self.prompt_id}")).get(self.prompt_id)
        if entry is None:
            return None
        status = entry.get("status") or {}
        if status.get("status_str") == "success":
            return dict(entry)
        for kind, details in status.get("messages", ()):
            if kind == "execution_error":
                raise describe_failure(self.prompt, details)
            if kind == "execution_interrupted":
                node = title(self.prompt, str(details.get("node_id")))
                raise HeadlessError(f"The run was interrupted at {node}, on the server or by another of its users.")
        raise HeadlessError("The run ended without success, and ComfyUI does not say why.", self.server.log_tail())

    async def cancel(self) -> None:
        """Take this prompt out of the queue, or interrupt it where it is the one that runs."""
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                queue = await self.get_json("/queue")
                if any(item[1] == self.prompt_id for item in queue.get("queue_running", ())):
                    await (await self.session.post("/interrupt", json={"prompt_id": self.prompt_id})).release()
                else:
                    await (await self.session.post("/queue", json={"delete": [self.prompt_id]})).release()
        except (aiohttp.ClientError, HeadlessError, TimeoutError, OSError):
            pass  # a server that does not answer has nothing left to cancel

    async def fetch(self, item: Mapping[str, str]) -> bytes:
        """The contents of one output file."""
        query = {key: item.get(key, "") for key in ("filename", "subfolder", "type")}
        async with self.session.get("/view", params=query) as response:
            if response.status != 200:
                raise HeadlessError(f"ComfyUI does not hand out its output {item['filename']} ({response.status}).")
            return await response.read()

    async def get_json(self, path: str) -> dict[str, Any]:
        """The JSON object at `path`."""
        async with self.session.get(path) as response:
            if response.status != 200:
                raise HeadlessError(f"ComfyUI answers {response.status} to {path}: {(await response.text())[:500]}")
            return await decode(response)


async def decode(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The answer as a JSON object; raises HeadlessError where it is something else."""
    return json_object(await response.text(), f"answers {response.status} with")


def json_object(text: str, told: str) -> dict[str, Any]:
    """The JSON object that ComfyUI sent; raises HeadlessError where it is something else, or nested too deeply."""
    try:
        answer = parse_json(text)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise HeadlessError(f"ComfyUI {told} something other than a JSON object: {text[:500]}")
    return answer


async def shielded(work: Awaitable[None]) -> None:
    """Carry `work` to its end even while the waiting task is cancelled."""
    await asyncio.shield(asyncio.ensure_future(work))


def file_items(ui: Mapping[str, Any]) -> list[dict[str, str]]:
    """The files that a node's report names, each as what /view asks for."""
    lists = (value for value in ui.values() if isinstance(value, list))
    return [item for items in lists for item in items if isinstance(item, dict) and "filename" in item]


class Progress:
    """A bar that counts nodes, and the steps of the node that runs."""

    def __init__(self, prompt: Prompt, result: RunResult, shown: bool) -> None:
        self.prompt = prompt
        self.result = result
        self.node: str | None = None
        self.since = time.monotonic()
        self.drawn = 0.0
        self.redraw_seconds = TERMINAL_REDRAW_SECONDS if sys.stderr.isatty() else LOG_REDRAW_SECONDS
        self.done: set[str] = set()
        self.bar = tqdm(
            total=len(prompt),
            disable=not shown,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {desc} [{elapsed}]",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def see(self, kind: str, data: Mapping[str, Any]) -> bool:
        """Take in one message of this prompt; returns whether it says that the run ended."""
        if kind == "execution_cached":
            self.result.cached = [str(node) for node in data.get("nodes", ())]
            self.done.update(self.result.cached)
        elif kind == "executing" and data.get("node") is not None:
            self.leave_node()
            self.node = str(data.get("display_node") or data["node"])
            self.show(0.0, "")
        elif kind == "progress" and data.get("max"):
            share = float(data["value"]) / float(data["max"])
            self.show(share, f" {data['value']}/{data['max']}")
        elif kind in ("execution_success", "execution_error", "execution_interrupted") or kind == "executing":
            self.leave_node()
            return True
        return False

    def leave_node(self) -> None:
        """Note how long the node that ran took."""
        now = time.monotonic()
        if self.node is not None:
            spent = self.result.node_seconds.get(self.node, 0.0) + now - self.since
            self.result.node_seconds[self.node] = spent
            self.done.add(self.node)
        self.node = None
        self.since = now
        self.bar.n = min(len(self.done & self.prompt.keys()), len(self.prompt))

    def show(self, share: float, steps: str) -> None:
        """Draw the bar with the running node's share done."""
        done = len((self.done - {self.node}) & self.prompt.keys())
        self.bar.n = min(done + share, len(self.prompt))
        node = self.prompt.get(self.node or "", {})
        name = given_title(node) or node.get("class_type", "")
        self.bar.set_description_str(f"{name}{steps}", refresh=False)
        if time.monotonic() - self.drawn > self.redraw_seconds:
            self.bar.refresh()
            self.drawn = time.monotonic()
