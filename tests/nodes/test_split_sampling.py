"""One run over two KSampler Advanced (DNG): the latent carries the image over, the trace the posterior."""

import dataclasses
from typing import Any

import pytest
import torch


def advanced(
    bench: Any, model: Any, latent: dict, start: int, end: int, steps: int = 6, sampler: str = "euler",
    settings: dict | None = None, **wires: Any,
) -> tuple[dict, Any]:  # fmt: skip
    """KSampler Advanced (DNG) from step ``start`` to step ``end``; noise is added before the first step only."""
    return bench.sampling.KSamplerAdvancedDNG.execute(
        model, "disable" if start else "enable", 1, steps, 1.0, sampler, "karras", bench.cond(), bench.cond("0"),
        latent, start, end, "enable" if end < steps else "disable", **bench.inputs(**settings or {}), **wires,
    ).args  # fmt: skip


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_split_run_is_the_unsplit_run(bench, prediction, at):
    """It is so bit for bit, except for a flow: its latent is divided by 1 - t between the nodes, which rounds."""
    model, latent = bench.model(prediction), bench.latent()
    whole, trace = advanced(bench, model, latent, 0, 6)
    first, upper = advanced(bench, model, latent, 0, at)
    second, lower = advanced(bench, model, first, at, 6, previous_trace=upper)
    exactly = {"rtol": 0.0, "atol": 0.0} if prediction != "flow" else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(second["samples"], whole["samples"], **exactly)
    for name in ("sigmas", "posterior", "scale", "log_posterior"):
        torch.testing.assert_close(getattr(lower, name), getattr(trace, name), **exactly)


def test_what_was_foretold_of_a_latent_of_another_size_is_not_counted(bench):
    """An upscaled latent goes on from the posterior alone."""
    first, upper = advanced(bench, bench.model(), bench.latent(), 0, 3)
    (known,) = upper.foretold
    other = known._replace(gathered=known.gathered[..., :2], expected=known.expected[..., :2])
    counted, alone, resized = (
        advanced(bench, bench.model(), first, 3, 6, previous_trace=dataclasses.replace(upper, foretold=foretold))[1]
        for foretold in (upper.foretold, None, (other,))
    )
    assert torch.equal(resized.posterior, alone.posterior) and not torch.equal(counted.posterior, alone.posterior)


def test_without_the_trace_the_second_node_starts_at_the_prior_again(bench):
    model, latent = bench.model(), bench.latent()
    first, upper = advanced(bench, model, latent, 0, 3)
    _, alone = advanced(bench, model, first, 3, 6)
    assert len(upper.sigmas) == len(alone.sigmas) == 3
    assert float(upper.sigmas[-1]) > float(alone.sigmas[0])
    torch.testing.assert_close(alone.posterior[0], torch.full((1, 8), 1 / 8))


def test_on_an_ancestral_sampler_the_carried_posterior_is_near_the_exact_one(bench, monkeypatch):
    model, latent, states = bench.model(), bench.latent(300), []
    call = bench.guidance.NegativeGuidance.__call__

    def recorded(self: Any, state: Any, level: float, *args: Any) -> Any:
        states.append((state.clone(), level))
        return call(self, state, level, *args)

    monkeypatch.setattr(bench.guidance.NegativeGuidance, "__call__", recorded)
    first, upper = advanced(bench, model, latent, 0, 45, 60, "euler_ancestral")
    _, trace = advanced(bench, model, first, 45, 60, 60, "euler_ancestral", previous_trace=upper)
    exact = torch.stack([bench.mixture.log_posterior(*at, [0]).exp() for at in states])
    assert len(trace.sigmas) == len(states) == 60
    errors = (trace.posterior[:, 0] - exact).abs().mean(dim=1)
    assert float(errors[45:].mean()) < 0.05
    prior = (1 / 8 - exact[45]).abs().mean()
    assert float(errors[45]) < 0.3 * float(prior)


def test_every_concept_carries_over(bench):
    model, latent = bench.model(), bench.latent()
    others = {"more_concepts": (bench.concept("3", temperature=0.5),)}
    whole, trace = advanced(bench, model, latent, 0, 6, **others)
    first, upper = advanced(bench, model, latent, 0, 3, **others)
    second, lower = advanced(bench, model, first, 3, 6, previous_trace=upper, **others)
    assert torch.equal(second["samples"], whole["samples"])
    assert torch.equal(lower.posterior, trace.posterior) and trace.posterior.shape == (6, 2, 8)


def test_three_nodes_make_one_trace(bench):
    model, latent = bench.model(), bench.latent()
    whole, trace = advanced(bench, model, latent, 0, 6)
    out, part = latent, None
    for start in (0, 2, 4):
        out, part = advanced(bench, model, out, start, start + 2, previous_trace=part)
    assert torch.equal(out["samples"], whole["samples"])
    assert torch.equal(part.posterior, trace.posterior)


def test_an_inpainting_mask_carries_over_too(bench):
    """Each node draws its own noise for what the mask keeps, so samples are not compared with an unsplit run's."""
    model, mask = bench.model(), torch.zeros(1, 4, 4)
    mask[..., :2] = 1.0
    latent = {"samples": bench.mixture.means[:8].clone(), "noise_mask": mask}
    first, upper = advanced(bench, model, latent, 0, 3)
    _, trace = advanced(bench, model, first, 3, 6, previous_trace=upper)
    assert trace.posterior.shape == (6, 1, 8)
    assert bool(trace.posterior.isfinite().all())
    assert torch.equal(trace.posterior[:3], upper.posterior)


def test_a_node_that_is_off_or_tracks_nothing_or_takes_no_step_hands_the_trace_on(bench):
    model = bench.model()
    first, upper = advanced(bench, model, bench.latent(), 0, 3)
    assert advanced(bench, model, first, 3, 6, previous_trace=upper, settings={"guidance_scale": 0.0})[1] is upper
    baseline = {"settings": "negative_prompting"}
    assert advanced(bench, model, first, 3, 6, previous_trace=upper, settings=baseline)[1] is upper
    assert advanced(bench, model, first, 6, 6, previous_trace=upper)[1] is upper


def test_a_trace_of_other_images_or_concepts_is_refused(bench):
    model = bench.model()
    first, upper = advanced(bench, model, bench.latent(8), 0, 3)
    with pytest.raises(ValueError, match=r"`previous_trace` is of 1 concepts and 8 images, this run of 1 and 4"):
        advanced(bench, model, {"samples": first["samples"][:4]}, 3, 6, previous_trace=upper)
    with pytest.raises(ValueError, match=r"`previous_trace` is of 1 concepts and 8 images, this run of 2 and 8"):
        advanced(bench, model, first, 3, 6, previous_trace=upper, more_concepts=(bench.concept("3"),))


def test_a_trace_of_another_prior_is_refused(bench):
    """The second node would go on from a posterior that is not the one of its own prior."""
    model = bench.model()
    first, upper = advanced(bench, model, bench.latent(), 0, 3, settings={"prior": 0.2})
    told = r"`previous_trace` began at the prior 0\.2 of concept 1, which this run says is 0\.5.*`prior`.*same in both"
    with pytest.raises(ValueError, match=told):
        advanced(bench, model, first, 3, 6, previous_trace=upper, settings={"prior": 0.5})
    _, whole = advanced(bench, model, first, 3, 5, previous_trace=upper, settings={"prior": 0.2})
    with pytest.raises(ValueError, match=told):
        advanced(bench, model, first, 5, 6, previous_trace=whole, settings={"prior": 0.5})
    pair = {"more_concepts": (bench.concept("3", prior=0.1),)}
    first, upper = advanced(bench, model, bench.latent(), 0, 3, **pair)
    pair = {"more_concepts": (bench.concept("3", prior=0.3),)}
    with pytest.raises(ValueError, match=r"the prior 0\.1 of concept 2, which this run says is 0\.3"):
        advanced(bench, model, first, 3, 6, previous_trace=upper, **pair)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 5.0, "max_scale": 3.0},
        {"temperature": 0.2, "offset": 1.0, "offset_form": "total"},
        {"p_min": 0.01, "p_max": 0.6},
        {"rule": "probe"},
        {"economy": "auto"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_all_but_the_prior_may_change_on_the_way(bench, settings):
    """As for two models of one run, with calibrations of their own, and with other step counts."""
    first, upper = advanced(bench, bench.model(), bench.latent(), 0, 3)
    _, trace = advanced(bench, bench.model(), first, 6, 12, 12, previous_trace=upper, settings=settings)
    assert len(trace.sigmas) >= 9
    assert torch.equal(trace.posterior[:3], upper.posterior)


def test_a_trace_that_does_not_say_its_priors_goes_on(bench):
    first, upper = advanced(bench, bench.model(), bench.latent(), 0, 3)
    untold = dataclasses.replace(upper, priors=None)
    _, trace = advanced(bench, bench.model(), first, 3, 6, previous_trace=untold, settings={"prior": 0.5})
    assert trace.posterior.shape == (6, 1, 8) and trace.priors == (0.5,)


@pytest.mark.parametrize("start", [0, 2])
def test_the_trace_of_a_run_that_went_further_down_is_refused(bench, start):
    """The run before took the steps up to 4 of 6."""
    model, latent = bench.model(), bench.latent()
    first, upper = advanced(bench, model, latent, 0, 4)
    with pytest.raises(ValueError, match=r"`previous_trace` comes down to sigma .*begins above it.*`start_at_step`"):
        advanced(bench, model, first, start, 6, previous_trace=upper)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "sa_solver_pece", "dpm_adaptive"])
def test_samplers_that_look_ahead_can_be_split(bench, sampler):
    """They evaluate the model at the level where the run stops, or near it."""
    model, latent = bench.model(), bench.latent()
    first, upper = advanced(bench, model, latent, 0, 3, sampler=sampler)
    _, lower = advanced(bench, model, first, 3, 6, sampler=sampler, previous_trace=upper)
    assert len(lower.sigmas) > len(upper.sigmas)
