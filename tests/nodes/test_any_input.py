"""Whatever a graph sends to a node ends in one of two ways: an error of ours that names an input, or a finite result.

Every node runs on inputs drawn from its own schema. Most of them fit together, as those of a real graph; up to two at
a time are of another model, another size or another batch, empty, NaN, or outside the schema's bounds, which ComfyUI
checks for widgets but not for links. A guider and a patch are run by ComfyUI's sampler node, and what a node loads is
used: a calibration by KSampler (DNG), the picture book by the stock graph. No file of the user's changes or goes.

Each node gets a few cases, the same in every run. With DNG_EXAMPLES=200 it gets 200, other ones in every run.
"""

import dataclasses
import importlib
import json
import math
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dng_core.models.picture_book.networks import CrossUNetConfig, PictureBook
from dng_core.models.picture_book.training import TEXT
from dng_core.models.picture_book.weights import PictureBookInfo, save_picture_book

ROOT = Path(__file__).resolve().parents[2]
ASKED = os.environ.get("DNG_EXAMPLES")
EXAMPLES = int(ASKED or 12)
MEASURING = ("DNGCalibrate", "DNGCalibrateModel")
NODES = (
    *MEASURING, "DNGLoadCalibration", "DNGLoadPictureBook",
    "KSamplerDNG", "KSamplerAdvancedDNG", "DNGGuider", "DynamicNegativeGuidance", "DNGConcept", "DNGJointNegative",
    "DNGTraceTable", "DNGPlotTrace", "DNGCompare", "DNGLoadPixelModel", "DNGClassLabel",
    "DNGEmptyPixelLatent", "DNGPixelLatentToImage", "DNGClassReport", "DNGOracleModel", "DNGOracleCondition",
    "DNGOracleLatent", "DNGOracleReport",
)  # fmt: skip
MOST = {"steps": 6, "width": 600, "height": 600, "batch_size": 9, "upscale": 3, "image_size": 200, "start_at_step": 8}
"""Bounds below the schema's, by which a case takes milliseconds."""
RUN = {
    "DNGCalibrateModel": ["negative"],
    "DNGGuider": ["latent_image", "sampler", "sigmas"],
    "DynamicNegativeGuidance": ["latent_image", "positive", "sampler", "sigmas"],
    "DNGLoadCalibration": ["the calibration is of"],
    "DNGLoadPictureBook": ["conditioning", "latent", "latent_image", "weight", "words"],
}
"""What errors may name beside a node's own inputs: those of the nodes that run what it gives, or gave it concepts."""
NOT_FINITE = (math.nan, math.inf, -math.inf)
SIZES = ((4, 4), (8, 8), (28, 28), (5, 12), (1, 1))


@dataclasses.dataclass(frozen=True)
class World:
    """A model and what fits it. ``shape`` is that of one image's state, by which a calibration knows it."""

    model: Any
    conditionings: tuple[list, ...]
    latent: Callable[[int], Any]
    shape: tuple[int, ...]


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def book_file(networks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small picture book with random weights."""
    config, path = CrossUNetConfig(model_channels=32), tmp_path_factory.mktemp("book") / "picture_book.safetensors"
    book = PictureBook(TEXT, config)
    with torch.inference_mode():
        networks.randomize(book, 0)
    save_picture_book(path, book.state_dict(), PictureBookInfo(TEXT, config))
    return path


@pytest.fixture
def worlds(bench: Any, pack: Any, networks: Any, book_file: Path, shared: dict[str, Any]) -> dict[str, World]:
    """Models of several kinds, built once. Runs leave nothing on them."""
    if not shared:
        pixel = importlib.import_module(pack.__name__ + ".nodes.pixel_models")
        condition = bench.oracle.oracle_condition
        for prediction in ("epsilon", "flow"):
            shared[f"oracle {prediction}"] = World(
                bench.model(prediction),
                tuple(condition(text) for text in ("all", "0", "1,2")),
                lambda batch: torch.zeros(batch, 1, 4, 4),
                (1, 4, 4),
            )
        shared["topics"] = World(
            bench.oracle.load_oracle(16, "v_prediction", "topics"),
            tuple(condition(text, 16) for text in ("all", "0", "B1")),
            lambda batch: torch.zeros(batch, 1, 4, 4),
            (1, 4, 4),
        )
        mnist = pixel.load_pixel_model("mnist")
        shared["pixels"] = World(
            mnist,
            tuple(pixel.ClassLabel.execute(mnist, text)[0] for text in ("none", "0", "7")),
            lambda batch: torch.zeros(batch, 1, 28, 28),
            (1, 28, 28),
        )
        book, clip, _ = importlib.import_module(pack.__name__ + ".nodes.picture_book").load_all(book_file)
        shared["picture book"] = World(
            book,
            tuple(bench.stock.CLIPTextEncode().encode(clip, text)[0] for text in ("", "a park by day", "a flower")),
            lambda batch: torch.zeros(batch, 48, 16, 16),
            (48, 16, 16),
        )
        for name in ("epsilon UNet (SD 1.5)", "video (Wan)", "packed video and audio (LTXAV)"):
            family = networks.FAMILIES[name]
            shared[name] = World(
                family.build(),
                tuple(networks.prompt(i) for i in range(3)),
                lambda b, f=family: f.empty(b)["samples"],
                family.latent[0] if len(family.latent) == 1 else (1, sum(map(math.prod, family.latent))),  # packed
            )
    return shared


class Drawn:
    """The inputs of one case. ``hostile`` are those that need not fit the others."""

    def __init__(self, case: Any, data: st.DataObject, node_id: str, names: list[str]) -> None:
        self.case, self.data = case, data
        self.hostile = data.draw(st.sets(st.sampled_from(names), max_size=2), "hostile") if names else set()
        only = {
            "DNGClassLabel": "pixels",
            "DNGEmptyPixelLatent": "pixels",
            "DNGLoadPictureBook": "picture book",
            "DNGLoadCalibration": "oracle epsilon",  # of which the kept one is
        }
        self.world = self.case.worlds[only[node_id]] if node_id in only else self.pick(self.case.worlds)
        self.fewest = 8 if node_id in MEASURING else 1
        self.batch = self.draw(st.integers(self.fewest, self.fewest + 2 if self.fewest == 1 else self.fewest))

    def draw(self, strategy: st.SearchStrategy) -> Any:
        return self.data.draw(strategy)

    def pick(self, options: Any) -> Any:
        options = list(options.values()) if isinstance(options, dict) else list(options)
        return options[self.draw(st.integers(0, len(options) - 1))]

    def rarely(self, one_in: int = 2) -> bool:
        """True in one case of so many, and in the simplest case never."""
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    def value(self, given: Any) -> Any:
        """A value for an input of a schema."""
        drawers = {
            "MODEL": self.model, "CONDITIONING": self.conditioning, "LATENT": self.latent, "IMAGE": self.image,
            "CLIP": self.clip, "DNG_TRACE": self.trace, "DNG_CONCEPTS": self.concepts, "DNG_REPORT": self.report,
            "FLOAT": self.number, "INT": self.number, "COMBO": self.combo, "STRING": self.string,
            "COMFY_DYNAMICCOMBO_V3": self.choice, "DNG_CALIBRATION": self.calibration,
        }  # fmt: skip
        return drawers[given.get_io_type()](given, given.id in self.hostile)

    def calibration(self, given: Any, hostile: bool) -> Any:
        """None, or one of the model and size at hand. A hostile one is of another, or a file's with far numbers."""
        if not hostile and not self.rarely(3):
            return None if given.optional else self.case.measured(self.world)
        if not hostile:
            far = st.floats(-20, 20)
            drift = [(80.0, 0.0), (8.0, self.draw(far)), (0.5, self.draw(far))]
            return self.case.measured(self.world, self.draw(st.floats(0.05, 2.0)), drift)
        if self.rarely(3):
            return self.case.calibrations.load(self.pick(self.case.calibrations.known()[:3]))
        world = self.pick(self.case.worlds)
        if self.rarely():
            return self.case.measured(world)
        far = st.floats(min_value=-1e300, max_value=1e300)
        sigmas = sorted(self.draw(st.sets(st.floats(1e-300, 1e300), max_size=3)), reverse=True)
        drift = [(sigma, self.draw(far)) for sigma in sigmas]
        measured = self.case.measured(world, self.draw(st.floats(1e-300, 1e300)), drift)
        return dataclasses.replace(
            measured, **self.pick([{}, {"model": ""}, {"shape": ()}, {"model": "", "shape": ()}])
        )

    def number(self, given: Any, hostile: bool) -> Any:
        least, most = given.min, max(given.min, min(given.max, MOST.get(given.id, math.inf)))
        if given.get_io_type() == "INT":
            return self.pick([least - 1, -7, 0]) if hostile else self.draw(st.integers(int(least), int(most)))
        if hostile:
            return self.pick([*NOT_FINITE, least - 1, most + 1, 1e-9, 1e30])
        if not self.rarely(4):
            return given.default
        return self.draw(st.one_of(st.sampled_from([least, most]), st.floats(least, most)))

    def combo(self, given: Any, hostile: bool) -> str:
        if given.id == "name":  # of a file, which may have gone or changed since ComfyUI asked for the options
            return self.file() if hostile else self.pick([*self.case.calibrations.known()[:3], "kept"])
        if hostile:
            return "no such option"
        if given.default in given.options and not self.rarely(3):
            return given.default
        return self.pick([option for option in given.options if option not in ("lcm", "ar_video")])

    def file(self) -> str:
        """The name of a calibration that is damaged, or that is not there."""
        if self.rarely(3):
            return self.name()
        raw: Any = json.loads((self.case.calibrations.folder() / "kept.json").read_text())
        inner = self.pick([raw, raw["calibration"]])
        if self.rarely(4):
            del inner[self.pick(sorted(inner))]
        else:
            odd = st.one_of(
                st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=3),
                st.lists(st.floats(), max_size=2), st.lists(st.lists(st.floats(), max_size=3), max_size=3),
                st.lists(st.integers(-1, 9), max_size=3), st.dictionaries(st.text(max_size=2), st.floats()),
            )  # fmt: skip
            inner[self.pick([*sorted(inner), "other"])] = self.draw(odd)
        text = json.dumps(raw).encode()
        if self.rarely(4):
            at = self.draw(st.integers(0, len(text)))
            text = text[:at] + self.draw(st.binary(max_size=3)) + text[self.draw(st.integers(at, len(text))) :]
        (self.case.calibrations.folder() / "drawn.json").write_bytes(text)
        return "drawn"

    def name(self) -> str:
        """A name that no calibration has, or that no file can have."""
        letters = st.sampled_from("aé\u6728ß_ .-+/\\\0:*~\n")
        return self.draw(
            st.one_of(
                st.sampled_from(
                    ["gone", "../up", "\u6728" * 100, "a" * 100, "shipped: ", "shipped: ../mnist", "NUL", ".", "a."]
                ),
                st.text(letters, max_size=120),
                st.text(max_size=12),
            )
        )

    def choice(self, given: Any, hostile: bool) -> Any:
        """As ComfyUI nests it; where the choice is none of its own, the bare name."""
        if hostile:
            return "no such choice"
        option = self.pick(given.options)
        inputs = [i for i in option.inputs if not i.optional or i.id in self.hostile or self.rarely()]
        return {given.id: option.key} | {i.id: self.value(i) for i in inputs}

    def string(self, given: Any, hostile: bool) -> str:
        if given.id == "save_as":
            return self.name() if hostile else self.pick(["", "mine", "  kept ", "\u540d\u524d"])
        if hostile:
            return self.draw(st.text(max_size=12))
        known = {"label": ["none", "3"], "forbidden": ["0", "7"], "components": ["all", "0,1", "0"], "wanted": ["all"]}
        return self.pick(known.get(given.id, ["a cat", "a dog, |, \n"]))

    def clip(self, given: Any, hostile: bool) -> Any:
        return None if hostile else self.case.clip()

    def model(self, given: Any, hostile: bool) -> Any:
        model = (self.pick(self.case.worlds) if hostile else self.world).model
        if hostile and self.rarely():
            return self.case.bench.patching.patch_model(model, [self.case.bench.concept(self.world.conditionings[1])])
        return model

    def conditioning(self, given: Any, hostile: bool) -> list:
        world = self.pick(self.case.worlds) if hostile else self.world
        ((embedding, options),) = self.pick(world.conditionings)
        options = dict(options)
        if self.rarely(4):
            size = self.pick(SIZES)
            options |= self.pick(
                [
                    {"mask": torch.ones(1, *size)},
                    {"mask": torch.zeros(self.batch, *size), "set_area_to_bounds": True},
                    {"area": (1, 2, 0, 0)},
                    {"area": ("percentage", 0.5, 0.5, 0.25, 0.0)},
                    {"start_percent": 0.4, "end_percent": 1.0},
                    {"start_percent": 1.0, "end_percent": 0.0},
                    {"strength": 0.0},
                ]
            )
        if hostile:
            changes: list[Callable[[], list]] = [
                lambda: [],
                lambda: [[None if embedding is None else embedding * math.nan, options]],
                lambda: [[torch.zeros(self.batch + 2, 3, 16), options]],
                lambda: [[torch.zeros(1, 3, 5), options]],
                lambda: [[embedding, options | {"mask": torch.ones(self.batch + 1, 4, 4)}]],
                lambda: [[embedding, options | {"mask": torch.full((1, 4, 4), math.nan)}]],
                lambda: [[embedding, options | {"mask": torch.ones(0, 4, 4)}]],
                lambda: [[embedding, options | {"pooled_output": torch.full((1, 8), math.nan)}]],
                lambda: [[embedding, options | {"area": (4, 4, 40, 40)}]],
                lambda: [[embedding, options]] * 2,
                lambda: [[embedding, options]],
            ]
            return self.pick(changes)()
        return [[embedding, options]]

    def latent(self, given: Any, hostile: bool) -> dict:
        samples = (self.pick(self.case.worlds) if hostile else self.world).latent(self.batch)
        latent: dict[str, Any] = {"samples": samples}
        if given.id in ("samples", "baseline"):
            samples = latent["samples"] = torch.linspace(-1, 1, 16 * self.batch).reshape(self.batch, 1, 4, 4)
        elif self.rarely() and not samples.is_nested:
            latent["samples"] = samples + 0.5
        if self.rarely(4):
            latent["noise_mask"] = torch.ones(self.draw(st.integers(1, 4)), *self.pick(SIZES))
        if self.rarely(4):
            latent["downscale_ratio_spacial"] = self.pick([1, 8])
        if hostile:
            batch = self.draw(st.integers(0, 4)) + self.pick([self.fewest - 1, 0])
            value = self.pick([0.0, 0.5, *NOT_FINITE])
            size = self.pick([*SIZES, (0, 4), (4, 0)])
            channels = self.draw(st.integers(1, 4))
            return self.pick(
                [
                    latent,
                    latent | {"samples": torch.full((batch, channels, *size), value)},
                    latent | {"samples": torch.full((batch, channels, 2, *size), value)},
                    latent | {"samples": torch.full((batch, 16, *size), value)},
                    latent | {"samples": torch.full((batch, 8, 6), value)},
                    latent | {"samples": torch.full((batch, 1, 4, 4), value, dtype=torch.float16)},
                    latent | {"noise_mask": torch.full((1, *size), value)},
                    latent | {"noise_mask": torch.ones(0, 4, 4)},
                    latent | {"batch_index": list(range(batch))},
                ]
            )
        return latent

    def image(self, given: Any, hostile: bool) -> Tensor:
        if not hostile:
            return torch.linspace(0, 1, self.batch * 28 * 28 * 3).reshape(self.batch, 28, 28, 3)
        shape = (
            self.draw(st.integers(0, 4)),
            *self.pick([*SIZES, (0, 28), (28, 56), (300, 2)]),
            self.pick([3, 4, 1, 0]),
        )
        image = torch.full(shape, self.pick([0.5, -3.0, 1e30, *NOT_FINITE]))
        return image[0] if self.rarely(10) and len(image) else image

    def trace(self, given: Any, hostile: bool) -> Any:
        if self.rarely(6):
            return None
        steps, concepts, batch = 3, 1, self.batch
        sigmas = torch.tensor([80.0, 40.0, 20.0])
        if hostile:
            steps, concepts, batch = (self.draw(st.integers(low, 4)) for low in (0, 1, 1))
            sigmas = torch.linspace(100.0, self.pick([30.0, 0.0, 100.0]), steps)
        shape = steps, concepts, batch
        posterior = torch.linspace(0, 0.9, math.prod(shape)).reshape(shape)
        return self.case.bench.guidance.Trace(sigmas, posterior, 2 * posterior, torch.full(shape[1:], -2.0))

    def concepts(self, given: Any, hostile: bool) -> tuple:
        inputs = {"method": "negative_prompting"} if hostile and self.rarely() else {"prior": 0.1}
        return tuple(
            self.case.bench.concept(self.conditioning(given, hostile), **inputs)
            for _ in range(self.draw(st.integers(2 if self.fewest > 1 and not hostile else 0, 3)))
        )

    def report(self, given: Any, hostile: bool) -> Any:
        execute = self.case.nodes["DNGClassReport"].execute
        return execute(torch.zeros(2, 28, 28, 3), "before", "mnist", "7" if hostile else "0")[0]

    def sigmas(self, model: Any, hostile: bool) -> Tensor:
        sampling = model.get_model_object("model_sampling")
        scheduler = self.pick(self.case.bench.comfy.samplers.KSampler.SCHEDULERS)
        sigmas = self.case.bench.comfy.samplers.calculate_sigmas(sampling, scheduler, self.draw(st.integers(1, 5)))
        if not hostile:
            return sigmas
        return self.pick(
            [
                sigmas.flip(0), sigmas[:1], sigmas[:0], -sigmas, sigmas * math.nan, sigmas * math.inf, 1e-30 * sigmas,
                1e4 * sigmas, sigmas.repeat_interleave(2), torch.cat([sigmas, sigmas]), torch.zeros(4),
                torch.ones(3), torch.tensor([1.0, 0.5, 0.7, 0.2, 0.0]), sigmas[:-1],
            ]
        )  # fmt: skip


@pytest.fixture
def case(bench: Any, worlds: Any, networks: Any, pack: Any, book_file: Path, tmp_path: Path, monkeypatch: Any) -> Any:
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path / "user"))
    monkeypatch.setattr(
        importlib.import_module(pack.__name__ + ".nodes.picture_book"), "SHIPPED_PICTURE_BOOK", book_file
    )
    calibrations = importlib.import_module(pack.__name__ + ".nodes.calibrations")
    core = importlib.import_module(pack.__name__ + ".dng_core.calibration")

    def measured(world: World, temperature: float = 0.7, drift: Any = ((80.0, 0.0), (2.0, 1.5))) -> Any:
        """A calibration of a model at its size."""
        found = core.Calibration(temperature, drift, temperature, temperature, 64, 30)
        return calibrations.ModelCalibration(found, calibrations.model_name(world.model), world.shape)

    calibrations.save("kept", measured(worlds["oracle epsilon"]))
    modules = importlib.import_module(pack.__name__ + ".nodes").NODES
    clips: list[Any] = []

    def clip() -> Any:
        if not clips:
            clips.append(networks.small_clip())
        return clips[0]

    nodes = {n.GET_SCHEMA().node_id: n for n in modules}
    return SimpleNamespace(
        bench=bench, worlds=worlds, nodes=nodes, clip=clip, calibrations=calibrations, measured=measured
    )


def run(case: Any, drawn: Drawn, node_id: str, inputs: dict[str, Any]) -> Any:
    """The node's outputs, or where these are a model, a guider or a calibration, what comes of their use."""
    output = case.nodes[node_id].execute(**inputs)
    outputs = list(output.args)
    if node_id == "DNGLoadCalibration":
        given = {"settings": {"settings": "calibrated", "prior": 0.1, "calibration": outputs[0]}}
        concepts = case.bench.node_inputs.concepts_from(drawn.world.conditionings[1], given)
        positive, latent = drawn.world.conditionings[0], {"samples": drawn.world.latent(2)}
        return case.bench.dng(drawn.world.model, list(concepts), latent, steps=2, positive=positive)
    if node_id == "DNGLoadPictureBook":
        return use_the_book(case, drawn, *outputs)
    if node_id not in ("DNGGuider", "DynamicNegativeGuidance"):
        return outputs
    extras = importlib.import_module("comfy_extras.nodes_custom_sampler")
    samplers = case.bench.comfy.samplers
    latent = drawn.latent(SimpleNamespace(id="latent_image"), "latent_image" in drawn.hostile)
    sigmas = drawn.sigmas(inputs["model"], "sigmas" in drawn.hostile)
    sampler = samplers.sampler_object(drawn.pick(samplers.KSampler.SAMPLERS))
    if outputs[0] is inputs["model"] and ("sigmas" in drawn.hostile or not sigmas.isfinite().all()):
        return []  # nothing to avoid: ComfyUI's own sampler would make NaN of such levels (kl_optimal's of one step)
    if node_id == "DNGGuider":
        guider = outputs[0]
    else:
        guider = samplers.CFGGuider(outputs[0])
        guider.set_conds(drawn.conditioning(None, False), drawn.conditioning(None, False))
        guider.set_cfg(drawn.pick([1.0, 4.0]))
    noise = extras.RandomNoise.execute(3).args[0]
    return extras.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args


def use_the_book(case: Any, drawn: Drawn, model: Any, clip: Any, vae: Any) -> list:
    """The stock graph with a drawn prompt, latent and picture."""
    prompts = ["a park by day", "", "a (tree:0.3)", "a flower " * 30, "a dragon", "(a tree:1e999)", "a tree " * 200]
    stock, world = case.bench.stock, drawn.world
    text = drawn.draw(st.text("a tree(:).,1é", max_size=12)) if drawn.rarely(4) else drawn.pick(prompts)
    positive = stock.CLIPTextEncode().encode(clip, text)[0]
    latent = drawn.latent(SimpleNamespace(id="latent_image"), False)
    if drawn.rarely(3):
        latent["samples"] = drawn.pick([torch.zeros(2, 4, 8, 8), torch.zeros(1, 48, 16, 8), torch.ones(1, 4, 16, 16)])
    negative, scheduler = (
        drawn.conditioning(None, drawn.rarely()),
        drawn.pick(case.bench.comfy.samplers.SCHEDULER_NAMES),
    )
    options = {"positive": positive, "negative": negative, "cfg": 3.0, "steps": 2, "scheduler": scheduler}
    samples = case.bench.sample(model, latent, sampler_name=drawn.pick(["euler", "dpmpp_2m_sde"]), **options)
    picture = torch.full((drawn.batch, *drawn.pick(SIZES), drawn.pick([3, 4])), 0.5)
    sizes = [size for size in picture.shape[1:3] if size >= 4]
    encoded = [stock.VAEEncode().encode(vae, picture)[0]] if len(sizes) == 2 else []
    assert world.latent(1).shape[1:] == samples.shape[1:]
    return [samples, stock.VAEDecode().decode(vae, {"samples": samples})[0], *encoded]


def finite(value: Any) -> bool:
    """Whether every number in an output is finite."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return all(finite(part) for part in value.unbind())
        return bool(value.isfinite().all())
    if type(value).__name__ == "NestedTensor":
        return all(finite(part) for part in value.unbind())
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return not re.search(r"\b(nan|NaN)\b", value)
    if isinstance(value, dict):
        return all(finite(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(finite(inner) for inner in value)
    if type(value).__name__ == "Trace":  # the noise of a flow is infinite at its first level
        return finite([value.posterior, value.scale, value.log_posterior])
    if type(value).__name__ == "Concept":  # its max_scale may be infinite: no bound
        return finite(value.conditioning)
    if dataclasses.is_dataclass(value):
        return all(finite(inner) for inner in vars(value).values())
    return True


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}


def ours(filename: str) -> bool:
    return any(Path(filename).is_relative_to(ROOT / folder) for folder in ("nodes", "dng_core"))


def named(message: str, names: list[str]) -> bool:
    return any(re.search(rf"\b{name}\b", message) for name in names)


@pytest.mark.parametrize("node_id", NODES)
def test_any_input_ends_in_an_error_that_names_it_or_in_a_finite_result(case, node_id):
    schema = case.nodes[node_id].GET_SCHEMA()
    offered = schema.inputs
    names = sorted({i.id for given in offered for i in given.get_all()})
    names += RUN.get(node_id, [])

    @settings(max_examples=EXAMPLES, derandomize=ASKED is None, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        drawn = Drawn(case, data, node_id, names)
        inputs = {
            given.id: drawn.value(given)
            for given in offered
            if not given.optional or given.id in {"unconditional", *drawn.hostile} or drawn.rarely()
        }
        before = contents(case.calibrations.folder())
        try:
            outputs = run(case, drawn, node_id, inputs)
        except Exception as error:
            frames = [ours(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
            if not any(frames):
                return  # ComfyUI's sampler node failed before it asked ours
            if not (isinstance(error, ValueError) and frames[-1] and named(str(error), names)):
                raise
        else:
            assert finite(outputs), outputs
        after = contents(case.calibrations.folder())
        assert before.items() <= after.items() and all(path.suffix == ".json" for path in after)

    check()


def test_every_node_is_tried(case):
    assert set(case.nodes) == set(NODES)
