"""DDPM chains, sampling schedules, and the offset integrated over a chain, against published numbers and sums."""

import itertools
import math

import pytest
import torch

from dng_core.kernels import ReverseKernel
from dng_core.posterior import offset_evidence
from dng_core.schedules import DDPMSchedule, IntegratedOffset, ddpm_sigmas, karras_sigmas
from dng_core.settings import Settings

LINEAR = DDPMSchedule.named("linear")
SCALED_LINEAR = DDPMSchedule.named("scaled_linear")


def test_named_chains_have_the_published_endpoints():
    assert LINEAR.betas[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert SCALED_LINEAR.betas[[0, -1]].tolist() == pytest.approx([0.00085, 0.012])
    # sigma_max: DDPM's chain ends at alpha_bar 4.04e-5, Stable Diffusion's at sigma 14.6146
    assert float(LINEAR.sigmas[-1]) == pytest.approx(157.41, abs=0.01)
    assert float(SCALED_LINEAR.sigmas[-1]) == pytest.approx(14.6146, abs=1e-3)
    assert float(SCALED_LINEAR.sigmas[0]) == pytest.approx(0.0292, abs=1e-4)


def test_sigmas_are_those_of_the_cumulative_products():
    product = 1.0
    for t in range(1000):
        product *= 1 - float(LINEAR.betas[t])
        assert float(LINEAR.sigmas[t]) == pytest.approx(math.sqrt((1 - product) / product), rel=1e-9)


def test_timestep_is_the_nearest_in_log_sigma_for_any_shape():
    timesteps = torch.tensor([[0, 1], [500, 999]])
    assert torch.equal(LINEAR.timestep(LINEAR.sigmas[timesteps]), timesteps)
    between = (LINEAR.sigmas[[10]] ** 0.6) * (LINEAR.sigmas[[11]] ** 0.4)
    assert LINEAR.timestep(between).tolist() == [10]


@pytest.mark.parametrize(
    "betas", [torch.tensor([0.1]), torch.zeros(5), torch.tensor([0.5, 1.0]), torch.full((2, 2), 0.5)], ids=str
)
def test_impossible_chains_are_refused(betas):
    with pytest.raises(ValueError, match="beta"):
        DDPMSchedule(betas)


def test_an_unknown_chain_names_the_known_ones():
    with pytest.raises(ValueError, match="scaled_linear"):
        DDPMSchedule.named("cosine")  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 1000])
def test_ddpm_sigmas_fall_from_the_chains_top_to_its_bottom(steps):
    sigmas = ddpm_sigmas(LINEAR, steps)
    assert len(sigmas) == steps
    assert sigmas[0] == float(LINEAR.sigmas[-1])
    assert all(b < a for a, b in itertools.pairwise(sigmas))
    assert steps == 1 or sigmas[-1] == float(LINEAR.sigmas[0])


def test_a_thousand_ddpm_sigmas_are_the_chain_itself():
    assert ddpm_sigmas(LINEAR, 1000) == LINEAR.sigmas.flip(0).tolist()


def test_karras_sigmas_are_evenly_spaced_in_their_seventh_root():
    sigmas = karras_sigmas(10, 0.02, 80.0)
    roots = [s ** (1 / 7) for s in sigmas]
    steps = [a - b for a, b in itertools.pairwise(roots)]
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(80.0), pytest.approx(0.02))
    assert steps == pytest.approx([steps[0]] * 9)


@pytest.mark.parametrize("steps", [0, -3])
def test_step_counts_below_one_are_refused(steps):
    for make in (lambda: ddpm_sigmas(LINEAR, steps), lambda: karras_sigmas(steps, 0.1, 1.0)):
        with pytest.raises(ValueError, match="steps"):
            make()


def test_more_ddpm_steps_than_training_steps_are_refused():
    with pytest.raises(ValueError, match="steps"):
        ddpm_sigmas(LINEAR, 1001)


def test_integrated_offset_is_the_sum_over_training_steps():
    integrated = IntegratedOffset(LINEAR)
    bars, betas = LINEAR.alpha_bars.tolist(), LINEAR.betas.tolist()
    total = 0.0
    for t in range(1, 1000):
        total += (1 - bars[t]) / (2 * (1 - bars[t - 1]) * betas[t])
        assert integrated(float(LINEAR.sigmas[t])) == pytest.approx(total, rel=1e-9)
    assert integrated.total == pytest.approx(total, rel=1e-9)


def test_published_offsets_come_to_29_and_638_nats():
    assert 2e-4 * IntegratedOffset(LINEAR).total == pytest.approx(29, abs=0.5)
    assert 0.004 * IntegratedOffset(SCALED_LINEAR).total == pytest.approx(638, abs=1)


def test_per_step_offset_on_short_chains_is_almost_nothing():
    """The reason for the integrated form: the paper's 2e-4 adds 1.0, 1.1, 1.3, 3.0 nats at 20, 50, 100, 250 steps."""
    settings = Settings(offset=2e-4, offset_form="per_step")
    totals = [chain_offset(settings, ddpm_sigmas(LINEAR, steps)) for steps in (20, 50, 100, 250)]
    assert totals == pytest.approx([1.0, 1.1, 1.3, 3.0], abs=0.06)


def test_integrated_offset_is_monotone_and_constant_outside_the_chain():
    integrated = IntegratedOffset(LINEAR)
    low, high = float(LINEAR.sigmas[0]), float(LINEAR.sigmas[-1])
    values = [integrated(s) for s in torch.logspace(math.log10(low), math.log10(high), 3001).tolist()]
    assert all(b >= a for a, b in itertools.pairwise(values))
    assert [integrated(s) for s in (0.0, low / 2, low)] == [0.0, 0.0, 0.0]
    assert [integrated(s) for s in (high, high * 2, math.inf)] == [integrated.total] * 3


@pytest.mark.parametrize("form", ["integrated", "total"])
def test_a_split_jump_collects_the_same_offset(form):
    integrated = IntegratedOffset(LINEAR)
    settings = Settings(offset=0.3, offset_form=form)
    whole = offset_evidence(settings, ReverseKernel(30.0, 0.05), integrated)
    for middle in (0.06, 1.234, 29.0):
        first = offset_evidence(settings, ReverseKernel(30.0, middle), integrated)
        second = offset_evidence(settings, ReverseKernel(middle, 0.05), integrated)
        assert first + second == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("steps", [2, 7, 50, 1000])
@pytest.mark.parametrize("chain", [LINEAR, SCALED_LINEAR], ids=["linear", "scaled_linear"])
def test_total_form_adds_its_nats_over_a_chain_at_any_step_count(chain, steps):
    settings = Settings(offset=3.5, offset_form="total")
    for sigmas in (ddpm_sigmas(chain, steps), karras_sigmas(steps, float(chain.sigmas[0]), float(chain.sigmas[-1]))):
        assert chain_offset(settings, sigmas, chain) == pytest.approx(3.5, rel=1e-6)


@pytest.mark.parametrize("chain", [LINEAR, SCALED_LINEAR], ids=["linear", "scaled_linear"])
def test_both_offset_forms_agree_at_neighbouring_ddpm_steps(chain):
    integrated = IntegratedOffset(chain)
    for t in range(1, 1000):
        kernel = ReverseKernel(float(chain.sigmas[t]), float(chain.sigmas[t - 1]))
        per_step = offset_evidence(Settings(offset=2e-4, offset_form="per_step"), kernel, integrated)
        assert offset_evidence(Settings(offset=2e-4), kernel, integrated) == pytest.approx(per_step, rel=1e-9)


def chain_offset(settings: Settings, sigmas: list[float], chain: DDPMSchedule = LINEAR) -> float:
    """What the offset adds over a whole run."""
    integrated = IntegratedOffset(chain)
    jumps = itertools.pairwise(sigmas)
    return sum(offset_evidence(settings, ReverseKernel(a, b), integrated) for a, b in jumps)
