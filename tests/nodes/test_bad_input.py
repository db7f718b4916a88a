"""Bad input: a clear error or a documented fallback, never NaN images, and nothing left for the next run."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor


def dng_guider(bench: Any, model: Any, cfg: float = 1.0, unconditional: list | None = None) -> Any:
    concepts = bench.cond(), bench.cond("0")
    return bench.sampling.DNGGuider.execute(model, *concepts, cfg, unconditional, **bench.inputs()).args[0]


# Conditionings and settings


@pytest.mark.parametrize("node", ["ksampler", "guider"])
@pytest.mark.parametrize("cfg", [0.0, 3.0])
def test_cfg_other_than_1_without_an_unconditional_says_to_connect_it(bench, node, cfg):
    with pytest.raises(ValueError, match=r"cfg is .*connect `unconditional`"):
        if node == "ksampler":
            bench.dng(bench.model(), cfg=cfg)
        else:
            dng_guider(bench, bench.model(), cfg)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["positive", "negative", "unconditional"])
def test_a_conditioning_that_is_not_finite_is_refused_by_its_name(bench, which, value):
    bad = bench.cond("0", torch.full((1, 7, 16), value))
    options = {"cfg": 2.0, "positive": bench.cond(), "unconditional": bench.cond()}
    concept = bench.concept(bad) if which == "negative" else None
    with pytest.raises(ValueError, match=rf"`{which}` holds NaN or infinite"):
        bench.dng(bench.model(), concept, **options | ({} if which == "negative" else {which: bad}))


def test_a_conditioning_of_another_model_family_is_refused_by_its_name(bench):
    concept = bench.concept(bench.cond("0", torch.zeros(1, 77, 768)))
    with pytest.raises(ValueError, match=r"`negative` is 768 wide but `positive` 2048.*CLIP"):
        bench.dng(bench.model(), concept, positive=bench.cond("all", torch.zeros(1, 77, 2048)))


def test_a_conditioning_of_another_batch_size_is_refused_by_its_name(bench):
    concept = bench.concept(bench.cond("0", torch.zeros(3, 77, 768)))
    with pytest.raises(ValueError, match=r"`negative` is a batch of 3, the latent one of 8"):
        bench.dng(bench.model(), concept, latent=bench.latent(8))


@pytest.mark.parametrize("batch", [1, 8])
def test_one_prompt_for_all_images_or_one_for_each_is_accepted(bench, batch):
    samples, _ = bench.dng(bench.model(), bench.concept(bench.cond("0", torch.zeros(batch, 77, 768))))
    assert bool(samples.isfinite().all())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prior", 0.0),
        ("prior", 1.0),
        ("temperature", -1.0),
        ("p_min", 0.999),
        ("guidance_scale", -1.0),
        ("max_scale", 0.0),
    ],
)
@pytest.mark.parametrize("node", ["ksampler", "guider", "patch"])
def test_a_setting_out_of_range_is_refused_by_its_name(bench, node, field, value):
    inputs = bench.inputs(**{field: value})
    model, all_, avoid = bench.model(), bench.cond(), bench.cond("0")
    with pytest.raises(ValueError, match=rf"\b{field} must be"):
        if node == "ksampler":
            bench.sampling.KSamplerDNG.execute(
                model, 1, 2, 1.0, "euler", "karras", all_, avoid, bench.latent(), 1.0, **inputs
            )
        elif node == "guider":
            bench.sampling.DNGGuider.execute(model, all_, avoid, 1.0, **inputs)
        else:
            bench.patching.DynamicNegativeGuidance.execute(model, avoid, **inputs)


def test_a_reference_that_there_is_not_is_refused_by_its_name(bench):
    with pytest.raises(ValueError, match="`reference` must be one of auto, positive, cfg; it is 'uncond'"):
        bench.concept("0", "uncond")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg": float("nan")}, "`cfg` must be at least 0 and at most 100; it is nan"),
        ({"denoise": float("nan")}, "`denoise` must be at least 0"),
        ({"denoise": 1e-9}, "`denoise` is 1e-09.*raise `denoise`"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"scheduler": "none"}, "`scheduler` must be one of"),
        ({"sampler_name": "none"}, "`sampler_name` must be one of"),
        ({"seed": 2**64 - 1}, "`seed` .* is 18446744073709551615, .*take a smaller one"),
    ],
)
def test_what_a_link_brings_is_checked_as_widgets_are(bench, changes, message):
    given = {"seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}
    prompts = {"positive": bench.cond(), "negative": bench.cond("0"), "unconditional": bench.cond()}
    with pytest.raises(ValueError, match=message):
        bench.sampling.KSamplerDNG.execute(bench.model(), latent_image=bench.latent(), **prompts, **given | changes)


def test_a_patched_model_in_a_dng_sampler_is_refused(bench):
    with pytest.raises(ValueError, match="already carries a Dynamic Negative Guidance patch"):
        bench.dng(bench.patch(bench.model()))


def test_a_failed_run_leaves_the_next_one_unaffected(bench, monkeypatch):
    model = bench.model()
    expected, _ = bench.dng(model)
    with monkeypatch.context() as broken:
        broken.setattr(bench.sampling.latent_preview, "prepare_callback", lambda *_: stop_at_step_2)
        with pytest.raises(KeyboardInterrupt):
            bench.dng(model)
    samples, _ = bench.dng(model)
    assert torch.equal(samples, expected)
    assert torch.equal(bench.sample(model), bench.sample(bench.model()))


def stop_at_step_2(step: int, *_: Any) -> None:
    if step == 2:
        raise KeyboardInterrupt


# Latents, masks and noise levels


def custom(bench: Any, node: str, latent: dict, sigmas: Tensor | None = None, **changes: Any) -> Tensor:
    """SamplerCustomAdvanced with the guider or with the patch, or KSampler (DNG), which has no sigmas of its own."""
    model = changes.pop("model", None) or bench.model()
    if node == "ksampler":
        return bench.dng(model, latent=latent, **changes)[0]
    nodes, samplers = importlib.import_module("comfy_extras.nodes_custom_sampler"), bench.comfy.samplers
    name = changes.pop("sampler", "euler_ancestral")
    if sigmas is None:
        sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 4)
    guider = dng_guider(bench, model)
    if node == "patch":
        guider = samplers.CFGGuider(bench.patch(model))
        guider.set_conds(bench.cond(), bench.cond())
    noise, sampler = nodes.RandomNoise.execute(1).args[0], samplers.sampler_object(name)
    return nodes.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args[0]["samples"]


entry_points = pytest.mark.parametrize("node", ["ksampler", "guider", "patch"])


@entry_points
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_a_latent_of_no_images_is_refused(bench, node, guidance_scale):
    changes = {"concept": bench.concept(guidance_scale=guidance_scale)} if node == "ksampler" else {}
    with pytest.raises(ValueError, match=r"`latent_image` is empty \(its shape is 0x1x4x4\)"):
        custom(bench, node, bench.latent(0), **changes)


@entry_points
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_or_a_mask_that_is_not_finite_is_not_blamed_on_the_model(bench, node, value):
    bad = torch.zeros(8, 1, 4, 4)
    bad[3, 0, 1, 1] = value
    with pytest.raises(ValueError, match=r"^`latent_image` holds NaN or infinite values"):
        custom(bench, node, {"samples": bad})
    with pytest.raises(ValueError, match=r"^the mask of `latent_image` holds NaN or infinite values"):
        custom(bench, node, bench.latent(noise_mask=bad[:, 0]))


@pytest.mark.parametrize("node", ["guider", "patch"])
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([0.1, 1.0, 10.0], r"must fall from step to step, but step 1 goes from 0\.1 up to 1"),
        ([10.0, 1.0, 5.0, 0.0], r"must fall from step to step, but step 2 goes from 1 up to 5"),
        ([10.0, 1.0, -1.0], "negative, NaN or infinite"),
        ([10.0, float("nan"), 0.0], "negative, NaN or infinite"),
    ],
)
def test_noise_levels_that_do_not_fall_are_refused(bench, node, sigmas, message):
    with pytest.raises(ValueError, match=rf"^`sigmas` .*{message}"):
        custom(bench, node, bench.latent(), torch.tensor(sigmas))


@pytest.mark.parametrize("node", ["guider", "patch"])
def test_a_level_twice_on_which_a_sampler_divides_by_zero_is_not_blamed_on_the_model(bench, node):
    with pytest.raises(ValueError, match=r"ended in NaN .* since `sigmas` repeats the noise level 5"):
        custom(bench, node, bench.latent(), torch.tensor([10.0, 5.0, 5.0, 2.0, 0.0]), sampler="dpmpp_2m")


@entry_points
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
@pytest.mark.parametrize("wrong", ["latent", "video", "text"])
def test_what_a_network_cannot_take_is_explained(bench, networks, node, guidance_scale, wrong):
    """The network itself says only which of its matrices do not fit."""
    model, width, latent = networks.FAMILIES["epsilon UNet (SD 1.5)"].build(), 16, torch.zeros(1, 4, 8, 8)
    if wrong == "text":
        width = 24
    else:
        latent = torch.full((1, 16, 8, 8) if wrong == "latent" else (1, 4, 2, 8, 8), 0.5)
    concept = bench.concept(networks.prompt(1, width=width), guidance_scale=guidance_scale)
    with pytest.raises(ValueError, match=r"`latent_image`, which is 1x.*encoded with the CLIP that belongs to it"):
        if node == "ksampler":
            bench.dng(model, concept, {"samples": latent}, positive=networks.prompt(0, width=width))
        elif node == "guider":
            guider = bench.sampling.NegativeGuider(model, networks.prompt(0, width=width), [concept], None, 1.0)
            guider.sample(latent, latent, bench.comfy.samplers.sampler_object("euler"), torch.tensor([9.0, 1.0, 0.0]))
        else:
            patched = bench.patching.patch_model(model, [bench.concept(networks.prompt(1, width=width))])
            conds = {name: networks.prompt(0, width=width) for name in ("positive", "negative")}
            bench.sample(patched, {"samples": latent}, **conds)


@pytest.mark.parametrize("wrong", ["positive", "negative", "unconditional"])
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"mask": torch.ones(3, 4, 4)}, "carries 3 masks for 8 images"),
        ({"mask": torch.full((1, 4, 4), torch.nan)}, "holds NaN"),
        ({"mask": torch.ones(0, 4, 4)}, "is empty"),
        ({"pooled_output": torch.full((1, 8), torch.nan)}, "holds NaN"),
        ({"area": (2, 2, 4, 0)}, "lies outside the latent"),
    ],
)
def test_what_a_conditioning_carries_is_refused_by_its_name(bench, wrong, extra, message):
    given = {name: bench.cond() for name in ("positive", "negative", "unconditional")}
    given[wrong] = bench.cond("0", **extra)
    concept = bench.concept(given.pop("negative"))
    with pytest.raises(ValueError, match=rf"`{wrong}`.* {message}"):
        bench.dng(bench.model(), concept, cfg=2.0, **given)


# Interruption


class Interrupted(Exception):
    pass


def interrupt_at(call: int) -> Any:
    """A model function wrapper that stops in the middle of a model call."""
    calls = iter(range(100))

    def stop(apply_model: Any, args: dict) -> Tensor:
        if next(calls) == call:
            raise Interrupted
        return apply_model(args["input"], args["timestep"], **args["c"])

    return stop


ENTRY_POINTS = ("ksampler", "patch", "guider")


def through(bench: Any, node: str, model: Any, sampler: str = "heun", steps: int = 4) -> Tensor:
    """Eight samples through one of the three entry points; 4 steps of heun are 7 model calls."""
    if node == "ksampler":
        return bench.dng(model, steps=steps, sampler_name=sampler)[0]
    if node == "patch":
        return bench.sample(bench.patch(model), steps=steps, sampler_name=sampler)
    samplers, latent = bench.comfy.samplers, bench.latent()["samples"]
    sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", steps)
    noise = bench.comfy.sample.prepare_noise(latent, 1, None)
    chosen = samplers.sampler_object(sampler)
    return dng_guider(bench, model).sample(noise, latent, chosen, sigmas, disable_pbar=True, seed=1)


@pytest.mark.parametrize("node", ENTRY_POINTS)
@pytest.mark.parametrize("call", range(7))
def test_an_interruption_at_any_model_call_leaves_nothing_for_the_next_run(bench, node, call):
    model = bench.model()
    expected, stock = through(bench, node, model), bench.sample(model)
    broken = model.clone()
    broken.set_model_unet_function_wrapper(interrupt_at(call))
    with pytest.raises(Interrupted):
        through(bench, node, broken)
    assert torch.equal(through(bench, node, model), expected)
    assert torch.equal(bench.sample(model), stock)


@pytest.mark.slow
@pytest.mark.parametrize("node", ENTRY_POINTS)
def test_in_every_sampler_an_interruption_leaves_nothing_for_the_next_run(bench, node):
    model, interruptions = bench.model(), 0
    for sampler in bench.comfy.samplers.KSampler.SAMPLERS:
        if sampler in ("lcm", "ar_video") or "cfg_pp" in sampler:  # which are refused, or refused at this cfg
            continue
        expected = through(bench, node, model, sampler, 6)
        for call in range(6):
            broken = model.clone()
            broken.set_model_unet_function_wrapper(interrupt_at(call))
            with pytest.raises(Interrupted):
                through(bench, node, broken, sampler, 6)
            assert torch.equal(through(bench, node, model, sampler, 6), expected), (sampler, call)
            interruptions += 1
    assert interruptions > 200
    print(f"{node}: {interruptions} interruptions, and as many identical runs after them")


def test_latents_of_another_size_do_not_disturb_the_next_run(bench, networks):
    family = networks.FAMILIES["epsilon UNet (SD 1.5)"]
    patched = bench.patch(family.build(), networks.prompt(2), temperature=0.01)

    def sample(*size: int) -> Tensor:
        latent = {"samples": torch.zeros(size[0], 4, *size[1:])}
        return bench.sample(patched, latent, steps=3, positive=networks.prompt(0), negative=networks.prompt(1))

    first = sample(2, 8, 8)
    assert sample(1, 4, 12).shape == (1, 4, 4, 12)
    assert torch.equal(sample(2, 8, 8), first)


# Models and samplers


def nan_at(call: int, place: int | None) -> Any:
    """A model function wrapper: NaN at one call, for the conditioning in one place of the batch (all if None)."""
    calls = iter(range(100))

    def spoil(apply_model: Any, args: dict) -> Tensor:
        out = apply_model(args["input"], args["timestep"], **args["c"])
        if next(calls) == call:
            for part, index in zip(out.chunk(len(args["cond_or_uncond"])), args["cond_or_uncond"], strict=True):
                if place in (None, index):
                    part.fill_(float("nan"))
        return out

    return spoil


@pytest.mark.parametrize("node", ["ksampler", "patch"])
@pytest.mark.parametrize("call", [0, 2, 4])
def test_nan_in_the_undesired_prediction_is_no_push_and_a_warning(bench, node, call, caplog):
    """At cfg 1 the undesired prediction is in the third place; the second place, the unconditional's, is empty."""
    model = bench.model()
    model.set_model_unet_function_wrapper(nan_at(call, 2))
    if node == "ksampler":
        samples, trace = bench.dng(model)
        assert bool(trace.posterior.isfinite().all())
    else:
        samples = bench.sample(bench.patch(model))
    assert bool(samples.isfinite().all())
    assert "NaN or infinite values under what is to be avoided" in caplog.text


@pytest.mark.parametrize("node", ["ksampler", "patch", "guider"])
def test_nan_from_the_model_is_an_error_and_no_image(bench, node):
    model = bench.model()
    expected = through(bench, node, model)
    broken = model.clone()
    broken.set_model_unet_function_wrapper(nan_at(2, None))
    with pytest.raises(ValueError, match=r"ended in NaN .* because the model predicted some, first at sigma 21\.11"):
        through(bench, node, broken)
    assert torch.equal(through(bench, node, model), expected)


@pytest.mark.parametrize("node", ["ksampler", "patch"])
def test_nan_does_not_send_an_adaptive_sampler_round_for_ever(bench, node):
    """ComfyUI's dpm_adaptive rejects every step whose error is NaN, and tries again."""
    model, calls = bench.model(), iter(range(100))

    def broken(apply_model: Any, args: dict) -> Tensor:
        if next(calls, None) is None:
            raise RecursionError("the sampler goes round")
        return apply_model(args["input"], args["timestep"], **args["c"]) * torch.nan

    model.set_model_unet_function_wrapper(broken)
    with pytest.raises(ValueError, match=r"ended in NaN .* because the model predicted some"):
        if node == "ksampler":
            bench.dng(model, sampler_name="dpm_adaptive")
        else:
            bench.sample(bench.patch(model), sampler_name="dpm_adaptive")


def test_a_sampler_that_leaves_its_schedule_is_tracked_by_jumps_from_it(bench):
    """Only points on the schedule that a sampler is given anchor the chain; others are reached in one jump."""

    def wanders(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
        level = float(sigmas[0])
        for _step in range(12):
            denoised = model(x, level * x.new_ones(len(x)), **extra_args or {})
            x, level = denoised + 0.6 * (x - denoised), 0.6 * level
        return denoised

    model, samplers, latent = bench.model(), bench.comfy.samplers, bench.latent()["samples"]
    guider = dng_guider(bench, model)
    noise = bench.comfy.sample.prepare_noise(latent, 1, None)
    sigmas = samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 4)
    out = guider.sample(noise, latent, samplers.KSAMPLER(wanders), sigmas, disable_pbar=True, seed=1)
    assert bool(out.isfinite().all())
    assert guider.trace.posterior.shape == (1, 1, 8)


@pytest.mark.parametrize("prediction", ["IMG_TO_IMG", "IMG_TO_IMG_FLOW"])
def test_a_model_that_follows_no_noise_schedule_is_refused(bench, prediction):
    base = importlib.import_module("comfy.model_base")
    model = bench.model()
    model.add_object_patch(
        "model_sampling", base.model_sampling(model.model.model_config, getattr(base.ModelType, prediction))
    )
    with pytest.raises(ValueError, match="follow no noise schedule that Dynamic Negative Guidance can track"):
        bench.dng(model)
    with pytest.raises(ValueError, match="follow no noise schedule"):
        bench.sample(bench.patch(model))


@pytest.mark.parametrize("sampling", ["lcm", "v_prediction"])
def test_a_thinned_training_chain_takes_offsets_on_the_usual_one(bench, sampling):
    """ModelSamplingDiscrete's lcm keeps 50 of 1000 steps. An offset per step would mean something else on these."""
    nodes = importlib.import_module("comfy_extras.nodes_model_advanced")
    (model,) = nodes.ModelSamplingDiscrete().patch(bench.model(), sampling, False)
    chain = bench.frames.training_chain(model.get_model_object("model_sampling"))
    assert len(chain.betas) == 1000
    concept = bench.concept("0", offset=1e-4)
    _, trace = bench.dng(model, concept, steps=8)
    assert bool(trace.posterior.isfinite().all())
