"""The oracle in ComfyUI: what the tests of the sampling nodes draw from, count and compare."""

import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


class Bench:
    """The nodes of the pack and of ComfyUI on the oracle model, with few samples and steps by default."""

    def __init__(self, pack: ModuleType, comfyui: ModuleType) -> None:
        self.comfy: Any = comfyui
        self.stock = importlib.import_module("nodes")
        nodes = pack.__name__ + ".nodes."
        self.sampling, self.patching, self.oracle, self.concepts, self.node_inputs, self.traces = (
            importlib.import_module(nodes + name)
            for name in ("sampling", "patch", "oracle", "concepts", "inputs", "trace")
        )
        self.begin, self.frames = (importlib.import_module(f"{nodes}run.{name}") for name in ("begin", "frames"))
        self.guidance = importlib.import_module(pack.__name__ + ".dng_core.guidance")
        self.posterior = importlib.import_module(pack.__name__ + ".dng_core.posterior")
        self.mixture = self.oracle.mixture(8)

    def model(self, prediction: str = "epsilon") -> Any:
        return self.oracle.load_oracle(8, prediction)

    def cond(self, components: str = "all", embedding: Tensor | None = None, **extra: Any) -> list:
        """CONDITIONING; ``extra`` as ComfyUI's nodes add it (area, mask, start_percent ...)."""
        ((_, options),) = self.oracle.oracle_condition(components)
        return [[embedding, options | extra]]

    def latent(self, samples: int = 8, **extra: Any) -> dict:
        return {"samples": torch.zeros(samples, 1, 4, 4)} | extra

    def left_half(self) -> Tensor:
        """A mask of an oracle latent."""
        mask = torch.zeros(1, 4, 4)
        mask[..., :2] = 1.0
        return mask

    def settings(self, method: str = "dng", **changes: Any) -> Any:
        choice, given = ("custom", {"prior": 1 / 8}) if method == "dng" else (method, {})
        return self.node_inputs.settings_by(choice, given | changes, None)

    def inputs(self, reference: str = "auto", settings: str = "custom", **changes: Any) -> dict[str, Any]:
        """The settings as a node gets them."""
        given = {"settings": settings, "prior": 1 / 8, "evidence_until": 0.0, "reference": reference}
        return {"settings": given | changes}

    def concept(self, components: str | list = "0", reference: str = "auto", **changes: Any) -> Any:
        conditioning = self.cond(components) if isinstance(components, str) else components
        return self.begin.Concept(conditioning, self.settings(**changes), reference)

    def patch(self, model: Any, components: str | list = "0", reference: str = "auto", **changes: Any) -> Any:
        return self.patching.patch_model(model, [self.concept(components, reference, **changes)])

    def sample(self, model: Any, latent: dict | None = None, **changes: Any) -> Tensor:
        """ComfyUI's own KSampler."""
        (out,) = self.stock.common_ksampler(**self._options(model, latent, {"negative": self.cond()} | changes))
        return out["samples"]

    def dng(self, model: Any, concept: Any = None, latent: dict | None = None, **changes: Any) -> tuple[Tensor, Any]:
        """KSampler (DNG) with one concept or a list of them: the samples and the trace."""
        concepts = concept if isinstance(concept, list) else [concept or self.concept()]
        options = self._options(model, latent, {"unconditional": None} | changes)
        model, latent = options.pop("model"), options.pop("latent")
        wanted = self.sampling.Conditionings(*(options.pop(name) for name in ("positive", "unconditional", "cfg")))
        schedule = self.sampling.Schedule(**options)
        out, trace = self.sampling.sample_with_dng(model, schedule, wanted, concepts, latent)
        return out["samples"], trace

    def report(self, samples: Tensor, forbidden: str = "0") -> SimpleNamespace:
        (text,) = self.oracle.OracleReport.execute({"samples": samples}, forbidden, 8).args
        return SimpleNamespace(**json.loads(text))

    def _options(self, model: Any, latent: dict | None, changes: dict) -> dict[str, Any]:
        return {
            "model": model,
            "seed": 1,
            "steps": 5,
            "cfg": 1.0,
            "sampler_name": "euler_ancestral",
            "scheduler": "karras",
            "positive": self.cond(),
            "latent": self.latent() if latent is None else latent,
        } | changes


@pytest.fixture
def bench(pack: ModuleType, comfyui: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """One thread: these tensors are small, and more threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    importlib.import_module("nodes")
    monkeypatch.setattr(comfyui.utils, "PROGRESS_BAR_ENABLED", False)
    with torch.inference_mode():
        yield Bench(pack, comfyui)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def networks(comfyui: ModuleType) -> ModuleType:
    """small_models.py: ComfyUI's own architectures, small and with random weights."""
    spec = importlib.util.spec_from_file_location("small_models", Path(__file__).with_name("small_models.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with torch.inference_mode():
        spec.loader.exec_module(module)
    return module


@dataclasses.dataclass
class Calls:
    """What was evaluated: the number of conditionings in each calc_cond_batch call, the rows of each forward pass."""

    batches: list[int] = dataclasses.field(default_factory=list)
    forwards: list[int] = dataclasses.field(default_factory=list)


@pytest.fixture
def count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Calls]:
    """Counts the evaluations of a model (and of its clones) from now on."""

    def start(model: Any) -> Calls:
        calls = Calls()
        calc, forward = bench.comfy.samplers.calc_cond_batch, model.model._apply_model

        def counted_calc(inner: Any, conds: list, *args: Any) -> Any:
            calls.batches.append(sum(cond is not None for cond in conds))
            return calc(inner, conds, *args)

        def counted_forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.forwards.append(len(x))
            return forward(x, *args, **kwargs)

        monkeypatch.setattr(bench.comfy.samplers, "calc_cond_batch", counted_calc)
        monkeypatch.setattr(model.model, "_apply_model", counted_forward)
        return calls

    return start
