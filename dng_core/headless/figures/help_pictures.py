"""The pictures on the nodes' help pages, made in a ComfyUI by the nodes that the pages are of."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...files import write_whole
from ...plots.drawing import Drawing
from ..client import run_workflow
from ..server import Server
from ..workflow import Prompt, load_workflow, set_inputs
from .kept import Row

Pictures = Mapping[str, Sequence[Image.Image]]
"""The images that a run saved, by the node that saved them."""
Draw = Callable[[Pictures], Image.Image]

LARGEST = 80_000  # bytes of a picture: every install of the pack downloads it
COLOURS = (128, 64, 32, 16)  # of a picture: a choice
GAP, HEAD, TEXT = 4, 26, 15  # pixels between images and above a row of them, and the size of its title: a choice
DIGITS = {"steps": 50, "cfg": 1.0, "sampler_name": "euler_ancestral", "scheduler": "normal", "denoise": 1.0}
SCENES = DIGITS | {"steps": 20, "cfg": 3.0}
SEED = 6  # as in the README's picture: one of its six digits is a clear 0 without guidance
SIX_DIGITS = (
    "How many.batch_size=6",
    "Without guidance.seed=6",
    "Dynamic Negative Guidance.seed=6",
    "Dynamic Negative Guidance.settings.guidance_scale=2",
    "Dynamic Negative Guidance.settings.prior=0.2",
    "Plot.theme=dark",
    "Compare.theme=dark",
    "Compare.at_most=6",
    "Compare.order=as drawn",
)
PROMPTS = (
    "a park by day",
    "a street at night with the moon",
    "a desert by day with a red balloon",
    "mountains at evening with a bird",
    "a sea by day with a rainbow",
    "a lighthouse at the sea at night",
)


def help_figure(server: Server, workflows: Path, folder: Path) -> Iterator[Row]:
    """Make every picture in ``folder``, and yield a row about each. ``workflows``: the pack's, in API format."""
    folder.mkdir(parents=True, exist_ok=True)
    for names, prompt, draws in _pictures(workflows):
        files = run_workflow(server, prompt).files
        saved = {
            node: [Image.open(io.BytesIO(content)).convert("RGB") for _, content in files[node]]
            for node in prompt
            if files.get(node)
        }
        for name, draw in zip(names, draws, strict=True):
            picture = draw(saved)
            content = compressed(picture)
            write_whole(folder / f"{name}.png", content)
            yield {"picture": f"{name}.png", "width": picture.width, "height": picture.height, "bytes": len(content)}


def compressed(picture: Image.Image) -> bytes:
    """The picture as a PNG of at most ``LARGEST`` bytes, with as many colours as fit; ValueError where none do."""
    for colours in COLOURS:
        content = io.BytesIO()
        picture.quantize(colours).save(content, "PNG", optimize=True)
        if len(content.getvalue()) <= LARGEST:
            return content.getvalue()
    raise ValueError(f"a picture of {picture.width} x {picture.height} pixels has more than {LARGEST} bytes")


def _pictures(workflows: Path) -> Iterator[tuple[Sequence[str], Prompt, Sequence[Draw]]]:
    """The names of the pictures of a run, its prompt, and how each picture is made of what it saved."""
    comparison = load_workflow(workflows / "mnist_compare.json")
    set_inputs(comparison, SIX_DIGITS)
    yield ("plot_trace", "compare"), comparison, (_saved("11"), _saved("12"))
    yield ("class_report",), load_workflow(workflows / "mnist_class_removal.json"), (_largest,)
    yield ("class_labels",), _labels(("0", "7", "none")), (_rows("label "),)
    yield ("pixel_models",), _models(("mnist", "cifar10")), (_rows(""),)
    yield ("empty_pixel_latent",), _batches((4, 16)), (_rows("batch_size "),)
    yield ("upscale",), _enlarged((1, 2, 4)), (_rows("upscale "),)
    yield ("concepts",), _two_concepts(), (_saved("saved"),)
    yield ("calibrate",), _calibrated(workflows), (_beside("before", "after"),)
    yield ("prompts",), _scenes(PROMPTS), (_rows("", columns=2),)
    yield ("joint_negative",), _joint(), (_saved("saved"),)


def _saved(node: str) -> Draw:
    return lambda pictures: pictures[node][0]


def _largest(pictures: Pictures) -> Image.Image:
    return max((picture for saved in pictures.values() for picture in saved), key=lambda p: p.width * p.height)


def _beside(*nodes: str) -> Draw:
    def draw(pictures: Pictures) -> Image.Image:
        parts = [pictures[node][0] for node in nodes]
        whole = Image.new("RGB", (sum(part.width for part in parts), max(part.height for part in parts)))
        left = 0
        for part in parts:
            whole.paste(part, (left, 0))
            left += part.width
        return whole

    return draw


def _rows(before: str, columns: int = 1) -> Draw:
    """A row of images for each node, under its name with ``before`` in front, in so many columns of such rows."""

    def draw(pictures: Pictures) -> Image.Image:
        width = max(sum(image.width + GAP for image in images) for images in pictures.values()) + GAP
        lines = [list(pictures)[i : i + columns] for i in range(0, len(pictures), columns)]
        heights = [HEAD + max(pictures[node][0].height for node in line) + GAP for line in lines]
        drawing = Drawing(columns * width, sum(heights) + GAP, "dark")
        for number, line in enumerate(lines):
            top = sum(heights[:number])
            for column, node in enumerate(line):
                left = column * width + GAP
                drawing.text((left, top + HEAD / 2), before + node, TEXT, anchor="lm")
                for image in pictures[node]:
                    drawing.picture(image, left, top + HEAD)
                    left += image.width + GAP
        return drawing.finished()

    return draw


def _labels(labels: Sequence[str]) -> Prompt:
    prompt = _digits("mnist", 8)
    for label in labels:
        prompt |= _drawn(label, ["model", 0], label, upscale=2)
    return prompt


def _models(names: Sequence[str]) -> Prompt:
    prompt: Prompt = {}
    for name in names:
        prompt[f"{name} model"] = _node("DNGLoadPixelModel", name=name)
        prompt[f"{name} latent"] = _node("DNGEmptyPixelLatent", model=[f"{name} model", 0], batch_size=12)
        prompt |= _drawn(name, [f"{name} model", 0], "none", upscale=2, latent=f"{name} latent")
    return prompt


def _batches(sizes: Sequence[int]) -> Prompt:
    prompt = _digits("mnist", 1)
    for size in sizes:
        prompt[f"latent {size}"] = _node("DNGEmptyPixelLatent", model=["model", 0], batch_size=size)
        prompt |= _drawn(str(size), ["model", 0], "none", upscale=1, latent=f"latent {size}")
    return prompt


def _enlarged(factors: Sequence[int]) -> Prompt:
    prompt = _digits("mnist", 6)
    for factor in factors:
        prompt |= _drawn(str(factor), ["model", 0], "none", upscale=factor)
    return prompt


def _two_concepts() -> Prompt:
    prompt = _digits("mnist", 6)
    for label in ("none", "0", "1"):
        prompt[label] = _node("DNGClassLabel", model=["model", 0], label=label)
    prompt["concept"] = _node("DNGConcept", negative=["1", 0], **_exact(2.0, 0.1))
    prompt["sampler"] = _sampler("KSamplerDNG", DIGITS, "none", "0", more_concepts=["concept", 0], **_exact(2.0, 0.2))
    return prompt | _chart("chart", ["sampler", 1], "saved", view="lines", width=760, height=540)


def _calibrated(workflows: Path) -> Prompt:
    """The nodes of the workflow up to Calibrate, and charts of what it found."""
    whole = load_workflow(workflows / "mnist_calibrate.json")
    (node,) = (key for key, node in whole.items() if node["class_type"] == "DNGCalibrate")
    prompt: Prompt = {}
    needed = [node]
    while needed:
        key = needed.pop()
        prompt[key] = whole[key]
        needed += [value[0] for value in whole[key]["inputs"].values() if isinstance(value, list)]
    for output, name in ((2, "before"), (3, "after")):
        prompt |= _chart(f"{name} chart", [node, output], name, view="auto", width=480, height=400)
    return prompt


def _scenes(prompts: Sequence[str]) -> Prompt:
    prompt = _book(4)
    for text in prompts:
        prompt |= {
            f"{text} encoded": _node("CLIPTextEncode", clip=["model", 1], text=text),
            f"{text} sampled": _sampler("KSampler", SCENES, f"{text} encoded", "empty"),
            f"{text} decoded": _node("VAEDecode", samples=[f"{text} sampled", 0], vae=["model", 2]),
            text: _node("PreviewImage", images=[f"{text} decoded", 0]),
        }
    return prompt


def _joint() -> Prompt:
    prompt = _book(8) | {
        "joint": _node("DNGJointNegative", clip=["model", 1], positive_text="a street", undesired_text="night"),
        "stock": _sampler("KSampler", SCENES | {"cfg": 1.0}, "joint", "empty"),
    }
    settings = _exact(4.0, 0.3)
    guided = _sampler("KSamplerDNG", SCENES | {"cfg": 1.0}, "joint", "joint", **settings)
    guided["inputs"]["negative"] = ["joint", 1]
    prompt["guided"] = guided
    for name in ("stock", "guided"):
        prompt[f"{name} decoded"] = _node("VAEDecode", samples=[name, 0], vae=["model", 2])
    sheet = {"theme": "dark", "at_most": 4, "order": "most changed first", "image_size": 128}
    images = {"without": ["stock decoded", 0], "with_dng": ["guided decoded", 0], "trace": ["guided", 1]}
    prompt["sheet"] = _node("DNGCompare", **images, **sheet)
    prompt["saved"] = _node("PreviewImage", images=["sheet", 0])
    return prompt


def _digits(model: str, count: int) -> Prompt:
    return {
        "model": _node("DNGLoadPixelModel", name=model),
        "latent": _node("DNGEmptyPixelLatent", model=["model", 0], batch_size=count),
    }


def _book(count: int) -> Prompt:
    return {
        "model": _node("DNGLoadPictureBook"),
        "latent": _node("EmptyLatentImage", width=64, height=64, batch_size=count),
        "empty": _node("CLIPTextEncode", clip=["model", 1], text=""),
    }


def _drawn(name: str, model: list[Any], label: str, upscale: int, latent: str = "latent") -> Prompt:
    """Digits without guidance, saved by the node ``name``."""
    return {
        f"{name} label": _node("DNGClassLabel", model=model, label=label),
        f"{name} sampled": _sampler("KSampler", DIGITS, f"{name} label", f"{name} label", model=model, latent=latent),
        f"{name} decoded": _node("DNGPixelLatentToImage", samples=[f"{name} sampled", 0], upscale=upscale),
        name: _node("PreviewImage", images=[f"{name} decoded", 0]),
    }


def _sampler(
    class_type: str,
    sampling: Mapping[str, Any],
    positive: str,
    negative: str,
    model: Sequence[Any] = ("model", 0),
    latent: str = "latent",
    **further: Any,
) -> dict[str, Any]:
    wires = {"positive": [positive, 0], "negative": [negative, 0], "latent_image": [latent, 0]}
    return _node(class_type, model=list(model), **wires, **sampling, seed=SEED, **further)


def _exact(scale: float, prior: float) -> dict[str, Any]:
    return {"settings": "exact", "settings.guidance_scale": scale, "settings.prior": prior}


def _chart(name: str, trace: list[Any], saved: str, **looks: Any) -> Prompt:
    return {
        name: _node("DNGPlotTrace", trace=trace, axis="step", theme="dark", **looks),
        saved: _node("PreviewImage", images=[name, 0]),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
