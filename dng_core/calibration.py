"""Calibration: temperature and drift of a model, measured on its own unguided images, without labels.

On exact predictions Algorithm 2 is right with temperature 1 and no drift. The two predictions of a trained network
also disagree by their errors, and those errors count as evidence: the posterior then moves too fast, and sinks. Both
can be measured, because p_t = p(c-|x_t) is a *martingale* along the reference's own chain: given the state at some
step, the expectation of p at every later step is what p is now (p is the conditional probability of one fixed event).
Two conditions follow, and neither needs to know what an image shows:

1. *Level.* The mean of p over unguided images does not change from step to step. It fixes the drift, in nats per jump.
2. *Unit.* The regression of a later p on an earlier one has slope 1. Where the temperature is too high, p is
   overconfident, early values are taken back later, and the slope is below 1; where it is too low, it is above 1.

A finite number of images satisfies neither condition exactly, also where the model is exact. So exact settings are
what is assumed, and each parameter departs from them only as far as the images show beyond their own sampling error.

Tensors of evidence are (jumps, concepts, batch), in nats. A *jump* leads from one noise level of a run to the next.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .guidance import NegativeGuidance
from .kernels import ReverseKernel
from .posterior import advance, drift_along, drift_evidence
from .settings import Settings, check, check_numbers

FEWEST_IMAGES = 8
"""With fewer images than this, sampling error hides all that a calibration could find: a choice."""

FEWEST_STEPS = 8
"""A run of fewer steps has too few noise levels for a curve: a choice."""

OCTAVE = 2.0
"""The drift is one number for each fall of sigma by this factor. On the MNIST network a factor of 4 is too coarse
(cross entropy of the posterior at sigma 0.65: 0.14 in place of 0.12)."""

DRIFT_ERRORS = 2.0
"""A drift that is not this many standard errors away from 0 is taken as 0, and a larger one is shrunk accordingly. The
drift of the MNIST network is 5 to 15 standard errors in each octave, with 64 images of ten classes."""

SLOPE_ERRORS = 0.5
"""The temperature departs from 1 until the slope is within this many standard errors of 1. With 64 images of eight
alternatives of the oracle, it is then within 0.9 to 1.1 in 23 of 24 runs (30, 100 and 400 Karras steps, eight seeds;
with 0 in 20, with 1 in 23). On the MNIST network it is 0.71 (with 1: 0.77), and the cross entropy at sigma 0.65 on
other images is 0.160 (0.161), of digits that were left out 0.167 (0.175). With 0 it would be 0.08 in place of 0.5 on
the CIFAR-10 network, whose slope hardly depends on it below 0.5."""

OPEN = 0.15
"""The drift ends where the mean of p (1 - p) has fallen to this share of its first value. Most images are decided
there. A mean that changes later is that of few images, which an upward drift of all cannot mend."""

LEARNED = 0.05
"""The drift also ends at the first octave, after the first that taught something, in which the mean of p (1 - p) falls
by less than this share of its first value: what comes there is fine detail, of which a trained network's predictions
tell nothing more. On the MNIST network the shares of the digits are right at that level, and no longer below."""

EARLY, LATE = 0.1, 0.6
"""The slope is taken from the steps at which the variance of p is between these shares of its last value. Before,
nothing is known yet, and after, the slope is near 1 in any case."""

TEMPERATURES = (0.05, 2.0)
"""Where a temperature is looked for. The smallest in the paper is 0.2."""

BISECTIONS = 12
"""Halvings of the range of log temperatures: down to 0.1 %."""

MOST_DRIFT = 10.0
"""The most nats of drift that an octave is given. The MNIST network needs 0.8."""

SHARE_ROUNDS = 3
"""How often the shares of alternatives are read off and put in place of equal shares: a choice."""

CERTAIN, MOST_TOGETHER, FEWEST_TOGETHER = 0.7, 0.08, 2
"""Alternatives of which this share of the images, and this many, show two with a posterior above the first number are
none. On the oracle it is at most 0.02 of 64 images for alternatives (30 to 200 steps), and 0.14 to 0.34 for pairs of
which a quarter of the images show both."""

SMALL_DRIFT = 0.3
"""Less drift than this is not worth words: it changes p by a third."""

FIT = Settings(prior=0.5, p_min=1e-6, p_max=1 - 1e-9)
"""The bounds of p while the conditions are evaluated. A p_max of 0.99 alone would lower the mean of p."""


@dataclass(frozen=True)
class Evidence:
    """What an unguided run showed of one concept.

    ``increments``: (jumps, batch), what each jump said at temperature 1 and without offset or drift, in nats.
    ``energies``: (jumps, batch), of the same jumps (:func:`~.evidence.jump_energy`).
    ``sigmas``: the noise levels of the run, falling; one more than there are jumps.
    """

    increments: Tensor
    energies: Tensor
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.increments.ndim != 2 or len(self.sigmas) != len(self.increments) + 1:
            raise ValueError("evidence must be (jumps, batch), with one noise level more than there are jumps")
        if self.energies.shape != self.increments.shape:
            raise ValueError("there must be an energy for each of the evidence's jumps and images")

    @property
    def kernels(self) -> list[ReverseKernel]:
        """The jumps' kernels."""
        return [ReverseKernel(start, end) for start, end in pairwise(self.sigmas)]


def evidence_of(guidance: NegativeGuidance) -> list[Evidence]:
    """What a run showed of each of its concepts, on the CPU in float64; waits for the device.

    Only a run whose guidance scales are 0 was the reference's own chain; ValueError for any other. Of its settings
    only the rule counts.
    """
    if any(settings.guidance_scale for settings in guidance.settings):
        raise ValueError("only a run without guidance shows what a model draws: set every guidance_scale to 0")
    found = []
    for path in guidance.paths:
        if len(path.points) > 1:
            evidence = torch.stack([point.evidence for point in path.points[1:]])
            still = torch.zeros_like(evidence[0])  # of a jump that says nothing
            energies = torch.stack([still if point.energy is None else point.energy for point in path.points[1:]])
            sigmas = tuple(point.sigma for point in path.points)
            found.append(Evidence(evidence.double().cpu(), energies.double().cpu(), sigmas))
    return found


def track(evidence: Evidence, settings: Settings) -> Tensor:
    """The posterior (steps, batch) that ``settings`` would have tracked along the run, without another evaluation.

    Offsets are left out: their form needs the model's training chain.
    """
    prior = torch.full((evidence.increments.shape[1],), math.log(settings.prior), dtype=torch.float64)
    drifts = [drift_evidence(settings, *jump) for jump in zip(evidence.kernels, evidence.energies, strict=True)]
    return _tracked(prior, evidence.increments, drifts, settings)


def _tracked(log_p: Tensor, increments: Tensor, drifts: Sequence[Tensor | float], settings: Settings) -> Tensor:
    course = [log_p]
    for increment, drift in zip(increments, drifts, strict=True):
        log_p = advance(log_p, increment, settings.temperature, drift, settings)
        course.append(log_p)
    return torch.stack(course).exp()


@dataclass(frozen=True)
class Calibration:
    """What was measured of a model.

    Parameters
    ----------
    temperature: how far evidence counts.
    drift: see :class:`~.settings.Settings`.
    least, most: the temperatures that the images do not exclude (slope within two standard errors of 1).
    images, steps: of the run that was measured.
    """

    temperature: float
    drift: tuple[tuple[float, float], ...]
    least: float
    most: float
    images: int
    steps: int

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self, "temperature", 0 < self.temperature < math.inf, "above 0 and finite")
        check(self, "images", self.images >= FEWEST_IMAGES, f"at least {FEWEST_IMAGES}")
        check(self, "steps", self.steps >= FEWEST_STEPS, f"at least {FEWEST_STEPS}")
        object.__setattr__(self, "drift", Settings(drift=self.drift).drift)

    @property
    def nats(self) -> float:
        """The drift over a whole run."""
        return self.drift[-1][1] if self.drift else 0.0

    @property
    def decided(self) -> float:
        """The noise level at which the images are decided, as far as the model tells; 0 for the end of the run."""
        return self.drift[-1][0] if self.drift else 0.0

    def decided_step(self, sigmas: Sequence[float]) -> int:
        """The number of the step of a run over these noise levels at which its images are decided."""
        return next((i for i, sigma in enumerate(sigmas) if sigma <= self.decided), len(sigmas) - 1)

    def applied(self, settings: Settings) -> Settings:
        """``settings`` with the measured temperature and drift, and no offset."""
        return settings.with_(temperature=self.temperature, drift=self.drift, offset=0.0)


EXACT = Calibration(1.0, (), 1.0, 1.0, FEWEST_IMAGES, FEWEST_STEPS)
"""What an exact model would measure."""


def calibrate(
    evidence: Sequence[Evidence], shares: Sequence[float] | None = None, are_labels: bool = False
) -> Calibration:
    """Temperature and drift of a model, from one unguided run.

    Parameters
    ----------
    evidence: of each concept, along one run.
    shares: the share of the model's images that shows each concept. None says that the concepts are *alternatives*, of
        which each image shows exactly one (classes; day and night): their shares add up to 1, and are measured along.
    are_labels: whether these are a network's labels, which are alternatives by its training. They are then not
        checked: a network that tells two of its labels poorly apart (cats and dogs) is to be calibrated too.

    Raises
    ------
    ValueError: if there are too few images or steps, a value is not finite, a share is not between 0 and 1, there are
        fewer than two alternatives, or many images show several. Images that show none are not noticed.
    """
    increments, sigmas = stacked(evidence)
    jumps, concepts, images = increments.shape
    if images < FEWEST_IMAGES:
        raise ValueError(f"a calibration needs at least {FEWEST_IMAGES} images, not {images}")
    if jumps + 1 < FEWEST_STEPS:
        raise ValueError(f"a calibration needs a run of at least {FEWEST_STEPS} steps, not {jumps + 1}")
    if shares is None and concepts < 2:
        raise ValueError("alternatives are at least two concepts, of which each image shows exactly one")
    if shares is not None and (len(shares) != concepts or not all(0 < share < 1 for share in shares)):
        raise ValueError(f"each of the {concepts} concepts needs a share between 0 and 1, exclusive")
    priors = torch.tensor(shares or [1 / concepts] * concepts, dtype=torch.float64)
    run = _Run(increments, sigmas)
    for _ in range(1 if shares else SHARE_ROUNDS):
        temperature = run.temperature(priors, SLOPE_ERRORS)
        if not shares:
            ends = run.course(priors, temperature)[-1]
            if not are_labels:
                _check_alternatives(ends)
            means = ends.mean(dim=1)
            priors = (means / means.sum()).clamp(min=1 / (2 * images), max=1 - 1 / (2 * images))
    return Calibration(
        temperature,
        run.drift(priors, temperature),
        least=min(run.temperature(priors, 2.0, upper=False), temperature),
        most=max(run.temperature(priors, 2.0, upper=True), temperature),
        images=images,
        steps=jumps + 1,
    )


def _check_alternatives(ends: Tensor) -> None:
    """ValueError where by the posteriors (concepts, batch) at the end many images show two alternatives at once."""
    together = int(((ends > CERTAIN).sum(dim=0) > 1).sum())
    if together >= FEWEST_TOGETHER and together > MOST_TOGETHER * ends.shape[1]:
        raise ValueError(
            f"the concepts are no alternatives, of which each image shows exactly one: {together} of {ends.shape[1]} "
            "images show several; choose others, or give the share of each (in the node, set `shares` to priors)"
        )


def stacked(evidence: Sequence[Evidence]) -> tuple[Tensor, tuple[float, ...]]:
    """Evidence of one run as (jumps, concepts, batch), and the noise levels; ValueError for what cannot be used."""
    if not evidence:
        raise ValueError("there is no evidence to calibrate on: give that of at least one concept")
    shapes = {(e.increments.shape, e.sigmas) for e in evidence}
    if len(shapes) > 1:
        raise ValueError("the concepts' evidence must come from one run, with the same images and noise levels")
    increments = torch.stack([e.increments for e in evidence], dim=1).double()
    if not bool(increments.isfinite().all()):
        first = int((~increments.isfinite()).flatten(1).any(dim=1).nonzero()[0])
        raise ValueError(
            f"the model's predictions are NaN or infinite at step {first + 1} of {len(increments) + 1}, so that there "
            "is nothing to calibrate on; run the model in a higher precision"
        )
    return increments, evidence[0].sigmas


class _Run:
    """The two conditions along one recorded run."""

    def __init__(self, increments: Tensor, sigmas: tuple[float, ...]) -> None:
        self.increments, self.sigmas = increments, sigmas
        self.kernels = [ReverseKernel(start, end) for start, end in pairwise(sigmas)]
        self.octaves = _octaves(sigmas)

    def course(self, priors: Tensor, temperature: float) -> Tensor:
        """p by this temperature and all of its drift, (steps, concepts, batch), to where the images are decided."""
        settings = FIT.with_(temperature=temperature, drift=self.drift(priors, temperature))
        jumps = self.sigmas.index(settings.drift[-1][0]) if len(settings.drift) > 1 else len(self.kernels)
        log_priors = priors.log()[:, None].expand(self.increments.shape[1:])
        drifts = [drift_along(settings, kernel) for kernel in self.kernels[:jumps]]
        return _tracked(log_priors, self.increments[:jumps], drifts, settings)

    def temperature(self, priors: Tensor, errors: float, upper: bool | None = None) -> float:
        """The temperature nearest to 1 at which the slope is within some standard errors of 1 (condition 2).

        ``upper`` asks for an end of the interval in place of the nearest: the highest temperature, or the lowest.
        """

        def above_one(temperature: float, margin: float) -> bool:
            slope, error = _slope(self.course(priors, temperature))
            return slope + margin * error > 1

        least, most = math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1])
        if upper is None:
            if not above_one(1.0, errors):
                margin, most = errors, 0.0
            elif above_one(1.0, -errors):
                margin, least = -errors, 0.0
            else:
                return 1.0
        else:
            margin = errors if upper else -errors
        for _ in range(BISECTIONS):
            middle = (least + most) / 2
            least, most = (middle, most) if above_one(math.exp(middle), margin) else (least, middle)
        return math.exp((least + most) / 2)

    def drift(self, priors: Tensor, temperature: float) -> tuple[tuple[float, float], ...]:
        """The drift that keeps the mean of p, octave by octave (condition 1)."""
        log_p = priors.log()[:, None].expand(self.increments.shape[1:])
        opened = _spread(log_p)
        points, nats = [(_finite_top(self.sigmas), 0.0)], 0.0
        for jumps, shares in self.octaves:
            moved = temperature * self.increments[jumps]

            def after(drift: float, start: Tensor = log_p, moved: Tensor = moved, shares: Tensor = shares) -> Tensor:
                end = start
                for increment, share in zip(moved, shares, strict=True):
                    end = advance(end, increment, 1.0, drift * float(share), FIT)
                return end

            spread = _spread(log_p)
            if spread < OPEN * opened:
                break
            here = _level_drift(log_p, after)
            then = after(here)
            learned = (spread - _spread(then)) / opened
            if learned < LEARNED and spread < (1 - LEARNED) * opened:
                break
            log_p, nats = then, nats + here
            points.append((self.sigmas[jumps.stop], nats))
        return tuple(points)


def _level_drift(log_p: Tensor, after: Callable[[float], Tensor]) -> float:
    """The drift at which the mean of p does not change, shrunk by its sampling error.

    The estimate b, with the standard error e, is shrunk to b (1 - (DRIFT_ERRORS e / b)^2), or to 0: the positive-part
    estimator of James and Stein (1961), for one number.
    """

    def change(drift: float) -> Tensor:
        """Of the sum over the concepts, (batch,): where these are alternatives, it hardly varies."""
        return (after(drift).exp() - log_p.exp()).sum(dim=0)

    without = change(0.0)
    lost, error = -float(without.mean()), float(without.std()) / len(without) ** 0.5
    if abs(lost) <= DRIFT_ERRORS * error or lost == 0:
        return 0.0
    least, most = (0.0, MOST_DRIFT) if lost > 0 else (-MOST_DRIFT, 0.0)
    for _ in range(20):
        middle = (least + most) / 2
        least, most = (middle, most) if float(change(middle).mean()) < 0 else (least, middle)
    return (least + most) / 2 * (1 - (DRIFT_ERRORS * error / lost) ** 2)


def _slope(course: Tensor) -> tuple[float, float]:
    """The slope of the last p on earlier ones, and its standard error, the images being independent.

    Of p, (steps, concepts, batch). The slope and its error are means over the steps from EARLY to LATE. Where no step
    is between them, nothing is known: the slope is 1, with an infinite error.
    """
    centred = course - course.mean(dim=2, keepdim=True)
    variance = centred.square().sum(dim=(1, 2))
    steps = [k for k in range(len(course) - 1) if EARLY * variance[-1] <= variance[k] <= LATE * variance[-1]]
    if not steps:
        return 1.0, math.inf
    slopes, errors = [], []
    for k in steps:
        slope = (centred[k] * centred[-1]).sum() / variance[k]
        residual = (centred[k] * (centred[-1] - slope * centred[k])).sum(dim=0)
        slopes.append(float(slope))
        errors.append(float(residual.square().sum().sqrt() / variance[k]))
    return sum(slopes) / len(slopes), sum(errors) / len(errors)


def _spread(log_p: Tensor) -> float:
    return float((log_p.exp() * -torch.expm1(log_p)).mean())


def _finite_top(sigmas: Sequence[float]) -> float:
    """The highest finite level of a run, or an octave above it where the run starts at infinite noise."""
    return sigmas[0] if math.isfinite(sigmas[0]) else OCTAVE * sigmas[1]


def _octaves(sigmas: Sequence[float]) -> list[tuple[slice, Tensor]]:
    """The jumps of each octave, and their shares of its drift, by log sigma."""
    levels = [_finite_top(sigmas), *sigmas[1:]]
    found, first = [], 0
    for end in range(1, len(levels)):
        if levels[first] / levels[end] >= OCTAVE or end == len(levels) - 1:
            logs = torch.tensor(levels[first : end + 1], dtype=torch.float64).log()
            found.append((slice(first, end), (logs[:-1] - logs[1:]) / (logs[0] - logs[-1])))
            first = end
    return found


def explained(calibration: Calibration) -> str:
    """What was measured of a model, in Markdown."""
    c = calibration
    exact = c.least <= 1 <= c.most
    lines = [
        f"**Temperature {c.temperature:.2g}** (between {c.least:.2g} and {c.most:.2g}): "
        + (
            "the images do not tell the model from an exact one, whose temperature is 1."
            if exact
            else f"{c.temperature:.0%} of the evidence counts, the rest is errors of the model's predictions."
            if c.temperature < 1
            else "the posterior moves more slowly than the images are decided."
        ),
        f"**Drift {c.nats:.2g} nats** until sigma {c.decided:.2g}, where the images are decided as far as the model "
        "tells: "
        + (
            "the posterior does not sink by errors."
            if abs(c.nats) < SMALL_DRIFT
            else "what the posterior of every image loses by errors, or by large steps, is given back."
        ),
        "",
        f"Measured on {c.images} images of {c.steps} steps.",
    ]
    return "\n".join(lines)
