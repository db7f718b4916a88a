"""The divergence correction inside ComfyUI: what it gains, what it costs, and what it leaves alone."""

import pytest
import torch


def test_deterministic_samplers_leave_less_than_half_with_the_correction(bench):
    model, latent = bench.model(), bench.latent(500)
    for name in ("euler", "dpmpp_2m"):
        left = [
            bench.report(bench.dng(model, concept, latent, sampler_name=name, steps=20)[0]).forbidden_share
            for concept in (bench.concept(), bench.concept(rule="probe"))
        ]
        assert left[1] <= 0.04 and left[1] < left[0] / 2, (name, left)


def test_the_patch_and_the_node_are_corrected_alike(bench):
    model, concept = bench.model(), bench.concept(rule="probe")
    samples, _ = bench.dng(model, concept, sampler_name="euler")
    assert torch.equal(bench.sample(bench.patching.patch_model(model, [concept]), sampler_name="euler"), samples)
    assert not torch.equal(bench.dng(model, sampler_name="euler")[0], samples)


@pytest.mark.parametrize("prediction", ["v_prediction", "flow"])
def test_other_model_types_are_corrected_too(bench, prediction):
    model, latent = bench.model(prediction), bench.latent(500)
    options = {"steps": 20, "scheduler": "simple", "sampler_name": "euler"}
    left = [
        bench.report(bench.dng(model, concept, latent, **options)[0]).forbidden_share
        for concept in (bench.concept(), bench.concept(rule="probe"))
    ]
    assert left[1] < left[0] / 2, left


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])
def test_the_probe_leaves_the_samplers_random_numbers_alone(bench, sampler):
    """With a push too small to be seen, the samples are the same; the posteriors are not."""
    model = bench.model()
    plain, corrected = (
        bench.dng(model, bench.concept(guidance_scale=1e-30, rule=rule), sampler_name=sampler)
        for rule in ("algorithm_2", "probe")
    )
    assert torch.equal(plain[0], corrected[0])
    assert not torch.equal(plain[1].posterior, corrected[1].posterior)


def test_the_correction_costs_one_pair_where_the_noise_has_fallen_enough(bench, count):
    model = bench.model()
    calls = count(model)
    bench.dng(model, bench.concept(rule="probe"), steps=30, sampler_name="euler")
    assert len(calls.batches) == 30 + 16
    assert set(calls.batches) == {2}


def test_without_the_correction_nothing_is_evaluated_beside_the_samplers_own_calls(bench, count):
    model = bench.model()
    calls = count(model)
    bench.dng(model, steps=30, sampler_name="euler")
    assert len(calls.batches) == 30


def test_the_cfg_mix_as_reference_is_refused_with_what_to_do(bench):
    concept = bench.concept(reference="cfg", rule="probe")
    with pytest.raises(ValueError, match=r"rule `probe`.*`reference` to auto"):
        bench.dng(bench.model(), concept)


def test_nan_from_a_probe_touches_no_other_image_and_no_later_step(bench):
    """The probe overflows in one image of the batch. That image is not corrected there; the others are as before."""
    model, concept = bench.model(), bench.concept(rule="probe")
    broken, calls = bench.model(), []

    def wrapper(apply_model, args):
        calls.append(len(args["input"]))
        out = apply_model(args["input"], args["timestep"], **args["c"])
        if len(calls) == 4:  # the second probe
            out[0] = float("nan")
        return out

    broken.set_model_unet_function_wrapper(wrapper)
    ours, trace = bench.dng(broken, concept, sampler_name="euler", steps=10)
    clean, _ = bench.dng(model, concept, sampler_name="euler", steps=10)
    assert bool(trace.posterior.isfinite().all()) and bool(ours.isfinite().all())
    assert torch.equal(ours[1:], clean[1:])
