"""How a guided run begins: what ComfyUI is about to sample, checked and described for dng_core."""

import math
from collections.abc import Sequence
from functools import partial

import comfy.samplers
from torch import Tensor

from ...dng_core.economy import ECONOMIES
from ...dng_core.evidence import Foretold
from ...dng_core.guidance import NegativeGuidance, Trace
from ...dng_core.methods import MethodSettings, guidance_by
from ...dng_core.posterior import SAME_SIGMA, Chain
from ...dng_core.schedules import IntegratedOffset
from ...dng_core.settings import Settings
from ..calibrations import REMEDY, model_name
from .checks import check_sigmas, check_unconditional
from .concept import Concept, input_of
from .frames import noise_frame, training_chain
from .hooks import Run
from .live import LiveChart, current_listener
from .regions import area_to_mask, check_regions
from .samplers import check_sampler, has_trial_points, name_of, noise_fraction, options_of, tracked_levels

# Inputs other than the text that ComfyUI's nodes attach to a conditioning. The undesired conditioning takes them from
# the first positive entry.
MODEL_INPUTS = (
    *("guidance", "concat_latent_image", "concat_mask", "concat_mask_index", "noise_augmentation"),
    *("reference_latents", "reference_latents_method", "clip_vision_output", "clip_vision_output_ref"),
    *("fps", "frame_rate", "time_dim_concat", "time_dim_replace", "keyframe_idxs", "guide_attention_entries"),
    *("vace_frames", "vace_mask", "vace_strength", "control_video", "camera_conditions", "reference_motion"),
    *("pose_video_latent", "face_video_pixels", "driving_mask_28ch", "ref_mask_28ch", "ref_mask_flag"),
    *("context_latents", "audio_embed", "audio_inject_scale", "ref_audio", "seconds_start", "seconds_total"),
)


def begin_run(
    guider: comfy.samplers.CFGGuider,
    concepts: Sequence[Concept],
    keys: Sequence[str],
    sampler: comfy.samplers.Sampler,
    sigmas: Tensor,
    latent_shape: Sequence[int],
    denoise_mask: Tensor | None,
    previous: Trace | None = None,
    seed: int | None = None,
    charted: bool = True,
) -> Run:
    """Set up guidance for the run that ``guider`` is about to begin.

    Call it when ``guider.conds`` holds each concept's conditioning under its key, and before sampling.

    Parameters
    ----------
    previous: the trace of the run that this one goes on from.
    charted: whether a browser that waits for the run gets the live chart.

    Raises
    ------
    ValueError: where the guider, the sampler or the model cannot be tracked, the concepts do not go together, or
        ``previous`` is of other concepts, priors or images.
    """
    check_guider(guider)
    check_sigmas(sigmas)
    check_together(concepts)
    for concept in concepts:
        if concept.calibration is not None:
            concept.calibration.check(model_name(guider.model_patcher), tuple(latent_shape[1:]), REMEDY)
    check_sampler(sampler)
    sampler_name = name_of(sampler)
    check_unconditional(sampler_name, guider.conds.get("negative"))
    start = None if previous is None else previous.log_posterior
    if start is not None and start.shape != (len(concepts), latent_shape[0]):
        raise ValueError(
            f"`previous_trace` is of {start.shape[0]} concepts and {start.shape[1]} images, this run of "
            f"{len(concepts)} and {latent_shape[0]}; connect the trace of the node that the latent comes from, and "
            "avoid the same concepts in both"
        )
    if previous is not None and start is not None:
        check_same_priors(previous, [concept.settings for concept in concepts])

    model_sampling = guider.model_patcher.get_model_object("model_sampling")
    frame, options = noise_frame(model_sampling), options_of(sampler, model_sampling)
    if previous is not None:
        check_goes_on(previous, frame.sigma(float(sigmas[0])))
    levels = tracked_levels(sampler_name, options, sigmas.tolist())
    chain = Chain(
        levels=None if levels is None else [frame.sigma(level) for level in levels],
        offset=IntegratedOffset(training_chain(model_sampling)),
        weight=denoise_mask,
        noise_fraction=partial(noise_fraction, sampler_name, options, frame, len(sigmas) - 1),
        trial_points=has_trial_points(sampler_name, options, frame),
    )
    economies = [ECONOMIES[concept.economy] for concept in concepts]
    foretold = _foretold(previous, latent_shape)
    settings = [concept.settings_on(model_sampling) for concept in concepts]
    guidance = guidance_by(settings, chain, start, seed or 0, economies, foretold)

    positive = (guider.conds.get("positive") or [{}])[0]
    inputs = {name: positive[name] for name in MODEL_INPUTS if name in positive}
    for key, entries in guider.conds.items():
        check_regions(entries or [], input_of(key), latent_shape)
    # The undesired conditioning differs in its text, not in the image that it is about.
    for key in keys:
        guider.conds[key] = [area_to_mask(inputs | entry, latent_shape) for entry in guider.conds[key]]
    listener, chart = current_listener(), None
    if charted and listener is not None and isinstance(guidance, NegativeGuidance):
        chart = LiveChart(guidance, None if levels is None else len(levels), listener)
    run = Run(
        guider, keys, [_probes(c) for c in concepts], concepts[0].compared_with, guidance, frame, chart, levels is None
    )
    run.install()
    return run


def _foretold(previous: Trace | None, latent_shape: Sequence[int]) -> tuple[Foretold | None, ...] | None:
    """What the run before foretold of each concept; nothing where the latent was brought to another size since."""
    known = (previous.foretold if previous else None) or ()
    fits = all(one is None or one.expected.shape == tuple(latent_shape) for one in known)
    return known if known and fits else None


def check_guider(guider: comfy.samplers.CFGGuider) -> None:
    """Raise ValueError for a guider that combines predictions in its own way."""
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        raise ValueError(
            f"Dynamic Negative Guidance does not work with the guider {type(guider).__name__}, which combines "
            "predictions in its own way; use CFGGuider, BasicGuider or a KSampler"
        )


def check_goes_on(previous: Trace, sigma: float) -> None:
    """Raise ValueError for a run that begins at ``sigma``, above the noise that the run before it came down to."""
    if len(previous.sigmas) and sigma > float(previous.sigmas[-1]) * (1 + SAME_SIGMA):
        raise ValueError(
            f"`previous_trace` comes down to sigma {float(previous.sigmas[-1]):.4g}, but this run begins above it, at "
            f"{sigma:.4g}; let `start_at_step` be the step at which the run before ended, of as many `steps`, or "
            "disconnect `previous_trace`"
        )


def check_same_priors(previous: Trace, settings: Sequence[MethodSettings]) -> None:
    """Raise ValueError for a run by another prior than that of the run before it.

    A posterior is that of its prior: the run before added the evidence to it, and a prior given now would count for
    nothing. Everything else may change on the way, and the sum still means the same. Temperature, drift, offset and
    rule say how the evidence of the steps to come is counted, and two models of one run (Wan 2.2) have calibrations of
    their own. The bounds, the scale and its cap act on the steps to come alone. The words of a thing may change too,
    and another text encoder (a refiner's) turns the same words into other numbers, so conditionings are not compared.
    """
    for number, (began, of) in enumerate(zip(previous.priors or (), settings, strict=False), start=1):
        if isinstance(of, Settings) and not math.isclose(began, of.prior, rel_tol=1e-6):
            raise ValueError(
                f"`previous_trace` began at the prior {began:g} of concept {number}, which this run says is "
                f"{of.prior:g}; it goes on from the posterior of the first, so that another `prior` would count for "
                "nothing: set the same in both, or disconnect `previous_trace`"
            )


def check_together(concepts: Sequence[Concept]) -> None:
    """Raise ValueError for concepts that cannot be avoided in one run."""
    methods = sorted({concept.settings.method for concept in concepts})
    if len(methods) > 1:
        raise ValueError(
            f"all concepts of a run must share one method, not {', '.join(methods)}: choose the same in `settings` of "
            "each DNG Concept as in this node's"
        )
    references = {concept.compared_with for concept in concepts}
    if len({concept.reference for concept in concepts}) == 1 < len(references):
        raise ValueError(
            "some of the things to avoid come from Joint Negative and others do not; a run compares all of them with "
            "one prediction: encode each with Joint Negative, or none"
        )
    if len(references) > 1:
        raise ValueError(f"all chained concepts must share one reference, not {', '.join(sorted(references))}")
    if "cfg" in references and any(_probes(concept) for concept in concepts):
        raise ValueError(
            "the rule `probe` cannot work with the reference `cfg`, which is no model's own prediction; set "
            "`reference` to auto or positive, or `rule` to algorithm_2"
        )


def _probes(concept: Concept) -> bool:
    return isinstance(concept.settings, Settings) and concept.settings.rule == "probe"
