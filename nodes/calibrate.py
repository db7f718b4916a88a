"""Settings that calibrate themselves: nodes that measure a model, and how often it draws a concept."""

import logging
import math
import time
from collections.abc import Sequence

import comfy.samplers
import torch
from comfy_api.latest import io

from ..dng_core.calibration import (
    EXACT,
    FEWEST_IMAGES,
    FEWEST_STEPS,
    Evidence,
    calibrate,
    explained,
    track,
)
from ..dng_core.calibration_files import ModelCalibration
from ..dng_core.guidance import Trace, dynamic_scales
from ..dng_core.settings import CALIBRATED, Rule, Settings
from ..dng_core.shares import outlook, share_explained, share_of
from .calibrations import check_name, known, load, model_name, save
from .checks import check_values
from .guider import NegativeGuider
from .inputs import (
    CALIBRATION,
    CONCEPTS,
    EVIDENCE_UNTIL,
    TRACE,
    calibration_input,
    cfg_input,
    reference_input,
    rule_input,
    scheduler_input,
    seed_input,
    unconditional_input,
)
from .run.concept import Concept, Reference
from .run.frames import sigma_at
from .run.live import current_listener
from .run.samplers import NOISELESS, name_of
from .sampling import Conditionings, Schedule, run_guider

ALTERNATIVES, PRIORS = "alternatives", "priors"
SMALLEST_PRIOR = 0.001
"""The least that the input ``prior`` of the DNG nodes takes."""


def observe(
    model, schedule: Schedule, wanted: Conditionings, latent: dict, negatives: Sequence[list], reference: Reference,
    rule: Rule, calibration: ModelCalibration | None = None,
) -> tuple[list[Evidence], tuple[int, ...]]:  # fmt: skip
    """The evidence for each of ``negatives`` in one run without guidance, and the shape of one image's state.

    ComfyUI gives an empty latent the model's channels and size before it samples, and packs several latents into one.
    It is the state's shape, not the latent's, that a calibration is of.

    Raises
    ------
    ValueError: what KSampler (DNG) raises, also for a ``calibration`` of another model or size.
    """
    settings = Settings(guidance_scale=0, prior=0.5 / len(negatives), rule=rule)
    concepts = [Concept(negative, settings, reference, calibration=calibration) for negative in negatives]
    guider = NegativeGuider(model, wanted.positive, concepts, wanted.unconditional, wanted.cfg, observing=True)
    run_guider(guider, model, schedule, latent, Forecast(schedule.steps))
    if not guider.evidence:
        raise ValueError(f"`steps` is {schedule.steps}, and no jump was tracked; take more steps")
    return guider.evidence, guider.shape


class Forecast:
    """Says in the log and in the running node how long a run of ``steps`` steps will take, after its second step.

    The first step may load the model, so that the second one's time counts.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self._before = steps, 0.0

    def __call__(self, step: int) -> None:
        now = time.monotonic()
        if step == 1:
            text = f"Measuring: about {lasting((self.steps - 2) * (now - self._before))} left"
            logging.info("Dynamic Negative Guidance: %s", text)
            if listener := current_listener():
                listener.server.send_progress_text(text, listener.node)
        self._before = now


def lasting(seconds: float) -> str:
    """A duration in words, rounded up to seconds or minutes."""
    return f"{math.ceil(seconds)} s" if seconds < 60 else f"{math.ceil(seconds / 60)} min"


def check_size(latent: dict, steps: int) -> None:
    """Raise ValueError for a run that is too small to measure anything."""
    images = latent["samples"].shape[0]  # of several latents packed into one too
    if images < FEWEST_IMAGES:
        raise ValueError(
            f"`latent_image` holds {images} images, which is too few to measure anything; give at least "
            f"{FEWEST_IMAGES}, better 64"
        )
    if steps < FEWEST_STEPS:
        raise ValueError(f"`steps` is {steps}; a calibration needs at least {FEWEST_STEPS}, better 30")


def trace_of(evidence: Sequence[Evidence], settings: Sequence[Settings]) -> Trace:
    """What the settings would have tracked along a recorded run, each alone, and the scales that they would set."""
    courses = [track(e, s) for e, s in zip(evidence, settings, strict=True)]
    levels = evidence[0].sigmas
    scales = [dynamic_scales([course.log()], [s], levels)[0] for course, s in zip(courses, settings, strict=True)]
    posterior, scale = (torch.stack(values, dim=1).float() for values in (courses, scales))
    return Trace(torch.tensor(levels), posterior, scale)


def _sampler_input(tooltip: str) -> io.Input:
    return io.Combo.Input(
        "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler_ancestral", tooltip=tooltip
    )


def check_noise(schedule: Schedule) -> None:
    """Raise ValueError for a sampler along whose run no temperature can be measured.

    What a temperature is measured by, that the posterior is a martingale, holds for a chain with noise. A
    deterministic run's image is settled from the beginning, so that its posterior moves further than a martingale
    would.
    """
    name = schedule.sampler_name
    if name_of(comfy.samplers.sampler_object(name)) in NOISELESS:
        raise ValueError(
            f"`sampler_name` is {name}, which adds no noise, so that no temperature can be measured with it; "
            f"choose an ancestral or SDE sampler, such as euler_ancestral: its calibration serves {name} too"
        )


def _courses() -> list[io.Output]:
    return [
        TRACE.Output(
            display_name="before",
            tooltip="The posteriors of this run by the exact settings (temperature 1, no drift). Connect this to Plot "
            "Trace.",
        ),
        TRACE.Output(display_name="after", tooltip="The posteriors of the same run as calibrated."),
    ]


class CalibrateModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGCalibrateModel",
            display_name="Calibrate Model (DNG)",
            category="DNG",
            description="Measures, once for a model, how far its evidence counts and how much the posterior sinks by "
            "its errors. It draws one batch without guidance. Each concept costs one prediction more at every step: "
            "64 images with two concepts take as long as 192 images without guidance at cfg 1.",
            search_aliases=["dng", "calibration", "auto settings", "tune", "temperature", "drift"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to calibrate. It must not have a DNG patch."),
                seed_input(),
                io.Int.Input(
                    "steps", default=30, min=FEWEST_STEPS, max=10000, tooltip="The number of denoising steps."
                ),
                _sampler_input(
                    "The sampling algorithm: an ancestral or SDE one, such as euler_ancestral. The calibration then "
                    "serves all others."
                ),
                scheduler_input(),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the concepts are compared with. If your graphs have an unconditional, this is the "
                    "empty prompt. Otherwise it is a prompt whose images show each concept now and then.",
                ),
                CONCEPTS.Input(
                    "concepts",
                    tooltip="Things that some of the images show and others do not, from DNG Concept nodes. Of their "
                    "settings, only the prior counts here, and that only if `shares` is priors.",
                ),
                io.Combo.Input(
                    "shares",
                    options=[ALTERNATIVES, PRIORS],
                    tooltip="alternatives: each image shows exactly one of the concepts (day or night; the classes of "
                    "a class model), so that their posteriors add up to 1. priors: the prior of each concept is the "
                    "share of images that show it, as you counted it.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The batch to draw: 64 images of the size that you work with. Fewer than 8 are refused.",
                ),
                io.String.Input(
                    "save_as",
                    default="",
                    tooltip="The name under which the calibration is kept in ComfyUI's user folder, for Load "
                    "Calibration (DNG). If this is empty, nothing is kept.",
                ),
                rule_input(advanced=True),
            ],
            outputs=[
                CALIBRATION.Output(
                    display_name="calibration", tooltip="Connect this to `calibration` of the nodes that guide."
                ),
                io.String.Output(display_name="text", tooltip="What was measured, in Markdown."),
                *_courses(),
            ],
        )

    @classmethod
    def execute(
        cls, model, seed, steps, sampler_name, scheduler, positive, concepts, shares, latent_image, save_as="",
        rule=Settings.rule,
    ) -> io.NodeOutput:  # fmt: skip
        check_size(latent_image, steps)
        check_values(cls, steps=steps)
        if save_as.strip():
            check_name(save_as.strip(), "save_as")
        if not concepts:
            raise ValueError("`concepts` holds none, so that there is nothing to measure; connect a DNG Concept")
        if not all(concept.conditioning for concept in concepts):
            raise ValueError(
                "`concepts` holds one whose `negative` is empty, so that there is nothing to measure; connect a "
                "conditioning to each DNG Concept"
            )
        if "cfg_pp" in sampler_name:
            raise ValueError(
                f"`sampler_name` is {sampler_name}, which needs an unconditional prediction, and this run has none; "
                "choose another, such as euler_ancestral"
            )
        schedule = Schedule(seed, steps, sampler_name, scheduler)
        check_noise(schedule)
        if shares not in (ALTERNATIVES, PRIORS):
            raise ValueError(f"`shares` must be {ALTERNATIVES} or {PRIORS}; it is {shares!r}")
        if shares == ALTERNATIVES and len(concepts) < 2:
            raise ValueError(
                "`concepts` holds one concept, and alternatives are at least two, of which each image shows exactly "
                "one; chain another DNG Concept, or set `shares` to priors"
            )
        started = time.monotonic()
        evidence, shape = observe(
            model,
            schedule,
            Conditionings(positive, None, 1.0),
            latent_image,
            [concept.conditioning for concept in concepts],
            "positive",
            rule,
        )
        counted = [getattr(concept.settings, "prior", Settings.prior) for concept in concepts]
        found = calibrate(evidence, None if shares == ALTERNATIVES else counted)
        measured = ModelCalibration(found, model_name(model), shape)
        text = explained(found) + f" It took {time.monotonic() - started:.0f} s."
        if save_as.strip():
            text += f" It is kept as {save(save_as.strip(), measured).name}."
        start = 1 / len(concepts)
        plain = [Settings(prior=p if shares == PRIORS else start) for p in counted]
        before, after = trace_of(evidence, plain), trace_of(evidence, [found.applied(s) for s in plain])
        return io.NodeOutput(measured, text, before, after, ui={"text": [text]})


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGCalibrate",
            display_name="Calibrate (DNG)",
            category="DNG",
            description="Measures how many images show what you want to avoid, and says what guidance will do: how "
            "many images it will push, how hard and how early. It draws one batch without guidance, which takes as "
            "long as drawing it with KSampler (DNG).",
            search_aliases=["dng", "calibration", "auto settings", "tune", "prior", "share"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to measure. It must not have a DNG patch."),
                seed_input(),
                io.Int.Input(
                    "steps", default=20, min=FEWEST_STEPS, max=10000, tooltip="The number of denoising steps."
                ),
                cfg_input(),
                _sampler_input("The sampling algorithm that you will use afterwards. lcm is refused."),
                scheduler_input(),
                io.Conditioning.Input("positive", tooltip="What the images should show, as in your graph."),
                io.Conditioning.Input("negative", tooltip="What is to be avoided."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The batch to draw: 32 images of the size that you work with. Fewer than 8 are refused.",
                ),
                unconditional_input(),
                reference_input(advanced=True),
                rule_input(advanced=True),
                calibration_input(),
            ],
            outputs=[
                io.Float.Output(display_name="prior", tooltip="The share. Connect this to `prior`, or type it in."),
                io.String.Output(display_name="text", tooltip="What was found, in Markdown."),
                *_courses(),
            ],
        )

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, unconditional=None,
        reference="auto", rule=Settings.rule, calibration=None,
    ) -> io.NodeOutput:  # fmt: skip
        if not negative:
            raise ValueError("`negative` is empty, so there is nothing to measure; connect what is to be avoided")
        check_size(latent_image, steps)
        check_values(cls, steps=steps, cfg=cfg)
        (evidence,), _ = observe(
            model,
            Schedule(seed, steps, sampler_name, scheduler),
            Conditionings(positive, unconditional, cfg),
            latent_image,
            [negative],
            reference,
            rule,
            calibration,
        )
        found = EXACT if calibration is None else calibration.calibration
        share = share_of(evidence, found)
        prior = round(min(share.prior(SMALLEST_PRIOR), CALIBRATED.p_max), 3)
        level = sigma_at(model.get_model_object("model_sampling"), EVIDENCE_UNTIL)
        plain = CALIBRATED.with_(prior=prior, evidence_above=level)
        settings = found.applied(plain)
        text = share_explained(share, outlook(evidence, settings), settings)
        before, after = trace_of([evidence], [plain]), trace_of([evidence], [settings])
        return io.NodeOutput(prior, text, before, after, ui={"text": [text]})


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGLoadCalibration",
            display_name="Load Calibration (DNG)",
            category="DNG",
            description="Loads what Calibrate Model (DNG) kept, or a calibration that comes with DNG for one of its "
            "own models.",
            search_aliases=["dng", "calibration", "temperature", "drift"],
            inputs=[io.Combo.Input("name", options=known(), tooltip="The calibration to load.")],
            outputs=[
                CALIBRATION.Output(
                    display_name="calibration", tooltip="Connect this to `calibration` of the nodes that guide."
                )
            ],
        )

    @classmethod
    def execute(cls, name) -> io.NodeOutput:
        return io.NodeOutput(load(name))


NODES = [CalibrateModel, Calibrate, LoadCalibration]
