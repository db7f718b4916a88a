"""How long DNG takes in a real ComfyUI, against the stock KSampler without and with a negative prompt."""

import math
import random
import statistics
from collections.abc import Iterator
from typing import Any

from ..client import run_workflow
from ..server import Server
from ..workflow import Prompt
from .kept import Row

WAYS = (
    ("KSampler, no negative", 1.0, None),
    ("KSampler (DNG), economy off", 1.0, "off"),
    ("KSampler (DNG), economy auto", 1.0, "auto"),
    ("KSampler, negative prompt", 5.0, None),
    ("KSampler (DNG), economy off", 5.0, "off"),
    ("KSampler (DNG), economy auto", 5.0, "auto"),
)
"""Node, cfg and economy; the scale 5 is a choice. Each is compared with the stock KSampler at its own cfg."""


def speed_figure(server: Server, images: int, steps: int, repeats: int, seed: int) -> Iterator[Row]:
    """The shipped MNIST model, the same steps and seeds, in turns of random order, after one untimed turn.

    The digit 0 is avoided among all digits. Seconds are those of the sampler's node.
    """
    seconds: list[list[float]] = [[] for _ in WAYS]
    predictions: list[list[float]] = [[] for _ in WAYS]
    order = random.Random(seed)
    for turn in range(repeats + 1):
        for i in order.sample(range(len(WAYS)), len(WAYS)):
            _, cfg, economy = WAYS[i]
            result = run_workflow(server, speed_prompt(cfg, economy, images, steps, seed + turn))
            if turn:
                seconds[i].append(result.node_seconds["sampler"] / images)
                own = steps * (1 if cfg == 1 else 2)
                counts = result.ui["table"]["predictions"][0] if economy else {"evaluated": 0}
                predictions[i].append(own + counts["evaluated"])
    for i, (name, cfg, economy) in enumerate(WAYS):
        stock = next(j for j, (_, other, of) in enumerate(WAYS) if other == cfg and of is None)
        ratios = [ours / theirs for ours, theirs in zip(seconds[i], seconds[stock], strict=True)]
        yield {
            "node": name,
            "cfg": cfg,
            "turns": repeats,
            "predictions an image": statistics.mean(predictions[i]),
            "seconds an image (median)": statistics.median(seconds[i]),
            "against stock (median)": "" if economy is None else _interval(ratios),
        }


def _interval(ratios: list[float]) -> str:
    """The median with an interval of at least 95 % that assumes nothing of the distribution (of the order)."""
    ordered, count = sorted(ratios), len(ratios)
    below, tail = 0, 2.0**-count
    while tail + math.comb(count, below + 1) * 2.0**-count <= 0.025:
        below += 1
        tail += math.comb(count, below) * 2.0**-count
    return f"{statistics.median(ratios):.2f} x ({ordered[below]:.2f} .. {ordered[-1 - below]:.2f})"


def speed_prompt(cfg: float, economy: str | None, images: int, steps: int, seed: int) -> Prompt:
    """One run on the MNIST model; the sampler's node is "sampler", the trace's table "table"."""
    sampling: dict[str, Any] = {
        "seed": seed, "steps": steps, "cfg": cfg, "sampler_name": "euler_ancestral", "scheduler": "normal",
        "denoise": 1.0, "model": ["model", 0], "positive": ["all", 0], "negative": ["undesired", 0],
        "latent_image": ["latent", 0],
    }  # fmt: skip
    if economy is not None:
        settings = {"settings": "custom", "settings.economy": economy, "settings.prior": 0.1}
        sampling |= {**settings, "unconditional": ["all", 0]}
    prompt: Prompt = {
        "model": _node("DNGLoadPixelModel", name="mnist"),
        "all": _node("DNGClassLabel", model=["model", 0], label="none"),
        "undesired": _node("DNGClassLabel", model=["model", 0], label="0"),
        "latent": _node("DNGEmptyPixelLatent", model=["model", 0], batch_size=images),
        "sampler": _node("KSampler" if economy is None else "KSamplerDNG", **sampling),
        "picture": _node("DNGPixelLatentToImage", samples=["sampler", 0], upscale=1),
        "preview": _node("PreviewImage", images=["picture", 0]),
    }
    if economy is not None:
        prompt["table"] = _node("DNGTraceTable", trace=["sampler", 1])
    return prompt


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
