"""The model patch on stock samplers and guiders: equal to KSampler (DNG), at peace with other patches, no traces."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def extras(bench: Any) -> ModuleType:
    """ComfyUI's custom sampling nodes."""
    return importlib.import_module("comfy_extras.nodes_custom_sampler")


def custom(extras: Any, guider: Any, latent: dict, sampler: str = "euler_ancestral") -> Tensor:
    """SamplerCustomAdvanced over 5 Karras sigmas, seed 1."""
    sigmas = extras.BasicScheduler.execute(guider.model_patcher, "karras", 5, 1.0).args[0]
    noise = extras.RandomNoise.execute(1).args[0]
    sampler_object = extras.KSamplerSelect.execute(sampler).args[0]
    return extras.SamplerCustomAdvanced.execute(noise, guider, sampler_object, sigmas, latent).args[0]["samples"]


# The same as KSampler (DNG)


@pytest.mark.parametrize("reference", ["auto", "positive", "cfg"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("method", ["dng", "negative_prompting", "safe_latent_diffusion"])
def test_patch_and_ksampler_dng_give_the_same_samples(bench, reference, cfg, method):
    model, positive, whole = bench.model(), bench.cond("0,1,2"), bench.cond()
    options: dict[str, Any] = {"cfg": cfg, "positive": positive}
    patched = bench.patch(model, "0", reference, method=method)
    stock = bench.sample(patched, negative=whole, **options)
    samples, _ = bench.dng(model, bench.concept("0", reference, method=method), unconditional=whole, **options)
    assert torch.equal(stock, samples)
    assert not torch.equal(stock, bench.sample(model, negative=whole, **options))


@pytest.mark.parametrize("sampler", ["euler_ancestral", "heun", "dpmpp_2s_ancestral", "dpm_adaptive"])
def test_basic_and_cfg_guiders_work(bench, extras, sampler):
    model, latent = bench.model(), bench.latent()
    patched = bench.patch(model)
    expected, _ = bench.dng(model, latent=latent, sampler_name=sampler)
    basic = extras.BasicGuider.execute(patched, bench.cond()).args[0]
    assert torch.equal(custom(extras, basic, latent, sampler), expected)
    guider = extras.CFGGuider.execute(patched, bench.cond("0,1"), bench.cond(), 3.0).args[0]
    options = {"cfg": 3.0, "positive": bench.cond("0,1"), "unconditional": bench.cond(), "sampler_name": sampler}
    assert torch.equal(custom(extras, guider, latent, sampler), bench.dng(model, latent=latent, **options)[0])


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_all_predictions_of_a_step_are_one_call_and_one_forward_pass(bench, count, cfg):
    model = bench.model()
    calls = count(model)
    bench.sample(bench.patch(model), bench.latent(8), cfg=cfg)
    predictions = 2 if cfg == 1 else 3
    assert calls.batches == [predictions] * 5
    assert calls.forwards == [8 * predictions] * 5


# Off


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_sde", "ddim", "uni_pc"])
@pytest.mark.parametrize("off", ["not connected", "scale 0"])
def test_off_returns_the_model_itself_so_that_nothing_changes(bench, count, off, sampler):
    model = bench.model()
    inputs = bench.inputs(guidance_scale=0.0 if off == "scale 0" else 1.0)
    node = bench.patching.DynamicNegativeGuidance.execute
    (patched,) = (node(model, **inputs) if off == "not connected" else node(model, bench.cond("0"), **inputs)).args
    assert patched is model
    stock = bench.sample(model, sampler_name=sampler)
    calls = count(model)
    assert torch.equal(bench.sample(patched, sampler_name=sampler), stock)
    assert set(calls.batches) == {1}


# Beside other patches


def test_another_post_cfg_patchs_result_is_what_is_pushed(bench):
    model = bench.model()
    plain = bench.sample(model, steps=1)
    pushed = bench.sample(bench.patch(model), steps=1)
    for first in ("theirs", "ours"):
        both = model.clone() if first == "theirs" else bench.patch(model)
        both.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.5 + 1.0)
        both = bench.patch(both) if first == "theirs" else both
        out = bench.sample(both, steps=1)
        torch.testing.assert_close(out, plain * 0.5 + 1.0 + (pushed - plain), rtol=1e-5, atol=1e-5)


def test_a_pre_cfg_patch_does_not_reach_the_tracked_predictions(bench):
    """APG and others rewrite the positive; the posterior compares what the model itself predicted."""
    model = bench.model()
    changed = model.clone()
    changed.set_model_sampler_pre_cfg_function(lambda args: [out * 0 for out in args["conds_out"]])
    plain, pushed = bench.sample(model, steps=1), bench.sample(bench.patch(model), steps=1)
    out = bench.sample(bench.patch(changed), steps=1)
    torch.testing.assert_close(out, pushed - plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_an_existing_calc_function_keeps_its_place_and_sees_only_the_samplers_own_conditionings(bench, cfg):
    model = bench.model()
    seen: list[int] = []

    def theirs(args: dict) -> list[Tensor]:
        seen.append(len(args["conds"]))
        return bench.comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"], args["sigma"], args["model_options"]
        )

    other = model.clone()
    other.set_model_sampler_calc_cond_batch_function(theirs)
    options: dict[str, Any] = {"cfg": cfg, "positive": bench.cond("0,1")}
    torch.testing.assert_close(
        bench.sample(bench.patch(other), **options), bench.sample(bench.patch(model), **options), rtol=1e-4, atol=1e-4
    )
    assert seen == [2] * 5


def test_a_sampler_cfg_function_is_what_is_pushed(bench):
    """RescaleCFG and its like replace the CFG formula."""
    model = bench.model()
    other = model.clone()
    other.set_model_sampler_cfg_function(lambda args: args["cond"] * 0.7, disable_cfg1_optimization=True)
    plain, pushed = bench.sample(other, steps=1), bench.sample(bench.patch(other), steps=1)
    difference = bench.sample(bench.patch(model), steps=1) - bench.sample(model, steps=1)
    torch.testing.assert_close(pushed, plain + difference, rtol=1e-4, atol=1e-4)


# Several concepts


def test_chained_patches_avoid_several_concepts_in_one_batch(bench, count):
    model, latent = bench.model(), bench.latent(600)
    chained = bench.patch(bench.patch(model, "0"), "1")
    calls = count(model)
    samples = bench.sample(chained, latent, steps=30)
    assert calls.forwards == [3 * 600] * 30
    unguided = bench.sample(model, latent, steps=30)
    for forbidden in ("0", "1"):
        before, after = (bench.report(x, forbidden).forbidden_share for x in (unguided, samples))
        assert after < 0.5 * before
    assert bench.report(samples, "0,1").forbidden_share < 0.12


def test_a_concept_outside_its_range_does_not_shift_the_others(bench):
    model, method = bench.model(), "negative_prompting"
    never = bench.cond("0", start_percent=1.0, end_percent=1.0)
    chained = bench.patch(bench.patch(model, never, method=method), "3", method=method)
    assert torch.equal(bench.sample(chained), bench.sample(bench.patch(model, "3", method=method)))


def test_the_order_of_chained_patches_does_not_matter(bench):
    model = bench.model()
    one, other = (bench.patch(bench.patch(model, a), b) for a, b in (("0", "3"), ("3", "0")))
    torch.testing.assert_close(bench.sample(one), bench.sample(other), rtol=1e-4, atol=1e-4)


def test_chained_concepts_with_different_references_are_refused(bench):
    chained = bench.patch(bench.patch(bench.model(), "0", "auto"), "1", "positive")
    with pytest.raises(ValueError, match="must share one reference, not auto, positive"):
        bench.sample(chained)


def test_chained_concepts_whose_priors_sum_to_one_are_refused(bench):
    chained = bench.patch(bench.patch(bench.model(), "0", prior=0.6), "1", prior=0.6)
    with pytest.raises(ValueError, match="priors"):
        bench.sample(chained)


# No traces


def test_the_original_and_earlier_clones_stay_as_they_were(bench):
    model = bench.model()
    stock = bench.sample(model)
    first = bench.patch(model, "0")
    alone = bench.sample(first)
    second = bench.patch(first, "1")
    bench.sample(second)
    assert torch.equal(bench.sample(model), stock)
    assert torch.equal(bench.sample(first), alone)
    assert not torch.equal(bench.sample(second), alone)
    assert not torch.equal(alone, stock)


def test_a_run_leaves_nothing_on_the_model(bench):
    patched = bench.patch(bench.model())
    before = set(patched.model_options), set(patched.model_options["transformer_options"])
    first = bench.sample(patched)
    assert (set(patched.model_options), set(patched.model_options["transformer_options"])) == before
    assert torch.equal(bench.sample(patched), first)


def test_runs_of_other_lengths_and_batches_do_not_disturb_one_another(bench):
    patched = bench.patch(bench.model())
    first = bench.sample(patched)
    bench.sample(patched, bench.latent(3), steps=9, sampler_name="heun")
    assert torch.equal(bench.sample(patched), first)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_leaves_the_next_one_unaffected(bench):
    model = bench.model()
    patched = bench.patch(model)
    stock, guided = bench.sample(model), bench.sample(patched)
    guider = bench.comfy.samplers.CFGGuider(patched)
    guider.set_conds(bench.cond(), bench.cond())
    noise = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sigmas = bench.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 5)
    sampler = bench.comfy.samplers.sampler_object("euler_ancestral")

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, callback=stop, disable_pbar=True, seed=1)
    whole = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)
    again = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)
    assert torch.equal(whole, again)
    assert torch.equal(bench.sample(patched), guided)
    assert torch.equal(bench.sample(model), stock)


# Areas


def test_an_undesired_area_leaves_the_samplers_own_conditionings_alone(bench, count):
    """ComfyUI would copy the area to positive and negative, and evaluate them there too."""
    model = bench.model()
    extra = {"area": (4, 2, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
    calls = count(model)
    out = bench.sample(bench.patch(model, bench.cond("0", **extra), method="negative_prompting"), cfg=3.0, steps=1)
    assert calls.forwards == [24]
    torch.testing.assert_close(out[..., 2:], bench.sample(model, cfg=3.0, steps=1)[..., 2:], rtol=1e-4, atol=1e-4)


# Refusals


def test_guiders_that_combine_predictions_in_their_own_way_are_refused_by_name(bench, extras):
    patched, latent, cond = bench.patch(bench.model()), bench.latent(), bench.cond()
    perp_neg = importlib.import_module("comfy_extras.nodes_perpneg").PerpNegGuider
    dual = extras.DualCFGGuider.execute(patched, cond, cond, cond, 2.0, 2.0, "regular").args[0]
    for guider in (dual, perp_neg.execute(patched, cond, cond, cond, 2.0, 1.0).args[0]):
        with pytest.raises(ValueError, match=rf"does not work with the guider {type(guider).__name__}.*CFGGuider"):
            custom(extras, guider, latent)


def test_cfg_pp_under_a_basic_guider_names_what_is_missing(bench, extras):
    basic = extras.BasicGuider.execute(bench.patch(bench.model()), bench.cond()).args[0]
    with pytest.raises(ValueError, match="needs an unconditional"):
        custom(extras, basic, bench.latent(), "euler_ancestral_cfg_pp")


def test_hooks_on_the_undesired_conditioning_are_refused_with_the_way_out(bench):
    hooked = bench.cond("0", hooks=importlib.import_module("comfy.hooks").HookGroup())
    with pytest.raises(ValueError, match=r"`negative` carries hooks.*KSampler \(DNG\)"):
        bench.patch(bench.model(), hooked)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_undesired_conditioning_that_is_not_finite_is_refused(bench, value):
    with pytest.raises(ValueError, match="`negative` holds NaN"):
        bench.patch(bench.model(), bench.cond("0", torch.full((1, 7, 16), value)))


def test_an_undesired_conditioning_of_another_batch_size_is_refused(bench):
    patched = bench.patch(bench.model(), bench.cond("0", torch.zeros(3, 77, 768)))
    with pytest.raises(ValueError, match=r"`negative` is a batch of 3, the latent one of 8"):
        bench.sample(patched, bench.latent(8))


def test_an_undesired_conditioning_of_another_model_family_is_refused(bench):
    patched = bench.patch(bench.model(), bench.cond("0", torch.zeros(1, 77, 768)))
    with pytest.raises(ValueError, match=r"`negative` is 768 wide but `positive` 2048"):
        bench.sample(patched, positive=bench.cond("all", torch.zeros(1, 77, 2048)))
