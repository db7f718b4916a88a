"""The rule elbo, held against exact log ratios, and the choice between it and Algorithm 2."""

import math

import pytest
import torch
from torch import Tensor

from dng_core.guidance import NegativeGuidance
from dng_core.oracle import GaussianMixture
from dng_core.posterior import Chain
from dng_core.schedules import karras_sigmas
from dng_core.settings import Rule, Settings
from dng_core.studies.samplers import Sampler, added_noise, sample

OFF = Settings(guidance_scale=0, prior=1e-100, p_min=1e-300, p_max=1 - 1e-9)


def tracked(
    mixture: GaussianMixture,
    undesired: int,
    reference: list[int] | None,
    sampler: Sampler = "euler",
    steps: int = 60,
    rule: Rule = "auto",
    images: int = 200,
    settings: Settings = OFF,
) -> tuple[NegativeGuidance, Tensor]:
    """An unguided run, observed for one component, and the states at its end, in float64."""
    levels = karras_sigmas(steps, 0.01, 157.0)
    guidance = NegativeGuidance([settings.with_(rule=rule)], Chain(levels, noise_fraction=added_noise(sampler)))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        expected = mixture.denoised(x, sigma, reference)
        return guidance(x, sigma, expected, expected, [mixture.denoised(x, sigma, [undesired])])

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images, *mixture.means.shape[1:], generator=generator, dtype=torch.float64)
    return guidance, sample(denoise, noise, levels, sampler, generator)


def test_on_a_deterministic_run_the_rule_is_exact_for_gaussians_that_differ_in_their_means():
    mixture = GaussianMixture.random(2, (1, 2, 2), std=0.5)
    guidance, states = tracked(mixture, 1, [0], steps=2000, images=32)
    found = guidance.paths[0].points[-1].log_p - math.log(OFF.prior)
    near, far = ((states - mean).square().flatten(1).sum(dim=1) for mean in (mixture.means[0], mixture.means[1]))
    exact = (near - far) / (2 * 0.5**2)
    assert exact.std() > 1
    torch.testing.assert_close(found, exact.to(found), rtol=0.01, atol=0.1)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
@pytest.mark.parametrize("weight", [torch.ones(1, 1, 2, 2), torch.tensor([[[[1.0, 0.0], [0.5, 1.0]]]])])
def test_the_evidence_is_what_all_predictions_so_far_foretold_of_the_expected_image(sampler, weight):
    """The sum over the jumps is that of the formula with the latest prediction in the place of the image."""
    mixture, said = GaussianMixture.random(3, (1, 2, 2)), []
    levels = karras_sigmas(12, 0.1, 40.0)
    chain = Chain(levels, weight=weight, noise_fraction=added_noise(sampler))
    guidance = NegativeGuidance([OFF.with_(rule="elbo")], chain)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        reference, negative = mixture.denoised(x, sigma), mixture.denoised(x, sigma, [1])
        said.append((reference, negative - reference))
        return guidance(x, sigma, reference, reference, [negative])

    generator = torch.Generator().manual_seed(0)
    sample(denoise, torch.randn(8, 1, 2, 2, generator=generator, dtype=torch.float64), levels, sampler, generator)
    factor = 1 / (2 - 2 * math.log(2)) if sampler == "euler" else 1.0
    by_hand = torch.full((8,), math.log(OFF.prior), dtype=torch.float64)
    for (reference, difference), start, end in zip(said, levels, levels[1:], strict=False):
        foretold = factor * difference * (said[-1][0] - reference) - difference.square() / 2
        by_hand += (1 / end**2 - 1 / start**2) * (weight * foretold).flatten(1).sum(dim=1)
    torch.testing.assert_close(guidance.paths[0].points[-1].log_p, by_hand, rtol=1e-9, atol=1e-9)


def cross_entropy(rule: Rule, sampler: Sampler, mixture: GaussianMixture, steps: int = 60) -> float:
    """Of p at the end against the component that is seen there, in nats."""
    settings = OFF.with_(prior=1 / len(mixture.means), p_min=1e-6, p_max=1 - 1e-6)
    guidance, states = tracked(mixture, 0, None, sampler, steps, rule, settings=settings)
    log_p, shown = guidance.paths[0].points[-1].log_p, mixture.classify(states) == 0
    return -float(torch.where(shown, log_p, torch.log1p(-log_p.exp())).mean())


@pytest.mark.parametrize("side", [4, 16, 32])
def test_without_noise_the_rule_foretells_better_than_algorithm_2_in_any_dimension(side):
    mixture = GaussianMixture.random(8, (1, side, side))
    found = {rule: cross_entropy(rule, "euler", mixture) for rule in ("elbo", "algorithm_2")}
    assert found["elbo"] < 0.5 * found["algorithm_2"]


@pytest.mark.parametrize(
    ("sampler", "rule"), [("euler", "elbo"), ("dpmpp_2m", "elbo"), ("dpmpp_2m_sde", "algorithm_2")]
)
def test_auto_is_algorithm_2_where_the_sampler_adds_noise_and_elbo_where_it_adds_none(sampler, rule):
    mixture, seen = GaussianMixture.random(4, (1, 2, 2)), OFF.with_(prior=0.25, p_min=1e-6)
    auto, chosen, other = (
        tracked(mixture, 0, None, sampler, 12, name, 8, seen)[0].trace().posterior
        for name in ("auto", rule, "elbo" if rule == "algorithm_2" else "algorithm_2")
    )
    assert torch.equal(auto, chosen) and not torch.equal(auto, other)


@pytest.mark.parametrize(
    ("levels", "fractions", "rule"),
    [
        (None, None, "algorithm_2"),
        ((3.0, 2.0, 1.0), {3.0: 0.0, 2.0: 0.0}, "elbo"),
        ((3.0, 2.0, 1.0), {3.0: 0.0, 2.0: 0.9}, "algorithm_2"),
        ((3.0, 2.0, 1.0), {3.0: 0.3, 2.0: 0.3}, "elbo"),
        ((3.0, 2.0, 1.0), {3.0: 0.7, 2.0: 0.0}, "elbo"),
        ((math.inf, 2.0, 1.0), {math.inf: 1.0, 2.0: 0.0}, "elbo"),
        (None, {2.0: 0.0}, "elbo"),
    ],
)
def test_a_sampler_counts_as_noisy_by_the_steps_whose_noise_is_known(levels, fractions, rule):
    known = None if fractions is None else lambda sigma, next_sigma: fractions[sigma]
    assert Chain(levels, noise_fraction=known).rule(Settings()) == rule
    assert Chain(levels, noise_fraction=known).rule(Settings(rule="probe")) == "probe"
