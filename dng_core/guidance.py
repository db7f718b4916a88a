"""How predictions are combined: classifier-free guidance, DNG, negative prompting and Safe Latent Diffusion.

All predictions are denoised ones (estimates of x_0), (batch, ...). Every method pushes the base prediction away along
a direction by a scale, and :func:`combine` is the one place where that is done.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .divergence import Probe, Prober
from .kernels import VE, NoiseFrame, at_least_float32, per_image
from .posterior import NoiseFraction, PosteriorTracker
from .schedules import DDPMSchedule, IntegratedOffset
from .settings import Settings


def _finite(negative: Tensor | None, reference: Tensor) -> Tensor | None:
    """A copy of ``negative``, the reference where it is NaN or infinite (half precision overflows): no push there."""
    return None if negative is None else torch.where(negative.isfinite(), negative, reference)


def classifier_free_guidance(positive: Tensor, unconditional: Tensor, cfg: float) -> Tensor:
    """D_u + w (D_pos - D_u) (Ho & Salimans 2022)."""
    return unconditional + cfg * (positive - unconditional)


def combine(base: Tensor, directions: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """base - sum_i scale_i direction_i, for scales of shape (batch,); in the base's dtype."""
    guided = at_least_float32(base)
    for direction, scale in zip(directions, scales, strict=True):
        guided = guided - per_image(scale, base) * direction
    return guided.to(base.dtype)


def dynamic_scales(log_posteriors: Sequence[Tensor], settings: Sequence[Settings]) -> list[Tensor]:
    """lambda_i = lambda_0i p_i / (1 - sum_j p_j), capped at each concept's ``max_scale``; (batch,) each.

    For one concept this is the paper's eq. 8, lambda_0 p / (1 - p). Several concepts exclude one another: their
    posteriors are rescaled together where their sum exceeds the largest ``p_max``.
    """
    logs = torch.stack(list(log_posteriors))
    limit = math.log(max(s.p_max for s in settings))
    logs = logs - (logs.logsumexp(dim=0) - limit).clamp(min=0)
    absent = -torch.expm1(logs.logsumexp(dim=0))
    return [
        (s.guidance_scale * log.exp() / absent).clamp(max=s.max_scale) for s, log in zip(settings, logs, strict=True)
    ]


def safe_latent_direction(
    difference: Tensor, sigma: float, momentum: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Safe Latent Diffusion's direction (Schramowski et al. 2023, eq. 4 to 8) and its new momentum.

    With d = eps - eps(c-) = (D_neg - D_ref) / sigma: mask = min(1, s_s |d|) where d < threshold, else 0;
    g = -mask d + s_m m; m <- beta_m m + (1 - beta_m) g. The noise prediction moves by -lambda g, so the denoised one
    by lambda sigma g, and the direction is -sigma g.

    Parameters
    ----------
    difference: D_neg - D_ref, (batch, ...).
    sigma: the VE noise level; at infinite noise the direction is zero.
    momentum: m, of the same shape.
    """
    if math.isinf(sigma):
        return torch.zeros_like(difference), momentum
    d = difference / sigma
    mask = (settings.sld_warmup_scale * d.abs()).clamp(max=1) * (d < settings.sld_threshold)
    g = -mask * d + settings.sld_momentum_scale * momentum
    decay = settings.sld_momentum_decay
    return -sigma * g, decay * momentum + (1 - decay) * g


@dataclass(frozen=True)
class Trace:
    """What guidance did over one run.

    ``sigmas``: (steps,) VE noise levels, falling. ``posterior`` and ``scale``: (steps, concepts, batch).
    ``log_posterior``: (concepts, batch), where the sampler stopped, if that was told; a later run may go on from it.
    All float32 on the CPU.
    """

    sigmas: Tensor
    posterior: Tensor
    scale: Tensor
    log_posterior: Tensor | None = None

    def then(self, later: "Trace") -> "Trace":
        """This run and the one that went on from it, as one."""
        runs = [run for run in (self, later) if len(run.sigmas)] or [later]
        return Trace(
            sigmas=torch.cat([run.sigmas for run in runs]),
            posterior=torch.cat([run.posterior for run in runs]),
            scale=torch.cat([run.scale for run in runs]),
            log_posterior=later.log_posterior,
        )


class NegativeGuidance:
    """Guides one sampling run away from one or more undesired concepts. Make a new one for every run.

    Parameters
    ----------
    settings: one for each concept.
    chain: the model's training chain, over which offsets are integrated; DDPM's linear one where the model has none.
    frame: the frame of the states and levels that calls will bring.
    levels: the sampler's schedule, falling; None for adaptive samplers.
    weight: broadcastable to the state, 0 where elements do not follow the chain (outside an inpainting mask).
    log_priors: (batch,) start values for each concept, in place of their priors.
    noise_fraction, trial_points: see :class:`~dng_core.posterior.PosteriorTracker`.
    seed: of the probes of concepts with the rule "probe".

    With the rule "probe", a sampler asks :meth:`probe` before each call and hands over what it evaluated there:
    ``guidance(x, sigma, base, reference, negatives, probed=(probe, probed_reference, probed_negatives))``.
    """

    tracker_type = PosteriorTracker

    def __init__(
        self,
        settings: Sequence[Settings],
        chain: DDPMSchedule | None = None,
        frame: NoiseFrame = VE,
        levels: Sequence[float] | None = None,
        weight: Tensor | None = None,
        log_priors: Sequence[Tensor] | Tensor | None = None,
        noise_fraction: NoiseFraction | None = None,
        trial_points: bool = False,
        seed: int = 0,
    ) -> None:
        if not settings:
            raise ValueError("negative guidance needs the settings of at least one concept")
        if sum(s.prior for s in settings) >= 1:
            raise ValueError("the priors of all concepts together must stay below 1; lower some of them")
        integrated = IntegratedOffset(chain or DDPMSchedule.named("linear"))
        self.settings = tuple(settings)
        self.frame = frame
        self.trackers = [
            self.tracker_type(
                s,
                integrated,
                frame,
                levels,
                weight,
                log_prior=None if log_priors is None else log_priors[i],
                noise_fraction=noise_fraction,
                trial_points=trial_points,
            )
            for i, s in enumerate(self.settings)
        ]
        self._momenta: list[Tensor | None] = [None] * len(self.settings)
        self._gaps: list[Tensor | None] = [None] * len(self.settings)
        self._ignored: Tensor | None = None
        self._prober = Prober(frame, seed, weight)

    def probe(self, state: Tensor, level: float) -> Probe | None:
        """Where to evaluate the reference and the concepts that ask for it once more; None where not needed."""
        if not any(s.rule == "probe" for s in self.settings):
            return None
        return self._prober.next(state, level)

    def __call__(
        self,
        state: Tensor,
        level: float,
        base: Tensor,
        reference: Tensor,
        negatives: Sequence[Tensor | None],
        probed: tuple[Probe, Tensor, Sequence[Tensor | None]] | None = None,
    ) -> Tensor:
        """The guided denoised prediction at ``state`` (batch, ...) of noise ``level``, in the base's dtype.

        Parameters
        ----------
        base: what the sampler would use without guidance.
        reference: the prediction that the undesired ones are compared with; often the base itself.
        negatives: the prediction under each undesired concept; None where a concept does not apply at this noise
            level, so that it neither pushes nor moves its posterior.
        probed: what :meth:`probe` gave, and the reference and the negatives there (None where not evaluated).
        """
        if len(negatives) != len(self.settings):
            raise ValueError(f"{len(self.settings)} concepts were set up but {len(negatives)} predictions given")
        for negative in negatives:
            if negative is not None:
                bad = (~negative.isfinite()).any()
                self._ignored = bad if self._ignored is None else self._ignored | bad
        negatives = [_finite(negative, reference) for negative in negatives]
        if probed is not None:
            self._update_gaps(reference, negatives, *probed)
        log_posteriors = [
            tracker.log_posterior(state, level, None if negative is None else (negative, reference), gap)
            for tracker, negative, gap in zip(self.trackers, negatives, self._gaps, strict=True)
        ]
        dynamic = dynamic_scales(log_posteriors, self.settings)

        reference = at_least_float32(reference)
        state = at_least_float32(state).clone()
        directions, scales = [], []
        for i, (tracker, negative) in enumerate(zip(self.trackers, negatives, strict=True)):
            if negative is None:
                tracker.anchor(state, level, None, reference, log_posteriors[i], torch.zeros_like(dynamic[i]))
                continue
            negative = at_least_float32(negative)
            scale = dynamic[i]
            if self.settings[i].method != "dng":
                scale = torch.full_like(scale, self.settings[i].guidance_scale)
            tracker.anchor(state, level, negative, reference.clone(), log_posteriors[i], scale, self._gaps[i])
            directions.append(self._direction(i, negative - reference, level))
            scales.append(scale)
        guided = combine(base, directions, scales)
        kept = at_least_float32(guided).clone()
        for tracker in self.trackers:
            tracker.moves_towards(kept)
        return guided

    def _update_gaps(
        self,
        reference: Tensor,
        negatives: Sequence[Tensor | None],
        probe: Probe,
        probed_reference: Tensor,
        probed_negatives: Sequence[Tensor | None],
    ) -> None:
        for i, (negative, there) in enumerate(zip(negatives, probed_negatives, strict=True)):
            there = _finite(there, probed_reference)
            if negative is not None and there is not None:
                gap = probe.covariance_gap(negative - reference, there - probed_reference)
                self._gaps[i] = torch.where(gap.isfinite(), gap, torch.zeros_like(gap))

    def _direction(self, i: int, difference: Tensor, level: float) -> Tensor:
        if self.settings[i].method != "safe_latent_diffusion":
            return difference
        momentum = self._momenta[i]
        if momentum is None or momentum.shape != difference.shape:
            momentum = torch.zeros_like(difference)
        sigma = self.frame.sigma(level)
        direction, self._momenta[i] = safe_latent_direction(difference, sigma, momentum, self.settings[i])
        return direction

    def ignored(self) -> bool:
        """Whether an undesired prediction held NaN or infinite values, which do not push. Waits for the device."""
        return self._ignored is not None and bool(self._ignored)

    def trace(self, end: tuple[Tensor, float] | None = None) -> Trace:
        """What was tracked so far; empty if nothing was. Waits for the device: call it after the run.

        ``end``: the state (batch, ...) and the noise level where the sampler stopped. With it, the run is over. The
        jump there is counted by Algorithm 2, whatever the sampler: other rules need the predictions at its end too.
        """
        chains = [list(tracker.anchors) for tracker in self.trackers]
        final = torch.stack([t.log_posterior(*end) for t in self.trackers]).float().cpu() if end else None
        if not chains[0]:
            nothing = torch.zeros(0, len(chains), 0)
            return Trace(torch.zeros(0), nothing, nothing, final)
        return Trace(
            sigmas=torch.tensor([self.frame.sigma(anchor.level) for anchor in chains[0]]),
            posterior=torch.stack([torch.stack([a.log_posterior for a in c]) for c in chains], 1).exp().float().cpu(),
            scale=torch.stack([torch.stack([a.scale for a in c]) for c in chains], 1).float().cpu(),
            log_posterior=final,
        )
