"""Several undesired concepts at once, through one more input on every node that guides."""

from typing import Any

import pytest
import torch


def more(bench: Any, *components: str, **changes: Any) -> tuple:
    """What DNG Concept nodes chained one after the other give for ``more_concepts``."""
    concepts = None
    inputs = bench.inputs(**changes)
    for one in components:
        (concepts,) = bench.concepts.DNGConcept.execute(bench.cond(one), previous=concepts, **inputs).args
    return concepts


def ksampler(bench: Any, model: Any, latent: dict, more_concepts: tuple, steps: int = 5, **changes: Any) -> Any:
    """KSampler (DNG) that avoids component 0 and ``more_concepts``: its samples and its trace."""
    out, trace = bench.sampling.KSamplerDNG.execute(
        model, 1, steps, 1.0, "euler_ancestral", "karras", bench.cond(), bench.cond("0"), latent, 1.0,
        more_concepts=more_concepts, **bench.inputs(**changes),
    ).args  # fmt: skip
    return out["samples"], trace


def test_two_forbidden_of_eight_leave_and_the_six_others_stay_balanced(bench):
    model, latent = bench.model(), bench.latent(2000)
    samples, trace = ksampler(bench, model, latent, more(bench, "3"), steps=100)
    for forbidden in ("0", "3"):
        assert bench.report(samples, forbidden).forbidden_share <= 0.04
    assert bench.report(samples, "0,3").kl_renormalised <= 0.03
    assert trace.posterior.shape == (100, 2, 2000)


def test_concepts_of_two_methods_are_refused_by_the_input_that_chooses_them(bench):
    with pytest.raises(ValueError, match=r"share one method, not dng, negative_prompting: choose .* in `settings`"):
        ksampler(bench, bench.model(), bench.latent(1), more(bench, "3"), steps=2, settings="negative_prompting")


def test_each_posterior_is_near_the_exact_one(bench, monkeypatch):
    states: list[tuple] = []
    call = bench.guidance.NegativeGuidance.__call__

    def recorded(self: Any, state: Any, level: float, *args: Any) -> Any:
        states.append((state.clone(), level))
        return call(self, state, level, *args)

    monkeypatch.setattr(bench.guidance.NegativeGuidance, "__call__", recorded)
    _, trace = ksampler(bench, bench.model(), bench.latent(300), more(bench, "3"), steps=60)
    for concept, component in enumerate((0, 3)):
        exact = torch.stack([bench.mixture.log_posterior(*at, [component]).exp() for at in states])
        assert float((trace.posterior[:, concept] - exact).abs().mean()) < 0.05


def test_each_push_is_its_posterior_over_the_chance_that_none_is_there(bench):
    """lambda_i = p_i / (1 - sum_j p_j), each concept with its own lambda_0, while the sum is below p_max."""
    _, trace = ksampler(bench, bench.model(), bench.latent(), more(bench, "3", "5", guidance_scale=2.0))
    total = trace.posterior.sum(dim=1, keepdim=True)
    below = (total < 0.99).expand_as(trace.scale)
    wanted = torch.tensor([1.0, 2.0, 2.0])[:, None] * trace.posterior / (1 - total)
    assert int(below.sum()) > 60
    torch.testing.assert_close(trace.scale[below], wanted.clamp(max=10)[below], rtol=1e-3, atol=1e-5)


def test_the_guider_and_the_patch_avoid_what_ksampler_dng_avoids(bench):
    model, latent, others = bench.model(), bench.latent(), more(bench, "3", "5", temperature=0.7)
    samples, _ = ksampler(bench, model, latent, others)
    (patched,) = bench.patching.DynamicNegativeGuidance.execute(
        model, bench.cond("0"), more_concepts=others, **bench.inputs()
    ).args
    assert torch.equal(bench.sample(patched, latent), samples)
    chained = bench.patch(bench.patch(bench.patch(model, "0"), "3", temperature=0.7), "5", temperature=0.7)
    assert torch.equal(bench.sample(chained, latent), samples)

    (guider,) = bench.sampling.DNGGuider.execute(
        model, bench.cond(), bench.cond("0"), 1.0, more_concepts=others, **bench.inputs()
    ).args
    sampling = bench.comfy.samplers
    sigmas = sampling.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 5)
    noise = bench.comfy.sample.prepare_noise(latent["samples"], 1, None)
    out = guider.sample(
        noise, latent["samples"], sampling.sampler_object("euler_ancestral"), sigmas, disable_pbar=True, seed=1
    )
    assert torch.equal(out, samples)
    assert guider.trace.posterior.shape == (5, 3, 8)


def test_all_concepts_ride_in_one_batch(bench, count):
    model = bench.model()
    calls = count(model)
    ksampler(bench, model, bench.latent(8), more(bench, "3", "5"))
    assert calls.forwards == [8 * 4] * 5


def test_a_concept_at_scale_0_is_as_if_it_were_not_there(bench, count):
    model, latent = bench.model(), bench.latent()
    alone, _ = ksampler(bench, model, latent, ())
    calls = count(model)
    samples, _ = ksampler(bench, model, latent, more(bench, "3", guidance_scale=0.0))
    assert torch.equal(samples, alone)
    assert calls.batches == [2] * 5
    others, trace = ksampler(bench, model, latent, more(bench, "3"), guidance_scale=0.0)
    assert torch.equal(others, bench.dng(model, bench.concept("3"), latent)[0])
    assert trace.posterior.shape[1] == 1


def test_every_concept_at_scale_0_is_the_stock_ksampler(bench):
    model, latent = bench.model(), bench.latent()
    samples, trace = ksampler(bench, model, latent, more(bench, "3", guidance_scale=0.0), guidance_scale=0.0)
    assert torch.equal(samples, bench.sample(model, latent))
    assert trace is None


def test_all_concepts_take_the_reference_of_the_node(bench):
    model, latent, others = bench.model(), bench.latent(), more(bench, "3")
    options = {"cfg": 3.0, "positive": bench.cond("0,1,2,3"), "unconditional": bench.cond()}
    for reference in ("auto", "positive", "cfg"):
        concepts = bench.node_inputs.concepts_from(
            bench.cond("0"), bench.inputs(reference) | {"more_concepts": others}
        )
        assert {concept.reference for concept in concepts} == {reference}
        samples, _ = bench.dng(model, list(concepts), latent, **options)
        assert bool(samples.isfinite().all())


def test_the_table_has_a_row_for_every_step_and_concept(bench):
    _, trace = ksampler(bench, bench.model(), bench.latent(), more(bench, "3", "5"), steps=4)
    rows = bench.traces.trace_table(trace).splitlines()[2:]
    assert [(int(r.split("|")[1]), int(r.split("|")[3])) for r in rows] == [
        (step, concept) for step in range(1, 5) for concept in range(1, 4)
    ]


@pytest.mark.parametrize("node", ["ksampler", "patch"])
def test_priors_that_sum_to_one_are_refused(bench, node):
    model, others = bench.model(), more(bench, "3", prior=0.6)
    with pytest.raises(ValueError, match="the priors of all concepts together must stay below 1"):
        if node == "ksampler":
            ksampler(bench, model, bench.latent(), others, prior=0.6)
        else:
            execute = bench.patching.DynamicNegativeGuidance.execute
            (patched,) = execute(model, bench.cond("0"), more_concepts=others, **bench.inputs(prior=0.6)).args
            bench.sample(patched)


def test_a_concept_node_refuses_what_is_not_finite_or_out_of_range(bench):
    with pytest.raises(ValueError, match="`negative` holds NaN"):
        bench.concepts.DNGConcept.execute(bench.cond("0", torch.full((1, 7, 16), float("nan"))))
    with pytest.raises(ValueError, match="prior must be"):
        bench.concepts.DNGConcept.execute(bench.cond("0"), **bench.inputs(prior=1.0))


# The joint negative


def test_the_joint_negative_is_both_texts_encoded_as_one(bench, networks):
    """What ComfyUI's own CLIPTextEncode gives for `positive, undesired`."""
    clip = networks.small_clip()
    encode = bench.stock.CLIPTextEncode().encode
    for given, joint in (("a table, ", "a table, a glass"), ("a table", "a table, a glass"), ("", "a glass")):
        positive, negative = bench.concepts.JointNegative.execute(clip, given, "a glass ").args
        for got, text in ((positive, given), (negative, joint)):
            (((embedding, options),),) = encode(clip, text)
            assert torch.equal(got[0][0], embedding)
            assert torch.equal(got[0][1]["pooled_output"], options["pooled_output"])
    assert not torch.equal(positive[0][0], negative[0][0])


def test_a_joint_negative_beside_another_is_refused_with_what_to_do(bench):
    joint = bench.concept(bench.cond("0", dng_joint=True), prior=0.1)
    with pytest.raises(ValueError, match="encode each with Joint Negative, or none"):
        bench.dng(bench.model(), [joint, bench.concept("1", prior=0.1)])


def test_a_joint_negative_of_nothing_is_refused(bench, networks):
    with pytest.raises(ValueError, match="`undesired_text` is empty"):
        bench.concepts.JointNegative.execute(networks.small_clip(), "a table", " ")


def test_a_checkpoint_without_a_text_encoder_is_named(bench):
    """ComfyUI's loaders then give None for the CLIP."""
    with pytest.raises(ValueError, match=r"`clip` is empty.*CLIP loader"):
        bench.concepts.JointNegative.execute(None, "a town", "night")
