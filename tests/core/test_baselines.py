"""The baselines of the literature: their equations written out, and on the exact mixture what their papers claim."""

import math

import pytest
import torch

from dng_core.baselines import (
    ConceptRemoval,
    ConceptRemovalRun,
    ContrastiveCFG,
    NegativePrompting,
    NormalizedAttention,
    PerpNeg,
    contrastive_direction,
    normalized_attention,
    perp_neg,
)
from dng_core.methods import METHODS, STUDIED, MethodSettings, guidance_by
from dng_core.oracle import GaussianMixture
from dng_core.sampling import ddpm_sample
from dng_core.schedules import DDPMSchedule, karras_sigmas


def tensors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_contrastive_cfg_is_its_equation_in_noise_predictions():
    """eps_u + w (eps_p - eps_u) - g 2 e^(-tau r^2) / (1 + e^(-tau r^2)) (eps_n - eps_u), r^2 = |eps_n - eps_u|^2."""
    x, eps_p, eps_n, eps_u = tensors(4, 3, 2, 2, 2) * 0.7
    sigma, w, g, tau = 1.7, 3.0, 2.5, 0.3
    weights = []
    for n, u in zip(eps_n, eps_u, strict=True):
        far = math.exp(-tau * float(((n - u) ** 2).sum()))
        weights.append(2 * far / (1 + far))
    weight = torch.tensor(weights, dtype=torch.float64).view(3, 1, 1, 1)
    eps = eps_u + w * (eps_p - eps_u) - g * weight * (eps_n - eps_u)
    positive, negative, empty = (x - sigma * e for e in (eps_p, eps_n, eps_u))
    guidance = guidance_by([ContrastiveCFG(g, tau)])
    found = guidance(x, sigma, empty + w * (positive - empty), empty, [negative])
    torch.testing.assert_close(found, x - sigma * eps, rtol=1e-12, atol=1e-12)
    assert 0.01 < min(weights) < max(weights) < 0.9  # none of them is all or nothing


def test_contrastive_cfg_without_tau_is_negative_prompting():
    x, base, reference, negative = tensors(4, 2, 5)
    ours, theirs = (guidance_by([s]) for s in (ContrastiveCFG(1.5, tau=0.0), NegativePrompting(1.5)))
    for sigma in (math.inf, 3.0):
        torch.testing.assert_close(*(g(x, sigma, base, reference, [negative]) for g in (ours, theirs)))
    assert not contrastive_direction(negative, 0.0, 0.2).any()


def test_contrastive_cfg_removes_and_does_not_distort_what_negative_prompting_throws_away():
    """Its paper's claims: what is avoided goes, and samples that are not of it stay where the model draws them.

    Negative prompting pushes them without bound. Distances are to the nearest mean, whose own samples lie at 0.3.
    """
    mixture, sigmas = GaussianMixture.random(5, (4,)), karras_sigmas(30, 0.05, 20.0)
    noise = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))

    def left_and_distance(settings: MethodSettings) -> tuple[float, float]:
        guidance = guidance_by([settings])

        def denoise(x, sigma):
            reference = mixture.denoised(x, sigma)
            return guidance(x, sigma, reference, reference, [mixture.denoised(x, sigma, [0])]), []

        drawn = ddpm_sample(denoise, noise, sigmas, generator=torch.Generator().manual_seed(1))
        classes = mixture.classify(drawn)
        return float((classes == 0).float().mean()), float(mixture.distance(drawn)[classes != 0].median())

    assert left_and_distance(NegativePrompting(0.0))[0] > 0.15
    left, distance = left_and_distance(ContrastiveCFG(2.0))
    assert left <= 0.01 and distance < 0.5
    left, distance = left_and_distance(NegativePrompting(2.0))
    assert left <= 0.01 and distance > 5


def test_contrastive_cfg_hardly_pushes_an_image_that_is_far_from_the_concept():
    """The other claim: the negative term fades where an image has nothing of the concept."""
    mixture = GaussianMixture.random(5, (4,))
    at_others = mixture.means[1:]
    for sigma, most in ((0.5, 0.05), (0.25, 1e-3)):
        difference = mixture.denoised(at_others, sigma, [0]) - mixture.denoised(at_others, sigma)
        weights = contrastive_direction(difference, sigma, 0.2).norm(dim=1) / difference.norm(dim=1)
        assert float(weights.max()) < most


def test_perp_neg_pushes_across_the_prompts_direction_alone():
    positive, negative, empty = tensors(3, 4, 2, 3, 3)
    p, n = (positive - empty).flatten(1), (negative - empty).flatten(1)
    found = (perp_neg(positive, negative, empty, cfg=3.0, scale=1.5) - empty).flatten(1)
    torch.testing.assert_close((found * p).sum(dim=1), 3 * (p * p).sum(dim=1))  # along p: classifier-free guidance
    across = n - ((n * p).sum(dim=1) / (p * p).sum(dim=1))[:, None] * p
    torch.testing.assert_close(found, 3 * (p - 1.5 * across))
    alone = [perp_neg(*(t[i : i + 1] for t in (positive, negative, empty)), 3.0, 1.5) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), perp_neg(positive, negative, empty, 3.0, 1.5))


def test_concept_removal_is_its_equations_in_ddpms_noise_predictions():
    """Two steps of DDPM's linear chain, t = 800 and 500, with the chain's own alpha, beta and alpha-bar."""
    schedule, threshold, scale = DDPMSchedule.named("linear"), -3.0, 1.7
    run, earlier = ConceptRemovalRun(ConceptRemoval(scale, threshold)), torch.zeros(3, dtype=torch.float64)
    for t, following, seed in ((800, 500, 0), (500, None, 1)):
        x, eps_p, eps_n, eps_u = tensors(4, 3, 2, 2, 2, seed=seed)
        nearness = ((eps_p - eps_u) ** 2 - (eps_p - eps_n) ** 2).flatten(1).sum(1)
        excess = (nearness / 2 + earlier - threshold).clamp(min=0)
        weight = excess / ((eps_n - eps_u) ** 2).flatten(1).sum(1)
        assert int((weight > 0).sum()) > 0
        eps = eps_p - scale * weight.view(3, 1, 1, 1) * (eps_n - eps_u)
        sigma = float(schedule.sigmas[t])
        positive, negative, empty = (x - sigma * e for e in (eps_p, eps_n, eps_u))
        found = positive - run.push(positive, negative, empty, sigma)
        torch.testing.assert_close(found, x - sigma * eps, rtol=1e-10, atol=1e-10)
        if following is not None:
            alpha_bar = float(schedule.alpha_bars[t])
            alpha = alpha_bar / float(schedule.alpha_bars[following])
            earlier = earlier + (1 - alpha) / (2 * alpha * (1 - alpha_bar)) * nearness


def test_concept_removal_at_scale_1_brings_the_presence_down_to_the_threshold_and_leaves_what_is_below_alone():
    positive, negative, empty = tensors(3, 8, 2, 3, 3, seed=2)
    threshold, sigma = 1.0, 2.0

    def presence(prediction):
        near = (prediction - empty) ** 2 - (prediction - negative) ** 2
        return near.flatten(1).sum(1) / sigma**2 / 2

    before = presence(positive)
    assert bool((before > threshold).any() and (before < threshold).any())
    push = ConceptRemovalRun(ConceptRemoval(1.0, threshold)).push(positive, negative, empty, sigma)
    torch.testing.assert_close(presence(positive - push), before.clamp(max=threshold))
    assert not push[before < threshold].any()


def test_perp_neg_without_a_prompt_has_no_direction_to_spare():
    empty, negative = tensors(2, 2, 5)
    torch.testing.assert_close(perp_neg(empty, negative, empty, 3.0, 1.0), empty - 3 * (negative - empty))


def test_normalized_attention_is_its_equations_position_by_position():
    """z = z+ + s (z+ - z-); z min(1, tau |z+| / |z|) with L1 norms over the width; then the mean with z+ by alpha."""
    positive, negative = tensors(2, 2, 5, 4)
    negative[0] = positive[0] + 0.01 * negative[0]  # a push too small to be shortened
    found = normalized_attention(positive, negative, NormalizedAttention(2.0, tau=1.3, alpha=0.25))
    shortened = 0
    for image in range(2):
        for position in range(5):
            plus, minus = positive[image, position], negative[image, position]
            z = plus + 2.0 * (plus - minus)
            share = min(1.0, 1.3 * float(plus.abs().sum()) / float(z.abs().sum()))
            shortened += share < 1
            torch.testing.assert_close(found[image, position], 0.25 * share * z + 0.75 * plus)
    assert 0 < shortened < 10
    off = normalized_attention(positive, negative, NormalizedAttention(0.0))
    torch.testing.assert_close(off, positive)
    nothing = torch.zeros_like(positive)
    assert bool((normalized_attention(nothing, nothing, NormalizedAttention()) == 0).all())


def test_the_studies_have_the_nodes_methods_and_more():
    assert METHODS.items() <= STUDIED.items() and STUDIED["contrastive_cfg"] is ContrastiveCFG
    assert all(name == kind.method for name, kind in STUDIED.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContrastiveCFG(-1.0), "guidance_scale must be at least 0 and finite; it is -1"),
        (lambda: ContrastiveCFG(tau=-0.1), "tau must be at least 0 and finite"),
        (lambda: ContrastiveCFG(tau=math.inf), "tau must be at least 0 and finite"),
        (lambda: ContrastiveCFG(tau=math.nan), "tau is not a number"),
        (lambda: PerpNeg(math.inf), "guidance_scale must be at least 0 and finite"),
        (lambda: PerpNeg(math.nan), "guidance_scale is not a number"),
        (lambda: ConceptRemoval(-1.0), "guidance_scale must be at least 0 and finite"),
        (lambda: ConceptRemoval(threshold=math.inf), "threshold must be finite"),
        (lambda: NormalizedAttention(-1.0), "guidance_scale must be at least 0 and finite"),
        (lambda: NormalizedAttention(tau=0.5), "tau must be at least 1 and finite"),
        (lambda: NormalizedAttention(alpha=1.5), "alpha must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
