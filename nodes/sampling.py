"""KSampler (DNG), KSampler Advanced (DNG) and DNG Guider."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from nodes import KSampler, common_ksampler
from torch import Tensor

from ..dng_core.guidance import Trace
from .checks import check_latent, check_values
from .guider import NegativeGuider
from .inputs import (
    TRACE,
    cfg_input,
    concepts_from,
    more_concepts_input,
    run_choices,
    scheduler_input,
    seed_input,
    settings_input,
    unconditional_input,
)
from .run.checks import check_unconditional, shapes_explained
from .run.concept import Concept

POSITIVE_TIP = "What the image should show."
MOST_STEPS = 10_000_000
"""Of a whole schedule, of which `denoise` takes the last part: 10,000 steps at a denoise of 0.001. Some schedulers
take seconds for so many, and for more of them all the memory."""
LARGEST_SEED = 2**64 - 1
"""That torch's generators take, and ComfyUI's widgets."""

NEGATIVE_TIP = "What the image should not show. Guidance switches on only in images that are turning into this."

RATIOS = tuple(
    name
    for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")
    if name in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
)
"""What an empty latent says of its size, as far as this ComfyUI asks: the temporal ratio came after 0.20."""


@dataclass(frozen=True)
class Conditionings:
    """What classifier-free guidance works with. ``unconditional`` is None where nothing is connected."""

    positive: list
    unconditional: list | None
    cfg: float


@dataclass(frozen=True)
class Schedule:
    """How a KSampler node samples: the values of its widgets, under ComfyUI's names in ``common_ksampler``."""

    seed: int
    steps: int
    sampler_name: str
    scheduler: str
    denoise: float = 1.0
    disable_noise: bool = False
    start_step: int | None = None
    last_step: int | None = None
    force_full_denoise: bool = False

    def __post_init__(self) -> None:
        known = {"sampler_name": comfy.samplers.KSampler.SAMPLERS, "scheduler": comfy.samplers.KSampler.SCHEDULERS}
        for name, names in known.items():
            if getattr(self, name) not in names:
                raise ValueError(f"`{name}` must be one of {', '.join(names)}; it is {getattr(self, name)!r}")
        if self.seed == LARGEST_SEED:
            raise ValueError(
                f"`seed` (or `noise_seed`) is {self.seed}, which is too large by one: many of ComfyUI's samplers draw "
                "their noise by the next number; take a smaller one"
            )
        if 0 < self.denoise < self.steps / MOST_STEPS:
            raise ValueError(
                f"`denoise` is {self.denoise:g}, so that these steps would be the last of "
                f"{self.steps / self.denoise:.3g}; raise `denoise`, or set it to 0 to keep the latent"
            )

    def sigmas(self, model) -> Tensor:
        """The noise levels from the first step to the last. There are fewer than two where there is no step."""
        sigmas = comfy.samplers.KSampler(
            model,
            self.steps,
            model.load_device,
            self.sampler_name,
            self.scheduler,
            self.denoise,
            model.model_options,
        ).sigmas
        if self.last_step is not None and self.last_step < len(sigmas) - 1:
            sigmas = sigmas[: self.last_step + 1].clone()
            if self.force_full_denoise:
                sigmas[-1] = 0
        return sigmas[self.start_step or 0 :]


def sample_with_dng(
    model,
    schedule: Schedule,
    wanted: Conditionings,
    concepts: Sequence[Concept],
    latent: dict,
    previous: Trace | None = None,
):
    """ComfyUI's ``common_ksampler`` with concepts to avoid: (LATENT, trace or None).

    With guidance off, ``common_ksampler`` itself samples, with the unconditional in the negative's place. Where a run
    goes on from the latent of an earlier run, ``previous`` is the trace of that run: the posterior goes on from there.
    """
    guider = NegativeGuider(model, wanted.positive, concepts, wanted.unconditional, wanted.cfg, previous)
    if not any(concept.active for concept in concepts):
        check_latent(latent, "latent_image")
        check_unconditional(schedule.sampler_name, wanted.unconditional)
        negative = wanted.positive if wanted.unconditional is None else wanted.unconditional
        with shapes_explained(latent["samples"]):
            (out,) = common_ksampler(
                model, cfg=wanted.cfg, positive=wanted.positive, negative=negative, latent=latent, **asdict(schedule)
            )
        return out, previous
    return run_guider(guider, model, schedule, latent)


def run_guider(
    guider: NegativeGuider, model, schedule: Schedule, latent: dict, on_step: Callable[[int], object] | None = None
):
    """Do what ``common_ksampler`` does, with ``guider`` in place of its own: (LATENT, the guider's trace).

    ``on_step`` is told the number of each step, from 0, once it is done.
    """
    check_latent(latent, "latent_image")
    latent_image = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *map(latent.get, RATIOS))
    out = {name: value for name, value in latent.items() if name not in RATIOS}
    sigmas = schedule.sigmas(model)
    if len(sigmas) < 2:
        return {**out, "samples": latent_image}, guider.previous
    if schedule.disable_noise:
        noise = torch.zeros(latent_image.size(), dtype=latent_image.dtype, layout=latent_image.layout, device="cpu")
    else:
        noise = comfy.sample.prepare_noise(latent_image, schedule.seed, latent.get("batch_index"))
    preview = latent_preview.prepare_callback(model, schedule.steps)

    def callback(step: int, *shown: object) -> None:
        preview(step, *shown)
        if on_step:
            on_step(step)

    samples = guider.sample(
        noise,
        latent_image,
        comfy.samplers.sampler_object(schedule.sampler_name),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=schedule.seed,
    )
    return {**out, "samples": samples.to(**_intermediate())}, guider.trace


def _intermediate() -> dict:
    """Where ComfyUI keeps a latent between two nodes, and in which dtype; before 0.18 it knows no such dtype."""
    place = {"device": comfy.model_management.intermediate_device()}
    if hasattr(comfy.model_management, "intermediate_dtype"):
        place["dtype"] = comfy.model_management.intermediate_dtype()
    return place


def _run_inputs() -> list[io.Input]:
    """What both KSamplers ask for between their seed and their own inputs, in ComfyUI's order."""
    return [
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="The number of denoising steps."),
        cfg_input(),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSampler.SAMPLERS,
            tooltip="The sampling algorithm. lcm is refused.",
        ),
        scheduler_input(),
        io.Conditioning.Input("positive", tooltip=POSITIVE_TIP),
        io.Conditioning.Input("negative", tooltip=NEGATIVE_TIP),
        io.Latent.Input("latent_image", tooltip="The latent image to denoise."),
    ]


def _outputs() -> list[io.Output]:
    return [
        io.Latent.Output(display_name="LATENT", tooltip="The denoised latent."),
        TRACE.Output(
            display_name="trace",
            tooltip="The noise level, and the posterior and guidance scale of each image, at every step, and how many "
            "predictions were spared by economy. It is empty where guidance is off, and for the baselines.",
        ),
    ]


class KSamplerDNG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSamplerDNG",
            display_name="KSampler (DNG)",
            category=KSampler.CATEGORY,
            description="KSampler with Dynamic Negative Guidance. An image is pushed away from `negative` only while "
            "it is turning into this.",
            search_aliases=["dynamic negative guidance", "dng", "ksampler", "negative prompt", "sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model used for denoising the input latent."),
                seed_input(),
                *_run_inputs(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The amount of denoising. Lower values keep more of the input latent.",
                ),
                settings_input(run_choices()),
                unconditional_input(),
                more_concepts_input(),
            ],
            accept_all_inputs=True,
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise,
        unconditional=None, **values,
    ) -> io.NodeOutput:  # fmt: skip
        check_values(cls, steps=steps, cfg=cfg, denoise=denoise)
        schedule = Schedule(seed, steps, sampler_name, scheduler, denoise)
        wanted = Conditionings(positive, unconditional, cfg)
        return io.NodeOutput(*sample_with_dng(model, schedule, wanted, concepts_from(negative, values), latent_image))


class KSamplerAdvancedDNG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KSamplerAdvancedDNG",
            display_name="KSampler Advanced (DNG)",
            category=KSampler.CATEGORY,
            description="KSampler (Advanced) with Dynamic Negative Guidance. An image is pushed away from `negative` "
            "only while it is turning into this.",
            search_aliases=["dynamic negative guidance", "dng", "ksampler advanced", "negative prompt"],
            inputs=[
                io.Model.Input("model", tooltip="The model used for denoising the input latent."),
                io.Combo.Input(
                    "add_noise",
                    options=["enable", "disable"],
                    advanced=True,
                    tooltip="Whether to add noise to the latent before the first step.",
                ),
                seed_input("noise_seed"),
                *_run_inputs(),
                io.Int.Input(
                    "start_at_step", default=0, min=0, max=10000, advanced=True, tooltip="The first step to take."
                ),
                io.Int.Input(
                    "end_at_step", default=10000, min=0, max=10000, advanced=True, tooltip="The step to stop before."
                ),
                io.Combo.Input(
                    "return_with_leftover_noise",
                    options=["disable", "enable"],
                    advanced=True,
                    tooltip="Whether to keep the noise that is left at the last step.",
                ),
                settings_input(run_choices()),
                unconditional_input(),
                more_concepts_input(),
                TRACE.Input(
                    "previous_trace",
                    optional=True,
                    tooltip="Connect this where the latent comes from another DNG sampler: it is the trace of that "
                    "sampler. The posterior then goes on from there, instead of starting at the prior again.",
                ),
            ],
            accept_all_inputs=True,
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, model, add_noise, noise_seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image,
        start_at_step, end_at_step, return_with_leftover_noise, unconditional=None, previous_trace=None, **values,
    ) -> io.NodeOutput:  # fmt: skip
        check_values(
            cls,
            add_noise=add_noise,
            steps=steps,
            cfg=cfg,
            start_at_step=start_at_step,
            end_at_step=end_at_step,
            return_with_leftover_noise=return_with_leftover_noise,
        )
        schedule = Schedule(
            noise_seed,
            steps,
            sampler_name,
            scheduler,
            disable_noise=add_noise == "disable",
            start_step=start_at_step,
            last_step=end_at_step,
            force_full_denoise=return_with_leftover_noise == "disable",
        )
        wanted, concepts = Conditionings(positive, unconditional, cfg), concepts_from(negative, values)
        return io.NodeOutput(*sample_with_dng(model, schedule, wanted, concepts, latent_image, previous_trace))


class DNGGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGGuider",
            display_name="DNG Guider",
            category=f"{KSampler.CATEGORY}/guiders",
            description="A guider with Dynamic Negative Guidance for SamplerCustomAdvanced. An image is pushed away "
            "from `negative` only while it is turning into this.",
            search_aliases=["dynamic negative guidance", "dng", "cfg guider", "guider"],
            inputs=[
                io.Model.Input("model", tooltip="The model used for denoising."),
                io.Conditioning.Input("positive", tooltip=POSITIVE_TIP),
                io.Conditioning.Input("negative", tooltip=NEGATIVE_TIP),
                cfg_input(),
                settings_input(run_choices()),
                unconditional_input(),
                more_concepts_input(),
            ],
            accept_all_inputs=True,
            outputs=[io.Guider.Output(display_name="GUIDER", tooltip="Connect this to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, unconditional=None, **values) -> io.NodeOutput:
        check_values(cls, cfg=cfg)
        return io.NodeOutput(NegativeGuider(model, positive, concepts_from(negative, values), unconditional, cfg))


NODES = [KSamplerDNG, KSamplerAdvancedDNG, DNGGuider]
