"""Settings proposed from a short run without guidance."""

from collections.abc import Sequence

import comfy.samplers
from comfy_api.latest import io

from ..dng_core.calibration import Evidence, Goals, explanation, propose
from ..dng_core.settings import Settings
from .guider import NegativeGuider
from .inputs import cfg_input, float_input, reference_input, scheduler_input, seed_input, unconditional_input
from .run.concept import Concept, Reference
from .sampling import Conditionings, Schedule, run_guider

DEFAULTS = Goals()


def observe(
    model, schedule: Schedule, wanted: Conditionings, latent: dict, negatives: Sequence[list], reference: Reference
) -> list[Evidence]:
    """The evidence for each of ``negatives`` in one run without guidance. It raises what KSampler (DNG) raises."""
    settings = Settings(guidance_scale=0, prior=0.5 / len(negatives))
    concepts = [Concept(negative, settings, reference) for negative in negatives]
    guider = NegativeGuider(model, wanted.positive, concepts, wanted.unconditional, wanted.cfg, observing=True)
    run_guider(guider, model, schedule, latent)
    return guider.evidence


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGCalibrate",
            display_name="Calibrate (DNG)",
            category="DNG",
            description="Proposes `prior`, `temperature` and `offset` for a model and a thing to avoid. It measures "
            "one short run without guidance, and explains what it proposes.",
            search_aliases=["dng", "calibration", "auto settings", "tune", "prior", "temperature", "offset"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to calibrate for. It must not have a DNG patch."),
                seed_input(),
                io.Int.Input("steps", default=20, min=3, max=10000, tooltip="The number of denoising steps."),
                cfg_input(),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler_ancestral",
                    tooltip="The sampling algorithm that you will use afterwards. lcm is refused.",
                ),
                scheduler_input(),
                io.Conditioning.Input("positive", tooltip="What the images should show, as in your graph."),
                io.Conditioning.Input(
                    "negative", tooltip="What is to be avoided. Some of the images that are drawn here must show this."
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The batch to draw. It should hold 8 images or more, of the size that you work with.",
                ),
                io.Conditioning.Input(
                    "unrelated",
                    optional=True,
                    tooltip="Something that none of the images drawn here shows. Guidance away from this should stay "
                    "off. If nothing is connected, the images that do not show `negative` are taken in its place.",
                ),
                unconditional_input(),
                float_input(
                    "guidance_scale",
                    DEFAULTS.guidance_scale,
                    (0.01, 100.0, 0.01, 0.001),
                    "The guidance_scale with which you will use the settings.",
                    optional=True,
                ),
                float_input(
                    "on_by",
                    DEFAULTS.on_by,
                    (0.05, 1.0, 0.05, 0.01),
                    "The share of the steps after which guidance should be on (p above 0.5) in at least half of "
                    "the images that show `negative`.",
                    optional=True,
                ),
                float_input(
                    "below_scale",
                    DEFAULTS.below_scale,
                    (0.01, 1000.0, 0.1, 0.01),
                    "The push away from `unrelated` should stay below this value in 95 % of the images.",
                    optional=True,
                ),
                reference_input(),
            ],
            outputs=[
                io.Float.Output(display_name="prior", tooltip="The proposed prior. Connect it, or type it in."),
                io.Float.Output(display_name="temperature", tooltip="The proposed temperature."),
                io.Float.Output(
                    display_name="offset", tooltip="The proposed offset in nats. Use it with offset_form total."
                ),
                io.String.Output(display_name="text", tooltip="The proposal, and what was measured, in Markdown."),
            ],
        )

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, unrelated=None,
        unconditional=None, guidance_scale=DEFAULTS.guidance_scale, on_by=DEFAULTS.on_by,
        below_scale=DEFAULTS.below_scale, reference="auto",
    ) -> io.NodeOutput:  # fmt: skip
        if not negative:
            raise ValueError(
                "`negative` is empty, so there is nothing to calibrate for; connect what is to be avoided"
            )
        goals = Goals(on_by, below_scale, guidance_scale)
        evidence = observe(
            model,
            Schedule(seed, steps, sampler_name, scheduler),
            Conditionings(positive, unconditional, cfg),
            latent_image,
            [given for given in (negative, unrelated) if given is not None],
            reference,
        )
        proposal = propose(evidence[0], evidence[1] if len(evidence) > 1 else None, goals)
        settings, text = proposal.settings, explanation(proposal, goals)
        return io.NodeOutput(settings.prior, settings.temperature, settings.offset, text, ui={"text": [text]})


NODES = [Calibrate]
