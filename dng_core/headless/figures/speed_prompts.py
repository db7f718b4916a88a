"""The runs that `dng bench comfyui` compares: what is drawn and avoided, and by which nodes, as API prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..workflow import Prompt

MODELS = ("mnist", "picture-book", "sd15", "sdxl")
SMALL = MODELS[:2]
SIZES = {"sd15": 512, "sdxl": 1024}
"""The models with random weights, and the width and height that their originals draw."""
FAMILIES = {"sd15": "SD15", "sdxl": "SDXL"}
PROMPT = "a park by day"  # of the picture book
CFG = 5.0  # like the settings of other nodes below, which are their defaults, a choice


@dataclass(frozen=True)
class Subject:
    """What is drawn, and what is avoided.

    ``nodes``: "model" (output 0 is the MODEL), "positive", "undesired", "empty" and "latent"; for the picture book
    also "joint", whose output 1 is the negative of DNG. ``settings``: inputs of the choice *custom* of KSampler (DNG).
    """

    model: str
    avoided: str
    nodes: Prompt
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.model}, avoid {self.avoided}"

    @property
    def prompted(self) -> bool:
        """Whether the pictures are to show something; otherwise "positive" says what "empty" says."""
        return self.nodes["positive"] != self.nodes["empty"]


def subjects(model: str, images: int, size: int | None = None) -> list[Subject]:
    """What is drawn with a model of ``MODELS``; ``size``: width and height of the pictures of a random network."""
    if model == "mnist":
        return [_digits(images)]
    if model == "picture-book":
        return [_picture("flower", "related", images), _picture("boat", "unrelated", images)]
    return [_random(model, images, size or SIZES[model])]


def _digits(images: int) -> Subject:
    nodes = {
        "model": _node("DNGLoadPixelModel", name="mnist"),
        "positive": _node("DNGClassLabel", model=["model", 0], label="none"),
        "empty": _node("DNGClassLabel", model=["model", 0], label="none"),
        "undesired": _node("DNGClassLabel", model=["model", 0], label="0"),
        "latent": _node("DNGEmptyPixelLatent", model=["model", 0], batch_size=images),
    }
    return Subject("mnist", "0", nodes, {"prior": 0.1})


def _picture(thing: str, kind: str, images: int) -> Subject:
    """A case of the picture book's study: parks by day show flowers though nobody asks for them, and never a boat."""
    nodes = {
        "model": _node("DNGLoadPictureBook"),
        "positive": _node("CLIPTextEncode", clip=["model", 1], text=PROMPT),
        "empty": _node("CLIPTextEncode", clip=["model", 1], text=""),
        "undesired": _node("CLIPTextEncode", clip=["model", 1], text=f"a {thing}"),
        "joint": _node("DNGJointNegative", clip=["model", 1], positive_text=PROMPT, undesired_text=f"a {thing}"),
        "latent": _node("EmptyLatentImage", width=64, height=64, batch_size=images),
    }
    return Subject("picture-book", f"{thing} ({kind})", nodes, {"guidance_scale": 16.0})


def _random(model: str, images: int, size: int) -> Subject:
    family = FAMILIES[model]
    texts = {
        name: _node("DNGBenchText", family=family, seed=seed)
        for seed, name in enumerate(("positive", "empty", "undesired"))
    }
    latent = _node("EmptyLatentImage", width=size, height=size, batch_size=images)
    nodes = {"model": _node("DNGBenchNetwork", family=family), **texts, "latent": latent}
    return Subject(f"{model}, random, {size}x{size}", "a random text", nodes, {})


@dataclass(frozen=True)
class Sampling:
    """What all runs of a turn share."""

    seed: int
    steps: int
    sampler_name: str = "euler_ancestral"
    scheduler: str = "normal"


@dataclass(frozen=True)
class Way:
    """A way to draw: the nodes from the counted model to the "sampler", whose output 0 is the latent.

    ``without_effect``: inputs that switch what the nodes do to the picture off, though not its cost. A model whose
    pictures these do not change takes no notice of the nodes.
    ``of_prompts``: whether the way needs a prompt other than the empty one.
    """

    name: str
    cfg: float
    nodes: Callable[[Subject, Sampling, float], Prompt]
    without_effect: tuple[str, str, float] | None = None
    of_prompts: bool = False


def _ksampler(class_type: str, sampling: Sampling, cfg: float, **further: Any) -> dict[str, Any]:
    wires = {"model": ["counted", 0], "positive": ["positive", 0], "negative": ["undesired", 0]}
    return _node(class_type, **vars(sampling), cfg=cfg, denoise=1.0, **wires, latent_image=["latent", 0], **further)


def _stock(subject: Subject, sampling: Sampling, cfg: float) -> Prompt:
    return {"sampler": _ksampler("KSampler", sampling, cfg)}


def _dng(economy: str) -> Callable[[Subject, Sampling, float], Prompt]:
    """KSampler (DNG). Its own inputs are named here and in ``Subject.settings`` alone."""

    def nodes(subject: Subject, sampling: Sampling, cfg: float) -> Prompt:
        settings = {f"settings.{name}": value for name, value in {"economy": economy, **subject.settings}.items()}
        own = {"unconditional": ["empty", 0], "settings": "custom", **settings}
        sampler = _ksampler("KSamplerDNG", sampling, cfg, **own)
        if "joint" in subject.nodes:
            sampler["inputs"]["negative"] = ["joint", 1]
        return {"sampler": sampler}

    return nodes


def _nag(subject: Subject, sampling: Sampling, cfg: float) -> Prompt:
    nag = _node("NAGuidance", model=["model", 0], nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5)
    return {"nag": nag, "counted": _counted(["nag", 0]), "sampler": _ksampler("KSampler", sampling, cfg)}


def _perp_neg(subject: Subject, sampling: Sampling, cfg: float) -> Prompt:
    wires = {"positive": ["positive", 0], "negative": ["undesired", 0], "empty_conditioning": ["empty", 0]}
    return {
        "guider": _node("PerpNegGuider", model=["counted", 0], **wires, cfg=cfg, neg_scale=1.0),
        "noise": _node("RandomNoise", noise_seed=sampling.seed),
        "chosen": _node("KSamplerSelect", sampler_name=sampling.sampler_name),
        "sigmas": _node(
            "BasicScheduler", model=["counted", 0], scheduler=sampling.scheduler, steps=sampling.steps, denoise=1.0
        ),
        "sampler": _node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["chosen", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
    }


NEGATIVE_PROMPT = Way("KSampler, negative prompt", CFG, _stock)
WAYS = (
    Way("KSampler, no negative", 1.0, _stock),
    Way("KSampler (DNG), economy off", 1.0, _dng("off")),
    Way("KSampler (DNG), economy auto", 1.0, _dng("auto")),
    Way("NAG, then KSampler", 1.0, _nag, ("nag", "nag_alpha", 0.0)),
    NEGATIVE_PROMPT,
    Way("KSampler (DNG), economy off", CFG, _dng("off")),
    Way("KSampler (DNG), economy auto", CFG, _dng("auto")),
    Way("Perp-Neg Guider", CFG, _perp_neg, ("guider", "neg_scale", 0.0), of_prompts=True),
)
"""At cfg 1 ComfyUI evaluates no negative prompt; NAG and DNG avoid what it says there too."""


def speed_prompt(subject: Subject, way: Way, sampling: Sampling) -> Prompt:
    """One run: its sampler's node is "sampler", and its report "report"."""
    prompt = {**subject.nodes, "counted": _counted(["model", 0]), **way.nodes(subject, sampling, way.cfg)}
    prompt["report"] = _node("DNGBenchReport", count=["counted", 1], samples=["sampler", 0])
    return prompt


def _counted(model: list[Any]) -> dict[str, Any]:
    return _node("DNGBenchCount", model=model)


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
