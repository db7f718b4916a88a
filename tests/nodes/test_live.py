"""The live chart: what a client of a real server is sent while a guided run goes on, and that nobody else is."""

import asyncio
import dataclasses
import importlib
import json
from typing import Any

import aiohttp
import pytest
import torch

from dng_core.headless.server import Server

EVENT = "dynamic_negative_guidance.chart"
RUN = {"seed": 1, "steps": 60, "cfg": 1.0, "sampler_name": "euler_ancestral", "scheduler": "karras", "denoise": 1.0}
WORKFLOW = "1f0c4a52-0000-4000-8000-000000000000"


def prompt_with(sampler: dict[str, Any], samples: int = 4, **more: dict[str, Any]) -> dict[str, Any]:
    """An API workflow in which node 9 samples the oracle and node 10 reports on it."""
    return {
        "1": {"class_type": "DNGOracleModel", "inputs": {"components": 8, "prediction": "epsilon"}},
        "2": {"class_type": "DNGOracleCondition", "inputs": {"components": "all", "of": 8}},
        "3": {"class_type": "DNGOracleCondition", "inputs": {"components": "0", "of": 8}},
        "4": {"class_type": "DNGOracleLatent", "inputs": {"batch_size": samples}},
        "9": sampler,
        "10": {"class_type": "DNGOracleReport", "inputs": {"samples": ["9", 0], "forbidden": "0", "components": 8}},
        **more,
    }


def messages(server: Server, prompt: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """Arrival time (seconds) and content of each chart message of a run, as the front end that queued it gets them."""

    async def listen() -> list[tuple[float, dict[str, Any]]]:
        heard = []
        async with (
            aiohttp.ClientSession(server.url) as session,
            session.ws_connect("/ws?clientId=tester", max_msg_size=0) as socket,
        ):
            pnginfo = {"extra_pnginfo": {"workflow": {"id": WORKFLOW}}}
            body = {"prompt": prompt, "client_id": "tester", "extra_data": pnginfo}
            async with session.post("/prompt", json=body) as response:
                assert response.status == 200, await response.text()
            async for message in socket:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                assert event["type"] != "execution_error", event
                if event["type"] == EVENT:
                    heard.append((asyncio.get_running_loop().time(), event["data"]))
                if event["type"] == "execution_success":
                    break
        return heard

    return asyncio.run(asyncio.wait_for(listen(), 120))


def with_ksampler(model: str = "1") -> dict[str, Any]:
    inputs = {"model": [model, 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], **RUN}
    return {"class_type": "KSamplerDNG", "inputs": inputs}


def test_a_chart_grows_during_the_run_and_is_whole_at_its_end(comfyui_server: Server) -> None:
    heard = messages(comfyui_server, prompt_with(with_ksampler()))
    last = heard[-1][1]
    assert {(data["node"], data["workflow"], data["steps"]) for _, data in heard} == {("9", WORKFLOW, 60)}
    assert [data["done"] for _, data in heard] == [False] * (len(heard) - 1) + [True]
    assert len(heard) > 1
    assert last["start"] == 0
    assert torch.tensor(last["posterior"]).shape == torch.tensor(last["scale"]).shape == (60, 1, 4)

    steps: list = []
    for _, data in heard[:-1]:
        assert data["start"] <= len(steps)
        steps[data["start"] :] = data["posterior"]
    assert steps == last["posterior"][: len(steps)]


def test_there_are_at_most_five_updates_a_second(comfyui_server: Server) -> None:
    prompt = prompt_with(with_ksampler())
    prompt["9"]["inputs"] |= {"seed": 2, "steps": 300}
    times = [time for time, data in messages(comfyui_server, prompt) if not data["done"]]
    assert len(times) <= 5 * (times[-1] - times[0]) + 2


def test_the_chart_is_for_the_node_that_runs_the_patched_model_or_the_guider(comfyui_server: Server) -> None:
    stock = with_ksampler(model="5") | {"class_type": "KSampler"}
    stock["inputs"] |= {"negative": ["2", 0], "steps": 5}
    patch = {"class_type": "DynamicNegativeGuidance", "inputs": {"model": ["1", 0], "negative": ["3", 0]}}
    heard = messages(comfyui_server, prompt_with(stock, **{"5": patch}))
    assert {data["node"] for _, data in heard} == {"9"}
    assert len(heard[-1][1]["posterior"]) == 5


def test_large_batches_are_summed_up_in_quantiles(comfyui_server: Server) -> None:
    prompt = prompt_with(with_ksampler(), samples=40)
    prompt["9"]["inputs"] |= {"steps": 5}
    last = messages(comfyui_server, prompt)[-1][1]
    posterior = torch.tensor(last["posterior"])
    assert last["images"] == 40
    assert posterior.shape == (5, 1, 7)
    assert (posterior.diff(dim=-1) >= 0).all()


class Recorder:
    """A listener that writes down what it is sent."""

    connected = True

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


def test_nobody_listens_to_a_run_without_a_server(pack: Any, comfyui: Any) -> None:
    assert importlib.import_module(pack.__name__ + ".nodes.run.live").current_listener() is None


def test_a_listener_changes_no_bit_of_the_images(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    silent, _ = bench.dng(bench.model())
    recorder = Recorder()
    monkeypatch.setattr(bench.begin, "current_listener", lambda: recorder)
    heard, trace = bench.dng(bench.model())
    assert torch.equal(silent, heard)
    torch.testing.assert_close(torch.tensor(recorder.sent[-1]["posterior"]), trace.posterior, rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.tensor(recorder.sent[-1]["scale"]), trace.scale, rtol=1e-3, atol=0)


def test_a_closed_tab_gets_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    recorder.connected = False
    monkeypatch.setattr(bench.begin, "current_listener", lambda: recorder)
    bench.dng(bench.model())
    assert recorder.sent == []


def test_steps_that_a_sampler_takes_back_are_sent_anew(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """heun calls the model twice on each level: what was sent of a level's first call is replaced by the second."""
    recorder = Recorder()
    live = importlib.import_module(bench.begin.LiveChart.__module__)
    monkeypatch.setattr(bench.begin, "current_listener", lambda: recorder)
    monkeypatch.setattr(live, "INTERVAL", 0.0)
    bench.dng(bench.model(), sampler_name="heun")
    steps: list = []
    for data in recorder.sent:
        steps[data["start"] :] = data["posterior"]
    assert len(steps) == 5
    assert steps == recorder.sent[-1]["posterior"]
    assert any(
        b["start"] < a["start"] + len(a["posterior"])
        for a, b in zip(recorder.sent[:-2], recorder.sent[1:-1], strict=True)
    )


def test_what_json_does_not_know_is_left_out(pack: Any, comfyui: Any) -> None:
    live = importlib.import_module(pack.__name__ + ".nodes.run.live")
    assert live.rounded([float("nan"), float("inf"), 0.123456]) == [None, None, 0.1235]


def test_a_listener_hears_at_which_steps_nothing_was_evaluated(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(bench.begin, "current_listener", lambda: recorder)
    concept = dataclasses.replace(bench.concept(), economy="auto")
    _, trace = bench.dng(bench.model(), concept, bench.latent(1), steps=20)
    assert recorder.sent[-1]["looked"] == trace.looked.tolist()
    assert 0 < int(trace.looked.sum()) < 20
