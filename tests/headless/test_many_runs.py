"""A ComfyUI that runs for days: its memory does not grow with the number of runs.

`python3 -m dng_core test -m slow -s tests/headless/test_many_runs.py` takes some minutes, and prints the memory.
"""

import asyncio
import json

import aiohttp
import psutil
import pytest

from dng_core.headless.server import Server
from dng_core.headless.workflow import Prompt

SAMPLES = 4096  # of one run: their latent has 256 KiB, which kept by every run would be 225 MiB after 900 runs
ROUND, ROUNDS = 100, 10
MOST_GROWTH = 64 * 2**20  # less than a third of that; a choice. The allocator's pools still grow a little at first
OPTIONS = {"steps": 4, "cfg": 1.0, "scheduler": "karras", "denoise": 1.0}
SAMPLERS = ("euler_ancestral", "dpmpp_2m_sde", "euler")


def run(number: int) -> Prompt:
    """KSampler (DNG) and the patch in turns, each run with a seed of its own, on the oracle model."""
    own = {"seed": number, "sampler_name": SAMPLERS[number % len(SAMPLERS)], **OPTIONS}
    avoid = {"settings": "exact", "settings.prior": 0.2, "settings.guidance_scale": 1.0}
    wires = {"positive": ["2", 0], "latent_image": ["4", 0]}
    prompt: Prompt = {
        "1": {"class_type": "DNGOracleModel", "inputs": {"components": 8, "prediction": "epsilon"}},
        "2": {"class_type": "DNGOracleCondition", "inputs": {"components": "all", "of": 8}},
        "3": {"class_type": "DNGOracleCondition", "inputs": {"components": "0", "of": 8}},
        "4": {"class_type": "DNGOracleLatent", "inputs": {"batch_size": SAMPLES}},
        "7": {"class_type": "DNGOracleReport", "inputs": {"samples": ["6", 0], "forbidden": "0", "components": 8}},
    }
    if number % 2:
        given = {"model": ["1", 0], "negative": ["3", 0], **wires, **own, **avoid}
        return prompt | {"6": {"class_type": "KSamplerDNG", "inputs": given}}
    patch = {"model": ["1", 0], "negative": ["3", 0], **avoid}
    given = {"model": ["5", 0], "negative": ["2", 0], **wires, **own}
    return prompt | {
        "5": {"class_type": "DynamicNegativeGuidance", "inputs": patch},
        "6": {"class_type": "KSampler", "inputs": given},
    }


async def queue_and_wait(server: Server, numbers: range) -> None:
    """Queue these runs at once, as a client that listens to their charts, and wait until all of them have ended."""
    limits = aiohttp.ClientTimeout(total=None)
    async with (
        aiohttp.ClientSession(server.url, timeout=limits) as session,
        session.ws_connect("/ws?clientId=many-runs", max_msg_size=0) as messages,
    ):
        for number in numbers:
            sent = {"prompt": run(number), "client_id": "many-runs"}
            async with session.post("/prompt", json=sent) as answer:
                assert answer.status == 200, await answer.text()
        ended: set[str] = set()
        while len(ended) < len(numbers):
            received = await messages.receive()
            if received.type != aiohttp.WSMsgType.TEXT:
                assert received.type == aiohttp.WSMsgType.BINARY, received  # a preview
                continue
            message = json.loads(received.data)
            assert message["type"] not in ("execution_error", "execution_interrupted"), message
            if message["type"] == "execution_success":
                ended.add(message["data"]["prompt_id"])
        async with session.post("/history", json={"clear": True}) as answer:  # of 10000 runs, kept by ComfyUI itself
            assert answer.status == 200


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_stays_flat_over_a_thousand_queued_runs_after_a_hundred_to_warm_up(comfyui_server: Server) -> None:
    assert comfyui_server.process is not None
    process, memory = psutil.Process(comfyui_server.process.pid), []
    for first in range(0, (1 + ROUNDS) * ROUND, ROUND):
        asyncio.run(queue_and_wait(comfyui_server, range(first, first + ROUND)))
        memory.append(process.memory_info().rss)
        print(f"after {first + ROUND} runs: {memory[-1] / 2**20:.1f} MiB", flush=True)
    assert memory[-1] - memory[0] < MOST_GROWTH
