"""The covariance gap and the evidence that uses it, against a Gaussian mixture whose posterior is known."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from dng_core.evidence import PROBE_SPACING, Call, Prober, gap_of_step, held_evidence, path_evidence
from dng_core.frames import VP, NoiseFrame
from dng_core.guidance import NegativeGuidance, Probed
from dng_core.kernels import ReverseKernel
from dng_core.oracle import GaussianMixture
from dng_core.posterior import Chain
from dng_core.schedules import karras_sigmas
from dng_core.settings import Rule, Settings

MIXTURE = GaussianMixture.random(8, (16,), 0.2)
FLOW = NoiseFrame("flow", 8.0)


def call(x: Tensor, sigma: float) -> Call:
    return Call(x, sigma, MIXTURE.denoised(x, sigma), MIXTURE.denoised(x, sigma, [0]))


def truth_of(start: Call, end: Call) -> Tensor:
    return MIXTURE.log_posterior(end.x, end.sigma, [0]) - MIXTURE.log_posterior(start.x, start.sigma, [0])


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
    probe = Prober(seed=1).next(copies, sigma)
    gap = probe.covariance_gap(call(copies, sigma).difference, call(probe.x, sigma).difference)
    probed = gap.reshape(2000, 4)
    sampling_error = probed.std(dim=0) / 2000**0.5
    assert bool(((probed.mean(dim=0) - exact_gap(x, sigma)).abs() < 4 * sampling_error + 0.03).all())


@pytest.mark.parametrize("frame", [VP, NoiseFrame("flow"), FLOW], ids=lambda frame: frame.kind)
def test_every_frame_probes_the_same_place(frame):
    x, level = noisy(3, 0.7), 0.7 / (frame.noise_scale + 0.7) if frame.kind == "flow" else 0.7
    there = Prober(seed=5).next(frame.to_ve(frame.from_ve(x, level), level), frame.sigma(level)).x
    torch.testing.assert_close(there, Prober(seed=5).next(x, 0.7).x)


def test_a_gap_is_probed_again_only_after_the_noise_has_fallen():
    prober, x = Prober(seed=0), noisy(2, 1.0)
    levels = [4.0, 4.0, 4.0 / PROBE_SPACING * 1.01, 4.0 / PROBE_SPACING, 4.0, 0.0]
    assert [prober.next(x, level) is not None for level in levels] == [True, False, False, True, True, False]


def test_at_infinite_noise_nothing_is_probed():
    assert Prober(seed=0).next(noisy(2, 1.0), FLOW.sigma(1.0)) is None


def test_elements_of_weight_0_are_neither_moved_nor_counted():
    x, weight = noisy(2, 1.0), torch.zeros(1, 16, dtype=torch.float64)
    weight[:, :4] = 1
    probe = Prober(seed=0, weight=weight).next(x, 1.0)
    assert torch.equal(probe.x[:, 4:], x[:, 4:]) and bool((probe.x[:, :4] != x[:, :4]).all())
    outside = torch.zeros_like(x)
    outside[:, 4:] = 1e3
    assert probe.covariance_gap(torch.zeros_like(x), outside).tolist() == [0, 0]


def test_along_any_path_the_evidence_is_the_exact_one_to_third_order():
    """A straight move that follows no sampler: halving its length divides the error by about eight."""
    x, direction = noisy(64, 1.0), torch.randn(64, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    errors = []
    for length in (0.2, 0.1, 0.05):
        start, end = call(x, 1.0), call(x + length * direction, 1.0 - length)
        gap = (exact_gap(x, 1.0) + exact_gap(end.x, end.sigma)) / 2
        errors.append(float((path_evidence(start, end, gap) - truth_of(start, end)).abs().mean()))
    assert errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5


@pytest.mark.parametrize("fraction", [0.8, 0.5])
def test_a_step_with_part_of_the_noise_is_right_on_average(fraction):
    """Many draws of one step, each with its mirror image: little is left of what Algorithm 2 misses on average."""
    start, kernel = call(x := noisy(5000, 2.0), 2.0), ReverseKernel(2.0, 1.95)
    keep = math.sqrt(kernel.next_sigma**2 - fraction * kernel.variance) / kernel.sigma
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    missed, left = [], []
    for sign in (1, -1):
        there = keep * x + (1 - keep) * start.reference + sign * (fraction * kernel.variance) ** 0.5 * noise
        end = call(there, 1.95)
        gap = gap_of_step(start, end, start.reference, fraction)
        missed.append((truth_of(start, end) - held_evidence(start, end, start)).mean())
        left.append((truth_of(start, end) - path_evidence(start, end, gap)).mean())
    assert sum(missed) > 0.005
    assert abs(sum(left)) < sum(missed) / 4


def test_a_large_step_with_all_of_the_noise_is_nearly_right_on_average():
    """Algorithm 2 is right on average for small steps; from sigma 2 to 1.4 it misses a quarter of a nat."""
    x = noisy(4000, 2.0)
    x = x[MIXTURE.log_posterior(x, 2.0, [0]) > math.log(0.02)]
    start, kernel = call(x, 2.0), ReverseKernel(2.0, 1.4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    end = call(kernel.mean(x, start.reference) + kernel.variance**0.5 * noise, 1.4)
    ours = path_evidence(start, end, gap_of_step(start, end, start.reference, 1.0))
    missed = float((truth_of(start, end) - held_evidence(start, end, start)).mean())
    left = float((truth_of(start, end) - ours).mean())
    assert missed > 0.15 and abs(left) < missed / 2, (missed, left)


@pytest.mark.parametrize("frame", [VP, NoiseFrame("flow"), FLOW], ids=lambda frame: frame.kind)
def test_the_gap_of_a_step_is_the_same_in_every_frame(frame):
    start, end = call(noisy(8, 2.0), 2.0), call(noisy(8, 1.5, seed=1), 1.5)
    expected = gap_of_step(start, end, start.reference, 0.9)
    high, low = (s / (frame.noise_scale + s) if frame.kind == "flow" else s for s in (2.0, 1.5))
    framed = [
        Call(frame.to_ve(frame.from_ve(c.x, level), level), frame.sigma(level), c.reference, c.negative)
        for c, level in ((start, high), (end, low))
    ]
    torch.testing.assert_close(gap_of_step(*framed, start.reference, 0.9), expected)


def test_elements_of_weight_0_do_not_count_in_the_gap_of_a_step():
    start, end = call(noisy(8, 2.0), 2.0), call(noisy(8, 1.5, seed=1), 1.5)
    step = start, end, start.x, 1.0
    whole, half = torch.ones(1, 16, dtype=torch.float64), torch.zeros(1, 16, dtype=torch.float64)
    half[:, :4] = 1
    parts = gap_of_step(*step, weight=half) + gap_of_step(*step, weight=whole - half)
    torch.testing.assert_close(parts, gap_of_step(*step))


SETTINGS = Settings(prior=1 / 8, guidance_scale=0.0)


def unguided(
    rule: Rule, eta: float, steps: int = 30, top: float = 150.0, partial: bool = False
) -> tuple[NegativeGuidance, list[Call]]:
    """A run that injects eta^2 of the kernel's variance: what tracked it, and what the model said.

    A ``partial`` run starts from noised samples with their exact posterior, as a later part of a split run does.
    """
    sigmas = karras_sigmas(steps, 0.01, top)
    generator = torch.Generator().manual_seed(0)
    x = noisy(300, top).float() if partial else top * torch.randn(300, 16, generator=generator)
    start = [MIXTURE.log_posterior(x, top, [0])] if partial else None
    chain = Chain(sigmas, noise_fraction=lambda *levels: eta**2)
    guidance = NegativeGuidance([SETTINGS.with_(rule=rule)], chain, start)
    calls = []
    for i, sigma in enumerate(sigmas):
        calls.append(said := call(x, sigma))
        probed, probe = None, guidance.probe(x, sigma)
        if probe is not None:
            there = call(probe.x, sigma)
            probed = Probed(probe, there.reference, [there.negative])
        denoised = guidance(x, sigma, said.reference, said.reference, [said.negative], probed)
        if i + 1 < steps:
            kernel = ReverseKernel(sigma, sigmas[i + 1])
            keep = math.sqrt(kernel.next_sigma**2 - eta**2 * kernel.variance) / sigma
            x = keep * x + (1 - keep) * denoised
            x = x + eta * kernel.variance**0.5 * torch.randn(x.shape, generator=generator)
    return guidance, calls


def final_error(rule: Rule, *run: float) -> float:
    """Mean error of the posterior at the end of an unguided run."""
    guidance, calls = unguided(rule, *run)
    return error(guidance.trace().posterior[-1, 0], calls[-1])


def error(posterior: Tensor, last: Call) -> float:
    return float((posterior - MIXTURE.log_posterior(last.x, last.sigma, [0]).exp()).abs().mean())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_probes_the_tracked_posterior_is_the_exact_one_without_noise_and_with_it(eta):
    assert final_error("algorithm_2", eta) > 0.05
    assert final_error("probe", eta) < 0.04


@pytest.mark.parametrize(("top", "partial"), [(4518.0, False), (2.0, True)], ids=["zero-terminal SNR", "denoise < 1"])
def test_probes_hold_from_any_starting_level(top, partial):
    assert final_error("probe", 0.0, 25, top, partial) < 0.05


def test_the_gap_averaged_over_the_steps_before_brings_the_posterior_nearer_to_the_exact_one():
    """It is nearer than with each step's own estimate, which is computed by hand along the same run."""
    guidance, calls = unguided("step_noise", 1.0)
    log_p = torch.full((300,), math.log(1 / 8))
    for start, end in itertools.pairwise(calls):
        log_p = log_p + path_evidence(start, end, gap_of_step(start, end, start.reference, 1.0))
        log_p = log_p.clamp(math.log(SETTINGS.p_min), math.log(SETTINGS.p_max))
    averaged, of_one_step = error(guidance.trace().posterior[-1, 0], calls[-1]), error(log_p.exp(), calls[-1])
    algorithm_2 = final_error("algorithm_2", 1.0)
    assert averaged < of_one_step / 1.5 < algorithm_2 / 1.5, (averaged, of_one_step, algorithm_2)


def test_the_refined_posterior_is_near_the_exact_one_at_many_steps_too():
    """A long run must not make the averaged gap lag behind, although it averages over more and smaller steps."""
    algorithm_2, refined = final_error("algorithm_2", 1.0, 300), final_error("step_noise", 1.0, 300)
    assert refined <= algorithm_2 < 0.03, (refined, algorithm_2)


def test_an_averaged_gap_follows_the_steps_that_a_sampler_keeps():
    """A trial point that is replaced leaves nothing behind in the average."""

    def last(trial: bool) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        chain = Chain([2.0, 1.7, 1.4], noise_fraction=lambda *levels: 1.0)
        guidance = NegativeGuidance([Settings(rule="step_noise")], chain)
        before = torch.zeros(16, 16)
        for sigma in (2.0, 1.7, 1.4):
            x = noisy(16, sigma) + 0.1 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
            for state in (-x, x) if trial and sigma == 1.7 else (x,):
                said = call(state, sigma)
                guided = guidance(state, sigma, said.reference, said.reference, [said.negative])
                if state is not x:  # the step is taken again as it was
                    guidance.paths = [dataclasses.replace(path, guided=before) for path in guidance.paths]
            before = guided
        return guidance.trace().posterior[-1, 0]

    torch.testing.assert_close(last(True), last(False))


def end_of_other_kind(rule: Rule, error: float, images: int = 32, elements: int = 16_384, noisy: bool = True) -> float:
    """The mean posterior at the end of a run whose images are surely of the other of two kinds, which lie 4 apart.

    ``error``: the amplitude of an error in the undesired prediction, a smooth function of the state, in the units of a
    latent's element, in which the images of one kind spread by 0.5. ``noisy``: by the exact chain, or without noise.
    """
    generator = torch.Generator().manual_seed(0)
    apart = torch.nn.functional.normalize(torch.randn(elements, generator=generator), dim=0) * 2
    kinds = GaussianMixture(torch.stack([apart, -apart]), 0.5, torch.tensor([0.3, 0.7]))
    phase = 2 * math.pi * torch.rand(elements, generator=generator)
    sigmas = karras_sigmas(30, 0.03, 80.0)
    guidance = NegativeGuidance(
        [Settings(prior=0.3, rule=rule)], Chain(sigmas, noise_fraction=lambda *levels: float(noisy))
    )
    x = -apart + 80 * torch.randn(images, elements, generator=generator)
    for level, below in itertools.pairwise([*sigmas, 0.0]):
        reference = kinds.denoised(x, level)
        wrong = error * level / math.hypot(1, level) * torch.sin(2 * x / level + phase)
        guidance(x, level, reference, reference, [kinds.denoised(x, level, [0]) + wrong])
        expected = kinds.denoised(x, level, [1])
        if below and noisy:
            kernel = ReverseKernel(level, below)
            x = kernel.mean(x, expected) + kernel.variance**0.5 * torch.randn(x.shape, generator=generator)
        elif below:
            x = expected + (x - expected) * below / level
    return float(guidance.trace().posterior[-1, 0].mean())


def test_small_errors_on_a_large_latent_mislead_step_noise_and_not_the_rules_that_ship():
    """What was seen on a small text-to-image model, with the truth known: why *step_noise* is not the default."""
    assert end_of_other_kind("step_noise", 0.0) < 1e-3
    assert end_of_other_kind("step_noise", 0.1) > 0.1
    assert end_of_other_kind("algorithm_2", 0.1) < 1e-3
    assert end_of_other_kind("elbo", 0.1) < 1e-3
    assert end_of_other_kind("auto", 0.1, noisy=False) < 1e-3
