"""Calibration: what it records is what is tracked, and on exact predictions it proposes the exact settings."""

import math

import pytest
import torch
from torch import Tensor

from dng_core.calibration import Evidence, Goals, Proposal, evidence_of, explanation, propose, replay
from dng_core.guidance import NegativeGuidance
from dng_core.oracle import GaussianMixture
from dng_core.sampling import ddpm_sample
from dng_core.schedules import karras_sigmas
from dng_core.settings import Settings

MIXTURE = GaussianMixture.random(8, (1, 4, 4))


def run(guidance: NegativeGuidance | None, samples: int, steps: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, 1, 4, 4, generator=generator)

    def predict(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        return MIXTURE.denoised(x, sigma), [MIXTURE.denoised(x, sigma, [0])]

    return ddpm_sample(predict, noise, karras_sigmas(steps, 0.01, 157.0), guidance, generator)


OFF = Settings(guidance_scale=0)


def recorded(samples: int = 256, steps: int = 60, seed: int = 0, settings: Settings = OFF) -> Evidence:
    guidance = NegativeGuidance([settings])
    run(guidance, samples, steps, seed)
    return evidence_of(guidance)[0]


def single(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_on_exact_predictions_the_exact_settings_are_proposed(seed):
    """The exact prior is the component's share, 1/8; the exact temperature is 1 and the exact offset 0."""
    proposal = propose(recorded(seed=seed))
    assert 0.08 < proposal.settings.prior < 0.19
    assert (proposal.settings.temperature, proposal.settings.offset) == (1.0, 0.0)
    assert proposal.meets(Goals())
    assert 15 <= proposal.related <= 80 and proposal.images == 256


def test_observing_leaves_the_samples_as_they_are():
    assert torch.equal(run(NegativeGuidance([OFF]), 8, 10), run(None, 8, 10))


def test_what_is_recorded_depends_on_the_rule_alone_of_the_settings_of_the_run():
    others = OFF.with_(prior=0.5, temperature=0.2, offset=3.0, offset_form="total", p_min=0.4, p_max=0.6)
    assert torch.equal(recorded(16, 20, settings=others).increments, recorded(16, 20).increments)
    probed = recorded(16, 20, settings=OFF.with_(rule="probe"))
    assert not torch.equal(probed.increments, recorded(16, 20).increments)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(prior=0.1),
        Settings(prior=0.3, temperature=0.4),
        Settings(prior=0.05, temperature=0.2, offset=3.0, offset_form="total"),
        Settings(prior=0.5, p_min=0.1, p_max=0.6),
    ],
    ids=str,
)
def test_a_replay_is_what_those_settings_track_along_the_run(settings):
    guidance = NegativeGuidance([settings.with_(guidance_scale=0)])
    run(guidance, 16, 20)
    values = (single(getattr(settings, name)) for name in ("prior", "temperature", "offset"))
    course = torch.stack(list(replay(recorded(16, 20), *values, settings)))[:, 0]
    torch.testing.assert_close(course.float(), guidance.trace().posterior[:, 0], rtol=1e-3, atol=1e-5)


def test_evidence_too_large_for_any_share_lowers_the_temperature():
    """Errors that add up can give 20 times the evidence of an exact model: the temperature becomes about 1 / 9."""
    exact = recorded()
    proposal = propose(Evidence(20 * exact.increments, exact.offsets))
    assert proposal.settings.temperature < 0.2
    assert proposal.settings.prior < 0.11
    assert proposal.meets(Goals())


@pytest.mark.parametrize("below", [0.2, 0.5, 2.0])
@pytest.mark.parametrize("on_by", [0.6, 0.9])
def test_what_is_promised_holds_in_a_replay(below, on_by):
    evidence, goals = recorded(), Goals(on_by, below, 3.0)
    proposal = propose(evidence, None, goals)
    settings = proposal.settings
    values = (single(getattr(settings, name)) for name in ("prior", "temperature", "offset"))
    course = torch.stack(list(replay(evidence, *values, settings)))[:, 0]
    shown = evidence.peak > evidence.peak.quantile(0.95) / 2
    largest = course[:, ~shown].amax(dim=0)
    scales = (3 * largest / (1 - largest)).sort().values
    assert float(scales[math.ceil(0.95 * len(scales)) - 1]) == pytest.approx(proposal.unrelated_scale, rel=0.05)
    step = math.ceil(proposal.on_at * len(course) - 1e-9) if math.isfinite(proposal.on_at) else 0
    if step:
        assert float((course[: step + 1, shown].amax(dim=0) > 0.49).double().mean()) >= 0.5
    assert proposal.meets(goals) == (proposal.unrelated_scale < below and proposal.on_at <= on_by)


def test_evidence_that_sinks_late_is_counted_at_its_peak():
    """A model that errs in fine detail gives such evidence. The proposal stays, but no image ends as the concept."""
    exact = recorded()
    late = torch.zeros(6, 256, dtype=torch.float64) - 5
    sinking = Evidence(torch.cat([exact.increments, late]), torch.cat([exact.offsets, torch.zeros(6).double()]))
    assert propose(sinking).settings == propose(exact).settings


def test_an_unrelated_concept_that_stirs_is_kept_quiet():
    """The concept's evidence rises for a while and sinks again. At the exact settings, the concept would be pushed."""
    related = recorded()
    steps = len(related.increments)
    hump = torch.zeros(steps, 64, dtype=torch.float64)
    hump[steps // 3], hump[steps // 3 + 1] = 3.0, -30.0
    stirring = Evidence(hump, related.offsets)
    goals = Goals(on_by=0.95, below_scale=1.5)
    without, proposal = propose(related, None, goals), propose(related, stirring, goals)
    assert without.settings.temperature == 1.0
    assert proposal.meets(goals)
    assert proposal.unrelated_scale is not None and proposal.unrelated_scale < 1.5
    assert (proposal.settings.prior, proposal.settings.temperature) != (
        without.settings.prior,
        without.settings.temperature,
    )


def test_goals_that_exclude_one_another_are_said_to():
    related = recorded()
    goals = Goals(on_by=0.5, below_scale=0.5)
    proposal = propose(related, related, goals)
    assert not proposal.meets(goals)
    assert "No settings on the grid meet both goals" in explanation(proposal, goals)


def test_the_explanation_holds_the_proposal():
    proposal = Proposal(Settings(prior=0.123, temperature=0.5, offset=1.5, offset_form="total"), 3.0, 5, 64, 0.6, 0.8)
    text = explanation(proposal, Goals())
    for part in ("prior 0.123", "temperature 0.5", "offset 1.5", "5 of 64", "60%", "0.8", "Both goals are met"):
        assert part in text


def test_a_concept_that_no_image_shows_is_refused():
    evidence = recorded(16, 20)
    with pytest.raises(ValueError, match="none of the 16 images shows the related concept"):
        propose(Evidence(-evidence.increments.abs(), evidence.offsets))


def test_a_failed_or_too_short_run_is_refused():
    evidence = recorded(16, 20)
    with pytest.raises(ValueError, match="NaN"):
        propose(Evidence(evidence.increments * math.nan, evidence.offsets))
    with pytest.raises(ValueError, match="at least 3 steps, not 2"):
        recorded(4, 2)


@pytest.mark.parametrize(
    ("name", "value"), [("on_by", 0.0), ("on_by", 1.1), ("below_scale", 0.0), ("guidance_scale", 0)]
)
def test_a_goal_out_of_range_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=name):
        Goals(**{name: value})
