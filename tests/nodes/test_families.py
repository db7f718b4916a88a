"""Every family of models: ComfyUI's own architectures with random weights, in every precision that CPUs compute in."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

FAMILIES = [
    "epsilon UNet (SD 1.5)",
    "v-prediction UNet (SD 2.1)",
    "UNet with ADM (SDXL)",
    "MMDiT (SD3)",
    "distilled guidance (Flux)",
    "video (Wan)",
    "packed video and audio (LTXAV)",
    "pixel space (PixelDiT)",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]

families = pytest.mark.parametrize("family", FAMILIES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def sample(bench: Any, networks: Any, model: Any, family: str, **changes: Any) -> tuple[list[Tensor], Any]:
    """KSampler (DNG), two images, 2 steps of euler at cfg 3: the parts of its latent and its trace."""
    concept = bench.concept(networks.prompt(2), **changes.pop("settings", {}))
    options = {
        "latent": networks.FAMILIES[family].empty(2),
        "steps": 2,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "positive": networks.prompt(0),
        "unconditional": networks.prompt(1),
    }
    samples, trace = bench.dng(model, concept, **options | changes)
    return networks.parts(samples), trace


def stock(bench: Any, networks: Any, model: Any, family: str) -> list[Tensor]:
    samples = bench.sample(
        model,
        networks.FAMILIES[family].empty(2),
        steps=2,
        cfg=3.0,
        sampler_name="euler",
        scheduler="simple",
        positive=networks.prompt(0),
        negative=networks.prompt(1),
    )
    return networks.parts(samples)


def test_all_small_models_are_tested(networks):
    assert list(networks.FAMILIES) == FAMILIES


@families
@dtypes
def test_scale_0_is_the_stock_ksampler_and_guidance_stays_finite(bench, networks, family, dtype):
    model = networks.FAMILIES[family].build(dtype)
    assert dtype in {weight.dtype for weight in model.model.diffusion_model.parameters()}
    unguided = stock(bench, networks, model, family)
    off, nothing = sample(bench, networks, model, family, settings={"guidance_scale": 0.0})
    assert nothing is None
    assert all(torch.equal(a, b) for a, b in zip(off, unguided, strict=True))

    guided, trace = sample(bench, networks, model, family)
    assert trace.posterior.shape == trace.scale.shape == (2, 1, 2)
    assert bool(trace.posterior.isfinite().all())
    for part, before in zip(guided, unguided, strict=True):
        assert bool(part.isfinite().all())
        assert part.shape == before.shape and not torch.equal(part, before)


@families
@pytest.mark.parametrize("rule", ["algorithm_2", "elbo"])
def test_the_guided_steps_are_the_method_written_out_in_float64(bench, networks, monkeypatch, family, rule):
    """Two steps from the model's own predictions D_p, D_u, D_n: the first pushed by the prior, the second by

    log p' = log p + (tau / sigma'^2) < D_n - D_u, x' - r x - (1 - r) (D_n + D_u) / 2 >, in the VE frame.
    """
    model = networks.FAMILIES[family].build()
    seen = record_predictions(bench, monkeypatch)
    sample(bench, networks, model, family, settings={"temperature": 0.0, "rule": rule})
    flow = isinstance(model.get_model_object("model_sampling"), bench.comfy.model_sampling.CONST)
    temperature = 0.5 / float(evidence(*seen, flow, rule).abs().max())

    seen.clear()
    guided, trace = sample(
        bench, networks, model, family, settings={"temperature": temperature, "p_min": 1e-9, "rule": rule}
    )
    (x1, level1, d1), (x2, level2, d2) = seen
    p1 = torch.full((2,), 1 / 8, dtype=torch.float64)
    p2 = (p1.log() + temperature * evidence(*seen, flow, rule)).exp()
    assert float((p2 / p1).log().abs().max()) > 0.4
    torch.testing.assert_close(trace.posterior[:, 0].double(), torch.stack([p1, p2]), rtol=1e-3, atol=0.0)

    denoised = push(d1, p1)
    stepped = x1 + (x1 - denoised) / level1 * (level2 - level1)
    torch.testing.assert_close(x2, stepped, rtol=1e-4, atol=1e-3)
    out = bench.comfy.utils.pack_latents(guided)[0] if len(guided) > 1 else guided[0]
    final = model.model.process_latent_out(push(d2, p2))
    torch.testing.assert_close(out.double(), final, rtol=1e-3, atol=1e-3 * float(final.abs().max()))


def record_predictions(bench: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, float, Tensor]]:
    """State, level and predictions (positive, unconditional, undesired) of every evaluation, in float64."""
    seen: list[tuple] = []
    calc = bench.comfy.samplers.calc_cond_batch

    def recorded(model: Any, conds: list, x: Tensor, level: Tensor, options: dict) -> Any:
        out = calc(model, conds, x, level, options)
        seen.append((x.double(), float(level[0]), torch.stack([d.double() for d in out])))
        return out

    monkeypatch.setattr(bench.comfy.samplers, "calc_cond_batch", recorded)
    return seen


def push(predictions: Tensor, p: Tensor) -> Tensor:
    positive, unconditional, undesired = predictions
    scale = (p / (1 - p)).reshape(-1, *[1] * (positive.ndim - 1))
    return unconditional + 3 * (positive - unconditional) - scale * (undesired - unconditional)


def evidence(first: tuple, second: tuple, flow: bool, rule: str) -> Tensor:
    """Of the jump, (batch,), in float64: log p(x'|x, c-) - log p(x'|x), or by the rule elbo."""
    (x, level, (_, reference, undesired)), (next_x, next_level, (_, expected, _)) = first, second
    if flow:
        sigma, next_sigma = (level / (1 - level) if level < 1 else torch.inf), next_level / (1 - next_level)
        x, next_x = (x / (1 - level) if level < 1 else torch.zeros_like(x)), next_x / (1 - next_level)
    else:
        sigma, next_sigma = level, next_level
    r = (next_sigma / sigma) ** 2
    if rule == "elbo":
        foretold = (undesired - reference) * (expected - reference) / (2 - 2 * math.log(2))
        return (foretold - (undesired - reference).square() / 2).flatten(1).sum(1) * (1 - r) / next_sigma**2
    mean = r * x + (1 - r) * (undesired + reference) / 2
    return ((undesired - reference) * (next_x - mean)).flatten(1).sum(1) / next_sigma**2


@families
def test_an_ancestral_run_at_cfg_1_stays_finite_with_one_posterior_per_image(bench, networks, family):
    model = networks.FAMILIES[family].build(torch.bfloat16)
    settings = {"temperature": 0.01}
    out, trace = sample(
        bench, networks, model, family,
        settings=settings, cfg=1.0, unconditional=None, steps=3, sampler_name="euler_ancestral",
    )  # fmt: skip
    assert trace.posterior.shape == (3, 1, 2)
    assert not torch.equal(trace.posterior[-1, 0, 0], trace.posterior[-1, 0, 1])
    assert all(bool(part.isfinite().all()) for part in out)


def test_an_images_posterior_does_not_depend_on_the_others_of_its_batch(bench, networks):
    family = "epsilon UNet (SD 1.5)"
    model, settings = networks.FAMILIES[family].build(), {"temperature": 0.01}
    _, both = sample(bench, networks, model, family, settings=settings)
    latent = {"samples": torch.zeros(1, 4, 8, 8), "batch_index": [1]}
    _, alone = sample(bench, networks, model, family, settings=settings, latent=latent)
    torch.testing.assert_close(both.posterior[:, :, 1:], alone.posterior, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["video (Wan)", "packed video and audio (LTXAV)"])
def test_a_mask_on_a_video_keeps_what_is_outside_out_of_the_posterior(bench, networks, family):
    """Masked out but for one frame, the posterior hears only that frame; a mask of zeros leaves it at the prior."""
    model, latent = networks.FAMILIES[family].build(), networks.FAMILIES[family].empty(2)
    settings = {"temperature": 0.01}
    shape = networks.parts(latent["samples"])[0].shape
    none, first = torch.zeros(shape[0], 1, *shape[2:]), torch.zeros(shape[0], 1, *shape[2:])
    first[:, :, :1] = 1.0
    traces = []
    for mask in (none, first, torch.ones_like(first)):
        out, trace = sample(bench, networks, model, family, settings=settings, latent=latent | {"noise_mask": mask})
        assert all(bool(part.isfinite().all()) for part in out)
        traces.append(trace.posterior[1, 0])
    if family == "video (Wan)":  # LTXAV's audio, which has no mask here, is drawn whole
        torch.testing.assert_close(traces[0], torch.full((2,), 1 / 8))
    assert not torch.equal(traces[0], traces[1]) and not torch.equal(traces[1], traces[2])
