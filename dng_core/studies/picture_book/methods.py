"""What a user would do to avoid a thing: the methods that are compared, each as a denoised prediction."""

from dataclasses import dataclass, replace

from torch import Tensor

from ...baselines import NegativePrompting, SafeLatentDiffusion
from ...calibration import EXACT as EXACT_MODEL
from ...calibration import evidence_of
from ...guidance import Guidance, NegativeGuidance
from ...methods import MethodSettings, guidance_by
from ...models.picture_book.networks import PictureBook
from ...models.picture_book.prompting import contexts, denoised
from ...posterior import Chain
from ...schedules import DDPMSchedule, IntegratedOffset, ddpm_sigmas
from ...settings import Settings
from ...shares import share_of
from ..class_removal import starting_noise
from .cases import Case
from .sampling import LATENT, sample


@dataclass(frozen=True)
class Method:
    """How a thing is avoided.

    Parameters
    ----------
    settings: of the guidance beside an empty negative prompt; None for no guidance.
    stock: the thing is the negative prompt, D_neg + cfg (D_pos - D_neg), which does nothing at cfg 1.
    joint: the undesired prediction is of the prompt and the thing together, and is compared with the prompt's.
        Otherwise it is of the thing alone, compared with the empty prompt's (at cfg 1 with the prompt's).
    calibrated: the prior is the share that Calibrate measures in an unguided run of the case.
    """

    settings: MethodSettings | None = None
    stock: bool = False
    joint: bool = False
    calibrated: bool = False

    def at(self, scale: float) -> "Method":
        """The same with another guidance scale; methods without one stay as they are."""
        return self if self.settings is None else replace(self, settings=replace(self.settings, guidance_scale=scale))


LEAST_PRIOR = 0.001  # the smallest that the nodes take
EXACT = Settings(max_scale=30.0)  # the cap lets a guidance scale above 1 act at posteriors near 1
METHODS = {
    "nothing": Method(),
    "negative_prompt": Method(stock=True),
    "constant_push": Method(NegativePrompting()),
    "safe_latent_diffusion": Method(SafeLatentDiffusion()),
    "dng": Method(EXACT),
    "dng_joint": Method(EXACT, joint=True),
    "dng_calibrated": Method(EXACT, joint=True, calibrated=True),
}


@dataclass
class Guided:
    """The denoised prediction of one run, with a method's guidance in it; it counts the network's evaluations."""

    book: PictureBook
    chain: DDPMSchedule
    case: Case
    method: Method
    cfg: float
    guidance: Guidance | None
    evaluations: int = 0

    def __post_init__(self) -> None:
        case, things = self.case, list(self.case.avoid)
        if self.method.stock:
            things = [", ".join(things)]
        elif self.method.joint:
            things = [f"{case.prompt}, {thing}" for thing in things]
        texts = contexts(self.book, [case.prompt, "", *things]).split(1)
        self.positive, self.empty, self.things = texts[0], texts[1], texts[2:]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The prediction that a sampler uses at VE states."""
        if self.method.stock:
            return self._extrapolated(x, sigma, self.things[0])
        if self.guidance is None:
            return self._extrapolated(x, sigma, self.empty)
        texts = [self.positive, *self.things, *([self.empty] if self.cfg != 1 else [])]
        positive, *others = self._predicted(x, sigma, texts)
        base = reference = positive
        if self.cfg != 1:
            unconditional = others.pop()
            base = unconditional + self.cfg * (positive - unconditional)
            reference = positive if self.method.joint else unconditional
        return self.guidance(x, sigma, base, reference, others)

    def scales(self) -> Tensor | None:
        """The mean guidance scale over the concepts at each step so far, (steps, n); None where nothing is tracked."""
        trace = self.guidance.trace() if self.guidance else None
        return trace.scale.mean(dim=1) if trace else None

    def _extrapolated(self, x: Tensor, sigma: float, start: Tensor) -> Tensor:
        """Classifier-free guidance from the prediction of ``start``."""
        if self.cfg == 1:
            return self._predicted(x, sigma, [self.positive])[0]
        positive, from_ = self._predicted(x, sigma, [self.positive, start])
        return from_ + self.cfg * (positive - from_)

    def _predicted(self, x: Tensor, sigma: float, texts: list[Tensor]) -> list[Tensor]:
        self.evaluations += len(texts)
        return denoised(self.book, self.chain, x, sigma, texts)


def guided(
    book: PictureBook, chain: DDPMSchedule, case: Case, method: Method, cfg: float, levels: list[float]
) -> Guided:
    """The prediction of a new run over noise levels."""
    guidance = None
    if method.settings is not None:
        guidance = guidance_by([method.settings] * len(case.avoid), Chain(levels, IntegratedOffset(chain)))
    return Guided(book, chain, case, method, cfg, guidance)


def calibrated(
    book: PictureBook, chain: DDPMSchedule, case: Case, method: Method, cfg: float, steps: int, images: int, seed: int
) -> Method:
    """The method with the prior that one unguided run shows: the share of the first thing to avoid."""
    if not isinstance(method.settings, Settings):
        raise ValueError("only DNG's settings can be calibrated")
    levels = ddpm_sigmas(chain, steps)
    run = guided(book, chain, case, method.at(0.0), cfg, levels)
    noise, generator = starting_noise(0, images, seed, LATENT)
    sample(run, noise, levels, "euler_ancestral", generator)
    assert isinstance(run.guidance, NegativeGuidance)
    share = share_of(evidence_of(run.guidance)[0], EXACT_MODEL).mean
    return replace(method, settings=replace(method.settings, prior=min(max(share, LEAST_PRIOR), 1 - LEAST_PRIOR)))
