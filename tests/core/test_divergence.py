"""The covariance gap and the increments that use it, against a Gaussian mixture whose posterior is known."""

import math

import pytest
import torch
from torch import Tensor

from dng_core.divergence import PROBE_SPACING, Prober
from dng_core.guidance import NegativeGuidance
from dng_core.kernels import VE, VP, NoiseFrame, ReverseKernel
from dng_core.oracle import GaussianMixture
from dng_core.posterior import gap_of_step, path_increment, posterior_increment
from dng_core.schedules import karras_sigmas
from dng_core.settings import Rule, Settings

MIXTURE = GaussianMixture.random(8, (16,), 0.2)
FLOW = NoiseFrame("flow", 8.0)


def predictions(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    return MIXTURE.denoised(x, sigma, [0]), MIXTURE.denoised(x, sigma)


def difference(x: Tensor, sigma: float) -> Tensor:
    negative, reference = predictions(x, sigma)
    return negative - reference


def exact_gap(x: Tensor, sigma: float) -> Tensor:
    """tr Cov[x_0|x, c-] - tr Cov[x_0|x]: the spread of each component is the same, that between them is not."""
    shares = MIXTURE.log_responsibilities(x, sigma).exp()
    each = torch.stack([MIXTURE.denoised(x, sigma, [k]) for k in range(8)], dim=1)
    mean = (shares[..., None] * each).sum(dim=1, keepdim=True)
    return -(shares * (each - mean).square().sum(dim=2)).sum(dim=1)


def noisy(count: int, sigma: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    clean = MIXTURE.sample(count, generator).double()
    return clean + sigma * torch.randn(clean.shape, generator=generator, dtype=clean.dtype)


@pytest.mark.parametrize("sigma", [3.0, 1.0, 0.3])
def test_the_probed_gap_is_the_exact_one_on_average(sigma):
    x = noisy(4, sigma)
    copies = x.repeat(2000, 1)
    probe = Prober(VE, seed=1).next(copies, sigma)
    probed = probe.covariance_gap(difference(copies, sigma), difference(probe.state, sigma)).reshape(2000, 4)
    sampling_error = probed.std(dim=0) / 2000**0.5
    assert bool(((probed.mean(dim=0) - exact_gap(x, sigma)).abs() < 4 * sampling_error + 0.03).all())


@pytest.mark.parametrize("frame", [VP, NoiseFrame("flow"), FLOW], ids=lambda frame: frame.kind)
def test_every_frame_probes_the_same_place(frame):
    sigma = 0.7
    level = sigma / (frame.noise_scale + sigma) if frame.kind == "flow" else sigma
    x = noisy(3, sigma)
    there = Prober(frame, seed=5).next(x / frame.scale(level), level).state * frame.scale(level)
    torch.testing.assert_close(there, Prober(VE, seed=5).next(x, sigma).state)


def test_a_gap_is_probed_again_only_after_the_noise_has_fallen():
    prober, x = Prober(VE, seed=0), noisy(2, 1.0)
    levels = [4.0, 4.0, 4.0 / PROBE_SPACING * 1.01, 4.0 / PROBE_SPACING, 4.0, 0.0]
    assert [prober.next(x, level) is not None for level in levels] == [True, False, False, True, True, False]


def test_at_infinite_noise_nothing_is_probed():
    assert Prober(FLOW, seed=0).next(noisy(2, 1.0), 1.0) is None


def test_elements_of_weight_0_are_neither_moved_nor_counted():
    x, weight = noisy(2, 1.0), torch.zeros(1, 16, dtype=torch.float64)
    weight[:, :4] = 1
    probe = Prober(VE, seed=0, weight=weight).next(x, 1.0)
    assert torch.equal(probe.state[:, 4:], x[:, 4:]) and bool((probe.state[:, :4] != x[:, :4]).all())
    outside = torch.zeros_like(x)
    outside[:, 4:] = 1e3
    assert probe.covariance_gap(torch.zeros_like(x), outside).tolist() == [0, 0]


def test_along_any_path_the_increment_is_the_exact_one_to_third_order():
    """A straight move that follows no sampler: halving its length divides the error by about eight."""
    x, direction = noisy(64, 1.0), torch.randn(64, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    errors = []
    for length in (0.2, 0.1, 0.05):
        low, there = 1.0 - length, x + length * direction
        gap = (exact_gap(x, 1.0) + exact_gap(there, low)) / 2
        ours = path_increment(there, x, predictions(x, 1.0), predictions(there, low), gap, low, 1.0)
        truth = MIXTURE.log_posterior(there, low, [0]) - MIXTURE.log_posterior(x, 1.0, [0])
        errors.append(float((ours - truth).abs().mean()))
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5


@pytest.mark.parametrize("fraction", [0.8, 0.5])
def test_a_step_with_part_of_the_noise_is_right_on_average(fraction):
    """Many draws of one step, each with its mirror image: little is left of what Algorithm 2 misses on average."""
    x = noisy(5000, 2.0)
    here = predictions(x, 2.0)
    kernel = ReverseKernel(2.0, 1.95)
    keep = math.sqrt(kernel.next_sigma**2 - fraction * kernel.variance) / kernel.sigma
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    missed, left = [], []
    for sign in (1, -1):
        there = keep * x + (1 - keep) * here[1] + sign * (fraction * kernel.variance) ** 0.5 * noise
        truth = MIXTURE.log_posterior(there, 1.95, [0]) - MIXTURE.log_posterior(x, 2.0, [0])
        algorithm_2 = posterior_increment(there, x, *here, 1.95, 2.0)
        after = predictions(there, 1.95)
        gap = gap_of_step(there, x, here, after, here[1], fraction, 1.95, 2.0)
        ours = path_increment(there, x, here, after, gap, 1.95, 2.0)
        missed.append((truth - algorithm_2).mean())
        left.append((truth - ours).mean())
    assert sum(missed) > 0.005
    assert abs(sum(left)) < sum(missed) / 4


def test_a_large_step_with_all_of_the_noise_is_nearly_right_on_average():
    """Algorithm 2 is right on average for small steps; from sigma 2 to 1.4 it misses a quarter of a nat."""
    x = noisy(4000, 2.0)
    x = x[MIXTURE.log_posterior(x, 2.0, [0]) > math.log(0.02)]
    here, kernel = predictions(x, 2.0), ReverseKernel(2.0, 1.4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    there = kernel.mean(x, here[1]) + kernel.variance**0.5 * noise
    after = predictions(there, 1.4)
    truth = MIXTURE.log_posterior(there, 1.4, [0]) - MIXTURE.log_posterior(x, 2.0, [0])
    algorithm_2 = posterior_increment(there, x, *here, 1.4, 2.0)
    gap = gap_of_step(there, x, here, after, here[1], 1.0, 1.4, 2.0)
    ours = path_increment(there, x, here, after, gap, 1.4, 2.0)
    missed, left = float((truth - algorithm_2).mean()), float((truth - ours).mean())
    assert missed > 0.15 and abs(left) < missed / 2, (missed, left)


@pytest.mark.parametrize("frame", [VP, NoiseFrame("flow"), FLOW], ids=lambda frame: frame.kind)
def test_the_gap_of_a_step_is_the_same_in_every_frame(frame):
    x, there = noisy(8, 2.0), noisy(8, 1.5, seed=1)
    here, after = predictions(x, 2.0), predictions(there, 1.5)
    expected = gap_of_step(there, x, here, after, here[1], 0.9, 1.5, 2.0)
    high, low = (s / (frame.noise_scale + s) if frame.kind == "flow" else s for s in (2.0, 1.5))
    framed = there / frame.scale(low), x / frame.scale(high)
    torch.testing.assert_close(gap_of_step(*framed, here, after, here[1], 0.9, low, high, frame), expected)


def test_elements_of_weight_0_do_not_count_in_the_gap_of_a_step():
    x, there = noisy(8, 2.0), noisy(8, 1.5, seed=1)
    step = there, x, predictions(x, 2.0), predictions(there, 1.5), x, 1.0, 1.5, 2.0
    whole, half = torch.ones(1, 16, dtype=x.dtype), torch.zeros(1, 16, dtype=x.dtype)
    half[:, :4] = 1
    parts = gap_of_step(*step, weight=half) + gap_of_step(*step, weight=whole - half)
    torch.testing.assert_close(parts, gap_of_step(*step))


def final_error(
    rule: Rule,
    eta: float,
    steps: int = 30,
    top: float = 150.0,
    partial: bool = False,
) -> float:
    """Mean error of the posterior at the end of an unguided run that injects eta^2 of the kernel's variance.

    A ``partial`` run starts from noised samples with their exact posterior, as a later part of a split run does.
    """
    settings = Settings(prior=1 / 8, guidance_scale=0.0, rule=rule)
    sigmas = karras_sigmas(steps, 0.01, top)
    generator = torch.Generator().manual_seed(0)
    x = noisy(300, top).float() if partial else top * torch.randn(300, 16, generator=generator)
    start = [MIXTURE.log_posterior(x, top, [0])] if partial else None
    guidance = NegativeGuidance([settings], levels=sigmas, log_priors=start, noise_fraction=lambda *levels: eta**2)
    for i, sigma in enumerate(sigmas):
        negative, reference = predictions(x, sigma)
        probe = guidance.probe(x, sigma)
        probed = None
        if probe is not None:
            negative_there, reference_there = predictions(probe.state, sigma)
            probed = probe, reference_there, [negative_there]
        denoised = guidance(x, sigma, reference, reference, [negative], probed)
        if i + 1 < steps:
            kernel = ReverseKernel(sigma, sigmas[i + 1])
            keep = math.sqrt(kernel.next_sigma**2 - eta**2 * kernel.variance) / sigma
            x = keep * x + (1 - keep) * denoised
            x = x + eta * kernel.variance**0.5 * torch.randn(x.shape, generator=generator)
    truth = MIXTURE.log_posterior(x, sigmas[-1], [0]).exp()
    return float((guidance.trace().posterior[-1, 0] - truth).abs().mean())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_probes_the_tracked_posterior_is_the_exact_one_without_noise_and_with_it(eta):
    assert final_error("algorithm_2", eta) > 0.05
    assert final_error("probe", eta) < 0.04


@pytest.mark.parametrize(("top", "partial"), [(4518.0, False), (2.0, True)], ids=["zero-terminal SNR", "denoise < 1"])
def test_probes_hold_from_any_starting_level(top, partial):
    assert final_error("probe", 0.0, 25, top, partial) < 0.05


def test_the_gap_averaged_over_the_steps_before_brings_the_posterior_nearer_to_the_exact_one(monkeypatch):
    algorithm_2, averaged = final_error("algorithm_2", 1.0), final_error("step_noise", 1.0)
    monkeypatch.setattr("dng_core.posterior.GAP_MEMORY", math.inf)
    of_one_step = final_error("step_noise", 1.0)
    assert averaged < of_one_step / 1.5 < algorithm_2 / 1.5, (averaged, of_one_step, algorithm_2)


def test_the_refined_posterior_is_near_the_exact_one_at_many_steps_too():
    """However long the run: an average over ever more, ever smaller steps would lag behind."""
    algorithm_2, refined = final_error("algorithm_2", 1.0, 300), final_error("step_noise", 1.0, 300)
    assert refined <= algorithm_2 < 0.03, (refined, algorithm_2)


def test_an_averaged_gap_follows_the_steps_that_a_sampler_keeps():
    """A trial point that is replaced leaves nothing behind in the average."""

    def last(trial: bool) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        settings = Settings(rule="step_noise")
        guidance = NegativeGuidance([settings], levels=[2.0, 1.7, 1.4], noise_fraction=lambda *levels: 1.0)
        before = torch.zeros(16, 16)
        for sigma in (2.0, 1.7, 1.4):
            x = noisy(16, sigma) + 0.1 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
            for state in (-x, x) if trial and sigma == 1.7 else (x,):
                negative, reference = predictions(state, sigma)
                guided = guidance(state, sigma, reference, reference, [negative])
                if state is not x:  # the step is taken again as it was
                    guidance.trackers[0].moves_towards(before)
            before = guided
        return guidance.trace().posterior[-1, 0]

    torch.testing.assert_close(last(True), last(False))
