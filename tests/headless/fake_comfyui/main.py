"""A stand-in for ComfyUI's main.py that starts in a moment and can be told to misbehave.

It speaks as much of ComfyUI's protocol as the runner uses. A prompt's node classes say what it does: "Done" ends well,
"Die" ends the process, "Hang" never ends, "Freeze" answers nothing any more, "Interrupted" reports an interruption.
FAKE_START says how it starts: "die", "lack" (a package is missing), "taken" (the first time it finds its port in use),
"slow" (it takes its time to list its nodes) or "stubborn" (it ignores polite requests to stop). It notes its process
ids in FAKE_PIDS: its own, and that of a child, which stands for what a node pack may start. With "Nest" it reports,
and with FAKE_START "nested" it lists its nodes, in JSON that is nested far too deeply.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from aiohttp import web

parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
arguments, _ = parser.parse_known_args()
behaviour = os.environ.get("FAKE_START", "")
pids = os.environ.get("FAKE_PIDS")
runs: dict[str, str] = {}
NESTED = "[" * 100_000 + "]" * 100_000
sockets: list[web.WebSocketResponse] = []
cancelled: list[str] = []
routes = web.RouteTableDef()

if behaviour == "die":
    print("the fake ComfyUI has a bad day")
    raise SystemExit(3)
if behaviour == "lack":
    import a_package_that_is_missing  # type: ignore[import-not-found]  # noqa: F401
if behaviour == "taken" and pids and not Path(pids).exists():
    Path(pids).touch()
    print(f"Port {arguments.port} is already in use on address 127.0.0.1.")
    raise SystemExit(1)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if pids:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pids).write_text(f"{os.getpid()} {helper.pid}")


@routes.get("/system_stats")
async def system_stats(request: web.Request) -> web.Response:
    system = {"comfyui_version": "fake", "argv": sys.argv, "path": sys.path, "cancelled": cancelled}
    return web.json_response({"system": system, "devices": []})


@routes.get("/object_info")
async def object_info(request: web.Request) -> web.Response:
    if behaviour == "slow":
        await asyncio.sleep(600)
    if behaviour == "nested":
        return web.Response(text=NESTED, content_type="application/json")
    return web.json_response({name: {} for name in ("Done", "Die", "Hang", "Freeze", "Interrupted", "Nest")})


@routes.get("/ws")
async def websocket(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    sockets.append(socket)
    async for _ in socket:
        pass
    return socket


@routes.post("/prompt")
async def prompt(request: web.Request) -> web.Response:
    print("got prompt", flush=True)
    body = await request.json()
    number = str(uuid.uuid4())
    runs[number] = next(iter(body["prompt"].values()))["class_type"]
    asyncio.get_running_loop().create_task(execute(number))
    return web.json_response({"prompt_id": number, "node_errors": {}})


async def execute(number: str) -> None:
    await asyncio.sleep(0.3)
    kind = runs[number]
    if kind == "Die":
        print("out of memory, says the fake ComfyUI", flush=True)
        os._exit(9)
    if kind == "Freeze":
        print("deep in thought, says the fake ComfyUI", flush=True)
        time.sleep(600)
    node = None if kind in ("Done", "Interrupted") else "1"
    for socket in sockets:
        if not socket.closed:
            if kind == "Nest":
                await socket.send_str(NESTED)
            await socket.send_json({"type": "executing", "data": {"node": node, "prompt_id": number}})


@routes.get("/history/{number}")
async def history(request: web.Request) -> web.Response:
    number = request.match_info["number"]
    if runs.get(number) == "Done":
        return web.json_response({number: {"outputs": {}, "status": {"status_str": "success", "messages": []}}})
    if runs.get(number) == "Interrupted":
        messages = [["execution_interrupted", {"node_id": "1"}]]
        return web.json_response({number: {"outputs": {}, "status": {"status_str": "error", "messages": messages}}})
    return web.json_response({})


@routes.get("/queue")
async def queue(request: web.Request) -> web.Response:
    running = [[0, number] for number, kind in runs.items() if kind == "Hang"]
    return web.json_response({"queue_running": running, "queue_pending": []})


@routes.post("/interrupt")
async def interrupt(request: web.Request) -> web.Response:
    cancelled.append((await request.json())["prompt_id"])
    return web.Response()


application = web.Application()
application.add_routes(routes)
web.run_app(application, host="127.0.0.1", port=arguments.port, print=None, handle_signals=False)
