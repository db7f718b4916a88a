"""Where a ComfyUI sampling run meets dng_core: frames, one batch for all predictions, and the life of a run's state.

A run begins when ComfyUI calls a guider's ``outer_sample`` and dies with it. Its hooks live in the guider's
``model_options``, which ComfyUI copies for every run, so nothing is left behind on the model.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import comfy.model_sampling
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..dng_core.divergence import Probe
from ..dng_core.guidance import NegativeGuidance, Trace
from ..dng_core.kernels import NoiseFrame
from ..dng_core.schedules import DDPMSchedule
from ..dng_core.settings import Settings
from .live import LiveChart, current_listener
from .sampler_kernels import check_sampler, has_trial_points, name_of, noise_fraction, options_of, tracked_levels

Reference = Literal["auto", "positive", "cfg"]
REFERENCES: tuple[Reference, ...] = ("auto", "positive", "cfg")

WRAPPER_KEY = "dynamic_negative_guidance"
TRAINING_STEPS = 1000

# What ComfyUI's nodes attach to a conditioning beside its text, on which the predictions of one model depend.
MODEL_INPUTS = (
    *("guidance", "concat_latent_image", "concat_mask", "concat_mask_index", "noise_augmentation"),
    *("reference_latents", "reference_latents_method", "clip_vision_output", "clip_vision_output_ref"),
    *("fps", "frame_rate", "time_dim_concat", "time_dim_replace", "keyframe_idxs", "guide_attention_entries"),
    *("vace_frames", "vace_mask", "vace_strength", "control_video", "camera_conditions", "reference_motion"),
    *("pose_video_latent", "face_video_pixels", "driving_mask_28ch", "ref_mask_28ch", "ref_mask_flag"),
    *("context_latents", "audio_embed", "audio_inject_scale", "ref_audio", "seconds_start", "seconds_total"),
)


@dataclass(frozen=True)
class Concept:
    """Something to avoid: its conditioning as it came through the wire, and how to guide away from it."""

    conditioning: list
    settings: Settings
    reference: Reference = "auto"

    @property
    def active(self) -> bool:
        return bool(self.conditioning) and self.settings.guidance_scale > 0


class Run:
    """One guided sampling run: the hooks that ComfyUI calls, and the guidance that they feed."""

    def __init__(
        self, keys: Sequence[str], reference: Reference, guidance: NegativeGuidance, chart: LiveChart
    ) -> None:
        self._keys = keys
        self._reference = reference
        self.guidance = guidance
        self._chart = chart
        self._entries: list[list[dict]] = []
        self._inner_calc: Callable[[dict], list[Tensor]] | None = None
        self._raw: tuple[Tensor, Tensor | None, list[Tensor | None]] | None = None
        self._probed: tuple[Probe, Tensor, list[Tensor | None]] | None = None
        self._level = 0.0
        self._finite: list[tuple[float, Tensor]] = []
        self._end: tuple[Tensor, float] | None = None

    def install(self, guider: comfy.samplers.CFGGuider) -> None:
        """Hook into this run's options. Patches already there keep working, and see the unguided predictions."""
        options = guider.model_options
        self._guider = guider
        self._inner_calc = options.get("sampler_calc_cond_batch_function")
        options["sampler_calc_cond_batch_function"] = self.calc_cond_batch
        options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), self.post_cfg]
        add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, WRAPPER_KEY, self.sampler_sample, options, True)

    def sampler_sample(self, executor, guider, sigmas, *args, **kwargs) -> Tensor:
        """Keep the state where the sampler stops: the evidence of its last jump is still to be counted.

        Raises ValueError where there is no image in it.
        """
        samples = executor(guider, sigmas, *args, **kwargs)
        if not bool(torch.isfinite(samples).all()):
            broken = [level for level, finite in self._finite if not bool(finite)]
            why = f"because the model predicted some, first at sigma {broken[0]:.4g}" if broken else "in the sampler"
            raise ValueError(
                f"sampling ended in NaN or infinite values, {why}; run the model in bfloat16 or float32, or lower "
                "cfg, or the guidance scale if it only happens with guidance on"
            )
        if self.guidance.ignored():
            logging.warning(
                "Dynamic Negative Guidance: the model predicted NaN or infinite values under what is to be avoided; "
                "they did not push. Run the model in bfloat16 or float32."
            )
        model_sampling = guider.inner_model.model_sampling
        state = model_sampling.noise_scaling(sigmas[-1], torch.zeros_like(samples), samples)
        self._end = state, float(sigmas[-1])
        return samples

    def calc_cond_batch(self, args: dict) -> list[Tensor]:
        """Evaluate the sampler's own conditionings and the undesired ones, in one batch where ComfyUI finds room."""
        conds = args["conds"]
        self._level = float(args["sigma"].flatten()[0])  # the one wait for the device, before the forward pass
        undesired = [self._guider.conds[key] for key in self._keys]
        active = [[c for c in entries if _in_range(c, self._level)] for entries in undesired]
        evaluated = [entries for entries in active if entries]

        out, extra = self._evaluate(args, conds, evaluated)
        remaining = iter(extra)
        negatives = [next(remaining) if entries else None for entries in active]
        self._raw = out[0], out[1] if conds[1] is not None else None, negatives
        self._entries = active
        self._probed = self._evaluate_probe(args) if evaluated else None
        return out

    def _evaluate(self, args: dict, conds: list, undesired: list) -> tuple[list[Tensor], list[Tensor]]:
        """The predictions under the sampler's ``conds`` (all of them, where a patch evaluates) and the undesired."""
        replaced = args["model_options"].get("transformer_options", {}).get("patches_replace", {})
        if self._inner_calc is None and "attn2" not in replaced:
            both = self._calc(args, [*conds, *undesired])
            return both[: len(conds)], both[len(conds) :]
        # Such patches (IP-Adapter, PuLID ...) know a positive and an unconditional, by their places in the call. The
        # undesired is evaluated in that of its reference; first, for those that note what comes last (SAG).
        place = 1 if self._reference == "auto" and args["conds"][1] is not None else 0
        extra = [self._calc(args, [*[None] * place, entries])[place] for entries in undesired]
        return list(self._inner_calc(args)) if self._inner_calc is not None else self._calc(args, conds), extra

    def _evaluate_probe(self, args: dict) -> tuple[Probe, Tensor, list[Tensor | None]] | None:
        """The reference and the undesired predictions a little way off, where the rule "probe" asks for them.

        ComfyUI evaluates one state per batch, so this is a second batch, of this pair alone.
        """
        probe = self.guidance.probe(args["input"], self._level)
        if probe is None:
            return None
        there = {**args, "input": probe.state}
        wanted = [
            entries if settings.rule == "probe" else []
            for entries, settings in zip(self._entries, self.guidance.settings, strict=True)
        ]
        undesired = [entries for entries in wanted if entries]
        which = 0 if self._reference == "positive" or args["conds"][1] is None else 1
        own = [entries if place == which else None for place, entries in enumerate(args["conds"])]
        out, extra = self._evaluate(there, own, undesired)
        reference, remaining = out[which], iter(extra)
        negatives = [_where_covered(next(remaining), reference, e) if e else None for e in wanted]
        return probe, reference, negatives

    def post_cfg(self, args: dict) -> Tensor:
        """Push what the sampler would use without DNG away from the undesired concepts."""
        if self._raw is None:
            raise RuntimeError("a patch on this model skipped the evaluation that Dynamic Negative Guidance needs")
        positive, unconditional, negatives = self._raw
        self._raw = None
        base, state = args["denoised"], args["input"]
        self._finite.append((self._level, base.isfinite().all()))
        if self._reference == "cfg":
            reference = base
        elif self._reference == "positive" or unconditional is None:
            reference = positive
        else:
            reference = unconditional
        present = [
            None if negative is None else _where_covered(negative, reference, entries)
            for negative, entries in zip(negatives, self._entries, strict=True)
        ]
        probed, self._probed = self._probed, None
        guided = self.guidance(state, self._level, base, reference, present, probed)
        self._chart.update()
        return guided

    def finish(self) -> None:
        """The run is over: complete its chart."""
        self._chart.finish()

    def trace(self) -> Trace:
        return self.guidance.trace(self._end)

    @staticmethod
    def _calc(args: dict, conds: list) -> list[Tensor]:
        return comfy.samplers.calc_cond_batch(
            args["model"], conds, args["input"], args["sigma"], args["model_options"]
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
    seed: int = 0,
    guidance_type: type[NegativeGuidance] = NegativeGuidance,
) -> Run:
    """Set up guidance for the run that ``guider`` is about to begin; its conds must hold the undesired ones by key.

    ``previous`` is the trace of the run that this one goes on from. Another ``guidance_type``, such as one that only
    observes, shows no live chart. Raises ValueError where the guider, the sampler or the model cannot be tracked, or
    where ``previous`` is of other concepts or images.
    """
    name = type(guider).__name__
    if type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise:
        raise ValueError(
            f"Dynamic Negative Guidance does not work with the guider {name}, which combines predictions in its own "
            "way; use CFGGuider, BasicGuider or a KSampler"
        )
    references = {concept.reference for concept in concepts}
    if len(references) > 1:
        raise ValueError(f"all chained concepts must share one reference, not {', '.join(sorted(references))}")
    if "cfg" in references and any(concept.settings.rule == "probe" for concept in concepts):
        raise ValueError(
            "the rule `probe` cannot work with the reference `cfg`, which is no model's own prediction; set "
            "`reference` to auto or positive, or `rule` to algorithm_2"
        )
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

    model_sampling = guider.model_patcher.get_model_object("model_sampling")
    positive = (guider.conds.get("positive") or [{}])[0]
    inputs = {name: positive[name] for name in MODEL_INPUTS if name in positive}
    for key in keys:  # the undesired differs from the positive in what it says, not in the image it is about
        guider.conds[key] = [_area_to_mask(inputs | entry, latent_shape) for entry in guider.conds[key]]
    frame, options = _noise_frame(model_sampling), options_of(sampler, model_sampling)
    levels = tracked_levels(sampler_name, options, sigmas.tolist())
    guidance = guidance_type(
        [concept.settings for concept in concepts],
        chain=_training_chain(model_sampling),
        frame=frame,
        levels=levels,
        weight=denoise_mask,
        log_priors=start,
        noise_fraction=partial(noise_fraction, sampler_name, options, frame, len(sigmas) - 1),
        trial_points=has_trial_points(sampler_name, options, frame),
        seed=seed,
    )
    listener = current_listener() if guidance_type is NegativeGuidance else None
    chart = LiveChart(guidance, None if levels is None else len(levels), listener)
    run = Run(keys, references.pop(), guidance, chart)
    run.install(guider)
    return run


def seed_of(arguments: Sequence[Any], options: dict[str, Any]) -> int:
    """The seed among what ComfyUI gives ``outer_sample`` after the mask: callback, disable_pbar, seed; 0 for none."""
    seed = options.get("seed", arguments[2] if len(arguments) > 2 else None)
    return 0 if seed is None else seed


def check_unconditional(sampler_name: str, unconditional: list | None) -> None:
    """Raise ValueError where a CFG++ sampler would take zeros for the unconditional prediction that it needs."""
    if "cfg_pp" in sampler_name and unconditional is None:
        raise ValueError(f"the sampler {sampler_name} needs an unconditional conditioning; connect `unconditional`")


def check_conditioning(conditioning: list, name: str, positive: list | None = None, batch: int | None = None) -> None:
    """Raise ValueError, naming the input, where a conditioning is not finite or does not fit its neighbours."""
    for embedding, _ in conditioning:
        if embedding is None:
            continue
        if not bool(torch.isfinite(embedding).all()):
            raise ValueError(f"the conditioning `{name}` holds NaN or infinite values; encode the prompt again")
        if batch is not None and embedding.shape[0] not in (1, batch):
            raise ValueError(
                f"the conditioning `{name}` is a batch of {embedding.shape[0]}, the latent one of {batch}; use one "
                "prompt for all images or one for each"
            )
    widths = {c[0].shape[-1] for c in positive or [] if c[0] is not None}
    for embedding, _ in conditioning:
        if embedding is not None and widths and embedding.shape[-1] not in widths:
            raise ValueError(
                f"the conditioning `{name}` is {embedding.shape[-1]} wide but `positive` {widths.pop()}: they come "
                "from text encoders of different model families; encode both with the CLIP that belongs to the model"
            )


def _noise_frame(model_sampling: Any) -> NoiseFrame:
    kinds = (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW)
    if isinstance(model_sampling, kinds):
        raise ValueError(
            "image-to-image models (such as Lotus) follow no noise schedule that Dynamic Negative Guidance can track"
        )
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return NoiseFrame("flow", float(getattr(model_sampling, "noise_scale", 1.0)))
    return NoiseFrame("ve")


def _training_chain(model_sampling: Any) -> DDPMSchedule:
    """The model's own discrete chain; DDPM's linear one, as a function of sigma, for models that have none.

    Offsets are tuned on chains of 1000 steps: a thinned (LCM, 50) or a finer one (Stable Cascade, 10,000) is none.
    """
    discrete = isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete)
    flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    if not discrete or flow or len(model_sampling.sigmas) != TRAINING_STEPS:
        return DDPMSchedule.named("linear")
    alpha_bars = 1 / (model_sampling.sigmas.cpu().double() ** 2 + 1)
    betas = 1 - alpha_bars / torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
    return DDPMSchedule(betas)


def _in_range(entry: dict, level: float) -> bool:
    """Whether a conditioning applies at a noise level, as ComfyUI decides it from its timestep range."""
    return entry.get("timestep_end", -math.inf) <= level <= entry.get("timestep_start", math.inf)


def _area_to_mask(entry: dict, latent_shape: Sequence[int]) -> dict:
    """An entry whose area has become a mask: ComfyUI would copy an area to the sampler's own conditionings."""
    entry = {**entry, "set_area_to_bounds": False}
    area = entry.pop("area", None)
    if area is None:
        return entry
    sizes = list(latent_shape[2:])
    if area[0] == "percentage":
        half = len(area) // 2
        extents, starts = area[1 : 1 + half], area[1 + half :]
        used = sizes[-half:]
        extents, starts = extents[half - len(used) :], starts[half - len(used) :]
        area = [max(1, round(f * s)) for f, s in zip(extents, used, strict=True)]
        area += [round(f * s) for f, s in zip(starts, used, strict=True)]
    half = len(area) // 2
    if any(start >= size for start, size in zip(area[half:], sizes[-half:], strict=True)):
        raise ValueError(
            "the area of an undesired conditioning lies outside the latent, so that no part of the image uses it; "
            "move the area inside, or remove it"
        )
    mask = _inside(area, torch.zeros(1, *sizes)).float()
    if "mask" in entry:
        given = entry["mask"]
        masks = len(given) if given.ndim > len(sizes) else 1
        mask = mask * comfy.utils.reshape_mask(given, (masks, 1, *sizes))[:, 0].to(mask)
    return {**entry, "mask": mask}


def _where_covered(negative: Tensor, reference: Tensor, entries: list[dict]) -> Tensor:
    """``negative``, but the reference where no entry reaches with any strength: ComfyUI leaves zeros there."""
    covered = torch.zeros_like(negative, dtype=torch.bool)
    for entry in entries:
        if entry.get("strength", 1.0) == 0 or ("mask" in entry and entry.get("mask_strength", 1.0) == 0):
            continue
        if "mask" not in entry and "area" not in entry:
            return negative
        reached = torch.ones_like(covered)
        if "mask" in entry:  # dealt out to the images as ComfyUI does it
            masks = entry["mask"][: len(negative)]
            reached = (masks > 0).repeat(len(negative) // len(masks), *[1] * (masks.ndim - 1)).unsqueeze(1)
        if "area" in entry:  # ComfyUI adds entries for the areas of the sampler's own conditionings
            area = comfy.samplers.add_area_dims(list(entry["area"]), negative.ndim - 2)
            reached = reached & _inside(area, negative)
        covered = covered | reached
    return torch.where(covered, negative, reference)


def _inside(area: Sequence[int], like: Tensor) -> Tensor:
    """True inside an area (sizes, then starts, of the last dimensions), False elsewhere; of the shape of ``like``."""
    dims = len(area) // 2
    inside = torch.zeros_like(like, dtype=torch.bool)
    part = inside
    for i in range(dims):
        dim = like.ndim - dims + i
        size = min(area[i], like.shape[dim] - area[dims + i])
        part = part.narrow(dim, area[dims + i], size)
    part.fill_(True)
    return inside
