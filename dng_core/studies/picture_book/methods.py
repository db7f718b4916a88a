"""What a user would do to avoid a thing: the methods that are compared, each as a denoised prediction."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...baselines import (
    ConceptRemoval,
    ConceptRemovalRun,
    ContrastiveCFG,
    NegativePrompting,
    NormalizedAttention,
    PerpNeg,
    SafeLatentDiffusion,
    normalized_attention,
    perp_neg,
)
from ...calibration import Calibration, Evidence, evidence_of
from ...guidance import Guidance, NegativeGuidance, Probed, Trace
from ...methods import MethodSettings, guidance_by
from ...models.picture_book.networks import PictureBook, TransformerBlock
from ...models.picture_book.prompting import contexts, denoised
from ...posterior import Chain
from ...schedules import DDPMSchedule, IntegratedOffset, ddpm_sigmas
from ...settings import PRESETS, Settings
from ...shares import share_of
from ..class_removal import starting_noise
from ..samplers import Sampler, added_noise, sample
from .cases import Case
from .sampling import LATENT

OfPrompts = PerpNeg | NormalizedAttention | ConceptRemoval
"""Ways that work with the prompt's prediction. All things together are their negative prompt."""


@dataclass(frozen=True)
class Method:
    """How a thing is avoided.

    Parameters
    ----------
    settings: of the guidance beside an empty negative prompt; None for no guidance. For Perp-Neg and Concept Removal
        Guidance, the empty prompt is evaluated at cfg 1 too. Normalized Attention Guidance is beside the stock
        negative prompt, as in ComfyUI.
    stock: the things are the negative prompt, D_neg + cfg (D_pos - D_neg), which does nothing at cfg 1.
    joint: the undesired prediction is of the prompt and the thing together, and is compared with the prompt's.
        Otherwise it is of the thing alone, compared with the empty prompt's (at cfg 1 with the prompt's).
    calibrated: temperature and drift are the model's, and the prior is the share that Calibrate measures in an
        unguided run of the case.
    """

    settings: MethodSettings | OfPrompts | None = None
    stock: bool = False
    joint: bool = False
    calibrated: bool = False

    def at(self, scale: float) -> "Method":
        """The same with another guidance scale; methods without one stay as they are."""
        return self if self.settings is None else replace(self, settings=replace(self.settings, guidance_scale=scale))


LEAST_PRIOR = 0.001  # the smallest that the nodes take
EXACT = Settings(max_scale=30.0)  # the cap lets a guidance scale above 1 act at posteriors near 1
EVIDENCE = Settings(evidence_above=float(DDPMSchedule.named("linear").sigmas[749]))
"""The settings that the nodes call exact: their default for ``evidence_until``, 0.25, is this level on the picture
book's chain."""
METHODS = {
    "nothing": Method(),
    "negative_prompt": Method(stock=True),
    "constant_push": Method(NegativePrompting()),
    "safe_latent_diffusion": Method(SafeLatentDiffusion()),
    "perp_neg": Method(PerpNeg()),
    "nag": Method(NormalizedAttention()),
    "contrastive_cfg": Method(ContrastiveCFG()),
    "concept_removal": Method(ConceptRemoval()),
    "dng": Method(EXACT),
    "dng_paper": Method(PRESETS["Stable Diffusion"]),
    "dng_joint": Method(EXACT, joint=True),
    "dng_calibrated": Method(EXACT, joint=True, calibrated=True),
    "dng_evidence": Method(EVIDENCE, joint=True),
    "dng_evidence_calibrated": Method(EVIDENCE, joint=True, calibrated=True),
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
        settings = self.method.settings
        self._removal = ConceptRemovalRun(settings) if isinstance(settings, ConceptRemoval) else None
        case, things = self.case, list(self.case.avoid)
        if self.method.stock or isinstance(self.method.settings, OfPrompts):
            things = [", ".join(things)]
        elif self.method.joint:
            things = [f"{case.prompt}, {thing}" for thing in things]
        texts = contexts(self.book, [case.prompt, "", *things]).split(1)
        self.positive, self.empty, self.things = texts[0], texts[1], texts[2:]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The prediction that a sampler uses at VE states."""
        if self.method.stock:
            return self._extrapolated(x, sigma, self.things[0])
        if isinstance(self.method.settings, PerpNeg):
            positive, negative, empty = self._predicted(x, sigma, [self.positive, self.things[0], self.empty])
            return perp_neg(positive, negative, empty, self.cfg, self.method.settings.guidance_scale)
        if self._removal is not None:
            positive, negative, empty = self._predicted(x, sigma, [self.positive, self.things[0], self.empty])
            return empty + self.cfg * (positive - empty) - self._removal.push(positive, negative, empty, sigma)
        if isinstance(self.method.settings, NormalizedAttention):
            with attending(self.book.unet, self.method.settings):
                positive, negative = self._predicted(x, sigma, [self.positive, self.things[0]])
            return negative + self.cfg * (positive - negative)
        if self.guidance is None:
            return self._extrapolated(x, sigma, self.empty)
        base, reference, things = self._compared(x, sigma)
        probe = self.guidance.probe(x, sigma)
        probed = Probed(probe, *self._compared(probe.x, sigma)[1:]) if probe else None
        return self.guidance(x, sigma, base, reference, things, probed)

    def trace(self) -> Trace | None:
        """What guidance did so far; None where nothing is tracked."""
        return self.guidance.trace() if self.guidance else None

    def _compared(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The prediction without guidance, the reference, and the predictions under each thing."""
        texts = [self.positive, *self.things, *([self.empty] if self.cfg != 1 else [])]
        positive, *others = self._predicted(x, sigma, texts)
        if self.cfg == 1:
            return positive, positive, others
        unconditional = others.pop()
        base = unconditional + self.cfg * (positive - unconditional)
        return base, positive if self.method.joint else unconditional, others

    def _extrapolated(self, x: Tensor, sigma: float, start: Tensor) -> Tensor:
        """Classifier-free guidance from the prediction of ``start``."""
        if self.cfg == 1:
            return self._predicted(x, sigma, [self.positive])[0]
        positive, from_ = self._predicted(x, sigma, [self.positive, start])
        return from_ + self.cfg * (positive - from_)

    def _predicted(self, x: Tensor, sigma: float, texts: list[Tensor]) -> list[Tensor]:
        self.evaluations += len(texts)
        return denoised(self.book, self.chain, x, sigma, texts)


@contextmanager
def attending(unet: nn.Module, settings: NormalizedAttention) -> Iterator[None]:
    """Guides the self attention of a network that is given the states of the prompt, and then as many of the other."""

    def guide(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        positive, negative = outputs.chunk(2)
        return torch.cat([normalized_attention(positive, negative, settings), negative])

    with ExitStack() as stack:
        for module in unet.modules():
            if isinstance(module, TransformerBlock):
                stack.enter_context(module.attn1.register_forward_hook(guide))
        yield


def guided(
    book: PictureBook,
    chain: DDPMSchedule,
    case: Case,
    method: Method,
    cfg: float,
    levels: list[float],
    sampler: Sampler = "euler_ancestral",
) -> Guided:
    """The prediction of a new run of ``sampler`` over noise levels."""
    guidance, settings = None, method.settings
    if settings is not None and not isinstance(settings, OfPrompts):
        known = Chain(levels, IntegratedOffset(chain), noise_fraction=added_noise(sampler))
        guidance = guidance_by([settings] * len(case.avoid), known)
    return Guided(book, chain, case, method, cfg, guidance)


def calibrated(
    book: PictureBook,
    chain: DDPMSchedule,
    case: Case,
    method: Method,
    cfg: float,
    steps: int,
    images: int,
    seed: int,
    model: Calibration,
    sampler: Sampler = "euler_ancestral",
) -> Method:
    """The method by the calibration ``model``, with the prior that an unguided run shows of the first thing."""
    if not isinstance(method.settings, Settings):
        raise ValueError("only DNG's settings can be calibrated")
    evidence, _ = unguided(book, chain, case, method, cfg, sampler, steps, images, seed)
    prior = share_of(evidence, model).prior(LEAST_PRIOR)
    return replace(method, settings=model.applied(method.settings.with_(prior=min(prior, method.settings.p_max))))


def unguided(
    book: PictureBook,
    chain: DDPMSchedule,
    case: Case,
    method: Method,
    cfg: float,
    sampler: Sampler,
    steps: int,
    images: int,
    seed: int,
) -> tuple[Evidence, Tensor]:
    """What a run without guidance shows of the first thing, as the method sees it, and the run's latents."""
    levels = ddpm_sigmas(chain, steps)
    run = guided(book, chain, case, method.at(0.0), cfg, levels, sampler)
    noise, generator = starting_noise(0, images, seed, LATENT)
    latents = sample(run, noise, levels, sampler, generator)
    assert isinstance(run.guidance, NegativeGuidance)
    return evidence_of(run.guidance)[0], latents
