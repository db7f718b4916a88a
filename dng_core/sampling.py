"""Algorithm 1 of Koulischer et al. (2025): DDPM ancestral sampling with negative guidance, over any two denoisers."""

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .guidance import HELD, Guidance, Probed
from .kernels import ReverseKernel

Predictor = Callable[[Tensor, float], tuple[Tensor, Sequence[Tensor]]]
"""(state, sigma) -> (reference, [negative, ...]): the reference's denoised prediction, and one prediction for each
undesired concept. The list is empty for unguided sampling."""


def ddpm_sample(
    predict: Predictor,
    noise: Tensor,
    sigmas: Sequence[float],
    guidance: Guidance | None = None,
    generator: torch.Generator | None = None,
    variance: Literal["posterior", "forward"] = "posterior",
    between: Predictor | None = None,
) -> Tensor:
    """Draw samples by the ancestral chain over ``sigmas``.

    Parameters
    ----------
    predict: the denoisers, for states in the VE frame, x = x_0 + sigma n. Without guidance its second result is not
        used.
    noise: (batch, ...), standard normal; the chain starts from noise * sqrt(1 + sigma^2), DDPM's own start.
    sigmas: noise levels, falling, above 0 (see :func:`~dng_core.schedules.ddpm_sigmas`, ``karras_sigmas``).
    guidance: made for this run; None for unguided samples. Its economy decides which steps need the undesired.
    generator: draws the chain's noise on the CPU, so that a seed means the same on every device and whatever the
        guidance.
    variance: of the noise added: "posterior" is beta-tilde, the exact kernel's; "forward" is beta, as in the
        authors' code. No noise is added after the last level.
    between: the denoisers for steps at which no undesired prediction is needed, and whose second result is not used;
        None for ``predict``.

    Returns
    -------
    (batch, ...): the denoised prediction at the last level.
    """
    if not sigmas or any(b >= a for a, b in itertools.pairwise(sigmas)) or sigmas[-1] <= 0:
        raise ValueError("sigmas must be falling noise levels above 0")
    if variance not in ("posterior", "forward"):
        raise ValueError(f"variance must be 'posterior' or 'forward', not {variance!r}")

    x = noise * (1 + sigmas[0] ** 2) ** 0.5
    denoised = x
    for i, sigma in enumerate(sigmas):
        # Predict.
        looks = guidance.looks(sigma) if guidance else []
        reference, negatives = (predict if any(looks) or between is None else between)(x, sigma)

        # Update p(c-|x), and push.
        denoised = reference
        if guidance:
            probe = guidance.probe(x, sigma) if any(looks) else None
            probed = Probed(probe, *predict(probe.x, sigma)) if probe else None
            seen = negatives if any(looks) else [HELD] * len(looks)
            denoised = guidance(x, sigma, reference, reference, seen, probed)

        # Take the ancestral step.
        if i + 1 < len(sigmas):
            kernel = ReverseKernel(sigma, sigmas[i + 1])
            spread = (kernel.variance if variance == "posterior" else kernel.forward_variance) ** 0.5
            step_noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            x = kernel.mean(x, denoised) + spread * step_noise
    return denoised
