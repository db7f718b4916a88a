"""The Gaussian-mixture oracle against Tweedie's formula, Bayes' rule and sums over its own samples."""

import math

import pytest
import torch
from torch import Tensor

from dng_core.oracle import GaussianMixture, with_attributes

WEIGHTS = torch.tensor([0.05, 0.15, 0.3, 0.5], dtype=torch.float64)


def unbalanced() -> GaussianMixture:
    means = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return GaussianMixture(means, 0.3, WEIGHTS)


def component_densities(mixture: GaussianMixture, x: Tensor, sigma: float) -> Tensor:
    """weight_k N(x; mean_k, (std^2 + sigma^2) I), (batch, components)."""
    spread = math.sqrt(mixture.std**2 + sigma**2)
    normal = torch.distributions.Normal(mixture.means, spread)
    return mixture.weights * normal.log_prob(x[:, None]).flatten(2).sum(2).exp()


def noisy(mixture: GaussianMixture, sigma: float, count: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x_0 = mixture.sample(count, generator)
    return x_0 + sigma * torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("components", [None, [0], [1, 3]])
def test_denoised_is_tweedies_formula(sigma, components):
    mixture = unbalanced()
    x = noisy(mixture, sigma).requires_grad_()
    kept = list(range(4)) if components is None else components
    log_density = component_densities(mixture, x, sigma)[:, kept].sum(1).log()
    (score,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(mixture.denoised(x.detach(), sigma, components), x + sigma**2 * score)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_posterior_is_bayes_rule_also_for_unbalanced_weights(sigma):
    mixture = unbalanced()
    x = noisy(mixture, sigma)
    densities = component_densities(mixture, x, sigma)
    torch.testing.assert_close(
        mixture.log_posterior(x, sigma, [0, 2]).exp(), densities[:, [0, 2]].sum(1) / densities.sum(1)
    )
    given = densities[:, 0] / densities[:, [0, 3]].sum(1)
    torch.testing.assert_close(mixture.log_posterior(x, sigma, [0], given=[0, 3]).exp(), given)


def test_far_from_all_noise_the_posterior_is_the_weight():
    mixture = unbalanced()
    x = noisy(mixture, 1e6)
    torch.testing.assert_close(mixture.log_responsibilities(x, 1e6).exp().mean(0), WEIGHTS, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_the_mixture_is_a_posterior_mean_of_two_conditionals(sigma):
    """D = p(c|x) D_c + (1 - p(c|x)) D_not-c: what Dynamic Negative Guidance inverts."""
    mixture = unbalanced()
    x = noisy(mixture, sigma)
    p = mixture.log_posterior(x, sigma, [0, 1]).exp()[:, None, None]
    mixed = p * mixture.denoised(x, sigma, [0, 1]) + (1 - p) * mixture.denoised(x, sigma, [2, 3])
    torch.testing.assert_close(mixed, mixture.denoised(x, sigma))
    guided = mixture.denoised(x, sigma) - p / (1 - p) * (
        mixture.denoised(x, sigma, [0, 1]) - mixture.denoised(x, sigma)
    )
    torch.testing.assert_close(guided, mixture.denoised(x, sigma, [2, 3]), rtol=1e-5, atol=1e-6)


def test_samples_follow_the_weights_and_the_spread():
    mixture = GaussianMixture(unbalanced().means * 5, 0.3, WEIGHTS)
    x = mixture.sample(20000, torch.Generator().manual_seed(0))
    shares = torch.bincount(mixture.classify(x), minlength=4) / len(x)
    torch.testing.assert_close(shares.double(), WEIGHTS, atol=0.012, rtol=0)
    # A chi with 6 degrees of freedom has mean 2.3499.
    assert float(mixture.distance(x).mean()) == pytest.approx(0.3 * 2.3499, rel=0.02)


def test_random_mixtures_are_reproducible_and_equally_weighted():
    first, again, other = (GaussianMixture.random(8, (1, 4, 4), seed=s) for s in (0, 0, 1))
    assert torch.equal(first.means, again.means)
    assert not torch.equal(first.means, other.means)
    assert first.weights.tolist() == [1 / 8] * 8


@pytest.mark.parametrize("std", [0.0, -1.0])
def test_an_impossible_spread_is_refused(std):
    with pytest.raises(ValueError, match="std"):
        GaussianMixture(torch.zeros(2, 3), std, torch.full((2,), 0.5))


@pytest.mark.parametrize("weights", [torch.tensor([1.0, 0.0]), torch.tensor([1.5, -0.5]), torch.ones(3) / 3], ids=str)
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        GaussianMixture(torch.zeros(2, 3), 0.1, weights)


def test_attributes_are_independent_at_every_noise_level_unless_the_weights_couple_them():
    """p(A, B | x) = p(A | x) p(B | x): each half of a latent says nothing of the other attribute."""
    values = 3
    mixture = GaussianMixture.attributes(values, (1, 4, 4))
    x = noisy(mixture, 2.0)
    for a, b in ((0, 0), (2, 1)):
        joint = mixture.log_posterior(x, 2.0, with_attributes(values, a, b))
        alone = [mixture.log_posterior(x, 2.0, with_attributes(values, **{k: v})) for k, v in (("a", a), ("b", b))]
        torch.testing.assert_close(joint, alone[0] + alone[1], rtol=1e-4, atol=1e-4)

    coupled = GaussianMixture.attributes(2, (1, 4, 4), weights=torch.tensor([[0.3, 0.1], [0.1, 0.5]]))
    start = noisy(coupled, 1e6)
    given = coupled.log_posterior(start, 1e6, with_attributes(2, b=0), given=with_attributes(2, a=0)).exp()
    assert float(given.mean()) == pytest.approx(0.75, rel=1e-3)


def test_components_with_an_attribute_share_its_half_of_the_mean():
    mixture = GaussianMixture.attributes(3, (1, 4, 4))
    halves = mixture.means.flatten(1)
    assert with_attributes(3, a=1) == [3, 4, 5] and with_attributes(3, b=2) == [2, 5, 8]
    assert halves[with_attributes(3, a=1), :8].unique(dim=0).shape[0] == 1
    assert halves[with_attributes(3, b=2), 8:].unique(dim=0).shape[0] == 1
    assert mixture.means.flatten(1).unique(dim=0).shape[0] == 9


def test_topics_lie_as_far_apart_as_asked_and_hold_the_components_in_order():
    mixture = GaussianMixture.topics(2, 400, (1, 4, 4), distance=45.0)
    first, second = mixture.means[:200], mixture.means[200:]
    assert float((first.mean(0) - second.mean(0)).norm()) == pytest.approx(45.0, rel=0.02)
    assert float(first.std(dim=0).mean()) == pytest.approx(1.0, rel=0.05)
    with pytest.raises(ValueError, match="evenly"):
        GaussianMixture.topics(2, 5, (1, 4, 4), distance=45.0)
