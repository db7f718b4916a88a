"""The methods that DNG is compared with. None of them tracks a posterior.

Negative prompting and Safe Latent Diffusion push with a constant scale, whatever the image shows. Contrastive CFG
pushes less the farther the two predictions are apart. Perp-Neg pushes across the direction of the prompt, and Concept
Removal Guidance as far as the prompt's prediction is near the undesired one: both need the prompt's prediction.
Normalized Attention Guidance pushes inside the network. So these three (:func:`perp_neg`, :class:`ConceptRemovalRun`,
:func:`normalized_attention`) are no :class:`BaselineGuidance`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .economy import Economy
from .guidance import Guidance, Negatives, Probed, combine
from .kernels import ReverseKernel, per_image
from .settings import check, check_numbers


@dataclass(frozen=True)
class NegativePrompting:
    """The settings of negative prompting: D = base - lambda_0 (D_neg - D_ref).

    Parameters
    ----------
    guidance_scale: lambda_0, at least 0; 0 switches guidance off.
    """

    method: ClassVar[str] = "negative_prompting"
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "guidance_scale", 0 <= self.guidance_scale < math.inf, "at least 0 and finite")


@dataclass(frozen=True)
class SafeLatentDiffusion:
    """The settings of Safe Latent Diffusion (Schramowski et al. 2023), by default as in the DNG authors' comparison.

    Parameters
    ----------
    guidance_scale: lambda, at least 0; 0 switches guidance off.
    threshold: elements of eps - eps(c-) that are not below it are not pushed.
    warmup_scale: s_s, at least 0: how fast the mask rises to 1 with the size of the difference.
    momentum_scale: s_m.
    momentum_decay: beta_m, at least 0 and less than 1.
    """

    method: ClassVar[str] = "safe_latent_diffusion"
    guidance_scale: float = 1.0
    threshold: float = 0.04
    warmup_scale: float = 100.0
    momentum_scale: float = 0.2
    momentum_decay: float = 0.1

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "guidance_scale", 0 <= self.guidance_scale < math.inf, "at least 0 and finite")
        check(self, "warmup_scale", 0 <= self.warmup_scale < math.inf, "at least 0 and finite")
        check(self, "momentum_scale", math.isfinite(self.momentum_scale), "finite")
        check(self, "momentum_decay", 0 <= self.momentum_decay < 1, "at least 0 and less than 1")


@dataclass(frozen=True)
class ContrastiveCFG:
    """The settings of Contrastive CFG's negative term (Chang et al., arXiv 2411.17077).

    Parameters
    ----------
    guidance_scale: lambda_0, at least 0; 0 switches guidance off. The authors' code takes that of the prompt.
    tau: at least 0: how fast the push fades with the squared distance of the two noise predictions; 0 is negative
        prompting. The default is that of the authors' code, for Stable Diffusion 1.5.
    """

    method: ClassVar[str] = "contrastive_cfg"
    guidance_scale: float = 1.0
    tau: float = 0.2

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "guidance_scale", 0 <= self.guidance_scale < math.inf, "at least 0 and finite")
        check(self, "tau", 0 <= self.tau < math.inf, "at least 0 and finite")


@dataclass(frozen=True)
class PerpNeg:
    """The settings of :func:`perp_neg`.

    Parameters
    ----------
    guidance_scale: at least 0: how many times the part across the prompt's direction is taken away.
    """

    method: ClassVar[str] = "perp_neg"
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "guidance_scale", 0 <= self.guidance_scale < math.inf, "at least 0 and finite")


@dataclass(frozen=True)
class ConceptRemoval:
    """The settings of :class:`ConceptRemovalRun`.

    Parameters
    ----------
    guidance_scale: lambda_0, at least 0; 1 brings the presence of the concept down to the threshold.
    threshold: the presence, in nats, up to which nothing is pushed; a choice, since the paper's is not known here.
    """

    method: ClassVar[str] = "concept_removal"
    guidance_scale: float = 1.0
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "guidance_scale", 0 <= self.guidance_scale < math.inf, "at least 0 and finite")
        check(self, "threshold", math.isfinite(self.threshold), "finite")


@dataclass(frozen=True)
class NormalizedAttention:
    """The settings of :func:`normalized_attention`, by default those of ComfyUI's node.

    Parameters
    ----------
    guidance_scale: the paper's, at least 0; 0 switches guidance off. ComfyUI's ``nag_scale`` is more by 1.
    tau: at least 1: the longest that an output may become, in lengths of the unguided one.
    alpha: 0 .. 1: the share of the guided output in what is used.
    """

    method: ClassVar[str] = "normalized_attention"
    guidance_scale: float = 4.0
    tau: float = 1.5
    alpha: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "guidance_scale", 0 <= self.guidance_scale < math.inf, "at least 0 and finite")
        check(self, "tau", 1 <= self.tau < math.inf, "at least 1 and finite")
        check(self, "alpha", 0 <= self.alpha <= 1, "between 0 and 1")


Baseline = NegativePrompting | SafeLatentDiffusion | ContrastiveCFG


def safe_latent_direction(
    difference: Tensor, sigma: float, momentum: Tensor, settings: SafeLatentDiffusion
) -> tuple[Tensor, Tensor]:
    """Safe Latent Diffusion's direction (Schramowski et al. 2023, eq. 4 to 8) and its new momentum.

    With d = eps - eps(c-) = (D_neg - D_ref) / sigma: mask = min(1, s_s |d|) where d < threshold, else 0;
    g = -mask d + s_m m; m <- beta_m m + (1 - beta_m) g. The noise prediction moves by -lambda g, so the denoised one
    by lambda sigma g, and the direction is -sigma g.

    Parameters
    ----------
    difference: D_neg - D_ref, (batch, ...).
    sigma: the VE noise level; at infinite noise and at none, the direction is zero.
    momentum: m, of the same shape.
    """
    if sigma == 0 or math.isinf(sigma):
        return torch.zeros_like(difference), momentum
    d = difference / sigma
    mask = (settings.warmup_scale * d.abs()).clamp(max=1) * (d < settings.threshold)
    g = -mask * d + settings.momentum_scale * momentum
    return -sigma * g, settings.momentum_decay * momentum + (1 - settings.momentum_decay) * g


def contrastive_direction(difference: Tensor, sigma: float, tau: float) -> Tensor:
    """Contrastive CFG's direction: the difference times w = 2 e^(-tau r^2) / (1 + e^(-tau r^2)), for each image.

    With r^2 = |eps(c-) - eps|^2 = |D_neg - D_ref|^2 / sigma^2, summed over an image, the noise prediction becomes
    eps - lambda_0 w (eps(c-) - eps) (Chang et al., arXiv 2411.17077, as their published code computes it). So the push
    is that of negative prompting where the predictions agree, and fades where the image is far from the concept. Their
    method weighs the prompt's term too, unless told to leave it to classifier-free guidance; here it is left so.

    Parameters
    ----------
    difference: D_neg - D_ref, (batch, ...).
    sigma: the VE noise level; without noise, the direction is zero.
    """
    if sigma == 0:
        return torch.zeros_like(difference)
    r2 = _noise_energy(difference, sigma)
    return per_image(2 * torch.sigmoid(-tau * r2), difference) * difference


def _noise_energy(difference: Tensor, sigma: float) -> Tensor:
    """|eps - eps'|^2 of each image, (batch,), where the denoised predictions differ by ``difference``."""
    return (difference / sigma).flatten(1).square().sum(dim=1)


def _or_one(length: Tensor) -> Tensor:
    """Lengths to divide by: 1 in the place of 0."""
    return torch.where(length > 0, length, torch.ones_like(length))


def perp_neg(positive: Tensor, negative: Tensor, unconditional: Tensor, cfg: float, scale: float) -> Tensor:
    """Perp-Neg (Armandpour et al., arXiv 2304.04968), as ComfyUI's PerpNegGuider combines denoised predictions.

    With p = D_pos - D_u and n = D_neg - D_u, it gives D_u + cfg (p - scale (n - (n.p / |p|^2) p)): the part of n that
    lies along p does not push. The products are taken for each image. ComfyUI takes them over the whole batch, so that
    its images depend on one another; for one image at a time the two are the same.

    Parameters
    ----------
    positive, negative, unconditional: D_pos, D_neg and D_u, (batch, ...).
    """
    p, n = positive - unconditional, negative - unconditional
    along, length = (n * p).flatten(1).sum(dim=1), p.flatten(1).square().sum(dim=1)
    share = along / _or_one(length)
    across = n - per_image(share, p) * p
    return combine(unconditional + cfg * p, [across], [n.new_full((len(n),), cfg * scale)])


class ConceptRemovalRun:
    """Concept Removal Guidance (Choi et al., arXiv 2606.29801) along one run, which steps down in noise.

    With b = |eps - eps_u|^2 - |eps - eps(c-)|^2, where eps is under the prompt and eps_u under the empty one, the
    presence of the concept is b / 2 and, for each step that went before, beta / (2 alpha (1 - alpha_bar)) b of that
    step. The noise prediction is moved by -w (eps(c-) - eps_u), with w = lambda_0 (presence - threshold) /
    |eps(c-) - eps_u|^2 where the presence is above the threshold, and 0 elsewhere. At lambda_0 = 1 this is the least
    change that brings the presence down to the threshold. (After the abstract, and the equations as a public library
    of guidance methods quotes them; the paper itself could not be had.)
    """

    def __init__(self, settings: ConceptRemoval) -> None:
        self._settings = settings
        self._earlier: float | Tensor = 0.0
        self._last: tuple[float, Tensor] | None = None

    def push(self, positive: Tensor, negative: Tensor, unconditional: Tensor, sigma: float) -> Tensor:
        """What is to be taken from the denoised prediction, (batch, ...), at a VE noise level above 0.

        Parameters
        ----------
        positive, negative, unconditional: D_pos, D_neg and D_u, (batch, ...).
        """
        if self._last is not None:
            before, nearness = self._last
            # beta / (alpha (1 - alpha_bar)) of the step, in the VE frame
            weight = (1 - ReverseKernel(before, sigma).ratio) * (1 + before**2) / (1 + sigma**2)
            self._earlier = self._earlier + weight / 2 * nearness
        nearness = _noise_energy(positive - unconditional, sigma) - _noise_energy(positive - negative, sigma)
        self._last = sigma, nearness
        direction = negative - unconditional
        excess = (nearness / 2 + self._earlier - self._settings.threshold).clamp(min=0)
        share = excess / _or_one(_noise_energy(direction, sigma))
        return per_image(self._settings.guidance_scale * share, direction) * direction


def normalized_attention(positive: Tensor, negative: Tensor, settings: NormalizedAttention) -> Tensor:
    """Normalized Attention Guidance (Chen et al., arXiv 2505.21179) of an attention layer's outputs.

    With z+ and z- under the two prompts, z = z+ + scale (z+ - z-). Where its L1 norm exceeds tau times that of z+, it
    is shortened to that. What is used is alpha z + (1 - alpha) z+.

    Parameters
    ----------
    positive, negative: z+ and z-, (batch, positions, width); the norms are of a position's width.
    """
    guided = positive + settings.guidance_scale * (positive - negative)
    longest = settings.tau * positive.abs().sum(dim=-1, keepdim=True)
    length = guided.abs().sum(dim=-1, keepdim=True)
    shortened = guided * (longest / _or_one(length)).clamp(max=1)
    return settings.alpha * shortened + (1 - settings.alpha) * positive


class BaselineGuidance(Guidance):
    """Guides away from one or more undesired concepts by baselines, each with settings of its own.

    Between calls it keeps the momenta of Safe Latent Diffusion. It tracks no posterior, and so gives no trace, and
    no image sleeps: of ``economies`` only those count that look once in so many calls.
    """

    def __init__(self, settings: Sequence[Baseline], economies: Sequence[Economy] | None = None) -> None:
        super().__init__(len(settings), economies)
        self._settings = tuple(settings)
        self._momenta: list[Tensor | None] = [None] * len(settings)

    def guided(
        self,
        x: Tensor,
        sigma: float,
        base: Tensor,
        reference: Tensor,
        negatives: Negatives,
        held: Sequence[Tensor | None],
        probed: Probed | None,
    ) -> Tensor:
        directions, scales = [], []
        for i, (negative, difference) in enumerate(zip(negatives, held, strict=True)):
            if negative is not None:
                difference = negative - reference
            if difference is not None:
                directions.append(self._direction(i, difference, sigma))
                scales.append(difference.new_full((len(difference),), self._settings[i].guidance_scale))
        return combine(base, directions, scales)

    def _direction(self, i: int, difference: Tensor, sigma: float) -> Tensor:
        settings, momentum = self._settings[i], self._momenta[i]
        if isinstance(settings, NegativePrompting):
            return difference
        if isinstance(settings, ContrastiveCFG):
            return contrastive_direction(difference, sigma, settings.tau)
        if momentum is None or momentum.shape != difference.shape:
            momentum = torch.zeros_like(difference)
        direction, self._momenta[i] = safe_latent_direction(difference, sigma, momentum, settings)
        return direction
