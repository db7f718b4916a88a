"""Dynamic Negative Guidance: the model patch that adds DNG to any stock sampler."""

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.sampler_helpers
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from .inputs import concepts_from, more_concepts_input, run_choices, settings_input
from .run.begin import begin_run
from .run.checks import check_conditioning, check_states, shapes_explained
from .run.concept import Concept, keys_of
from .run.hooks import WRAPPER_KEY


@dataclass(frozen=True)
class GuidedRuns:
    """ComfyUI's OUTER_SAMPLE wrapper, which guides every run of the patched model away from its concepts."""

    concepts: tuple[Concept, ...]

    def __call__(
        self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False,
        seed=None, **kwargs,
    ):  # fmt: skip
        check_states(noise, latent_image, denoise_mask)
        guider = executor.class_obj
        keys = keys_of(self.concepts)
        positive = [(entry.get("cross_attn"), entry) for entry in guider.conds.get("positive") or []]
        for key, concept in zip(keys, self.concepts, strict=True):
            check_conditioning(concept.conditioning, "negative", positive, batch=noise.shape[0])
            guider.conds[key] = comfy.sampler_helpers.convert_cond(concept.conditioning)
        run = begin_run(guider, self.concepts, keys, sampler, sigmas, noise.shape, denoise_mask, seed=seed)
        inputs = (noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
        with shapes_explained(latent_image):
            samples = executor(*inputs, **kwargs)
        run.finish()
        return samples


def has_dng_patch(model) -> bool:
    return bool(model.get_wrappers(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY))


def patch_model(model, concepts: Sequence[Concept]):
    """A clone of ``model`` that is also guided away from ``concepts``; ``model`` itself where all of them are off."""
    active = [concept for concept in concepts if concept.active]
    if not active:
        return model
    for concept in active:
        check_conditioning(concept.conditioning, "negative")
        if comfy.sampler_helpers.cond_has_hooks(concept.conditioning):
            raise ValueError(
                "the conditioning `negative` carries hooks (such as a LoRA on the prompt). ComfyUI registers hooks "
                "before a model patch can add the conditioning; use KSampler (DNG) or DNG Guider instead"
            )
    patched = model.clone()
    earlier = patched.get_wrappers(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)
    together = (*(earlier[0].concepts if earlier else ()), *active)
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, GuidedRuns(together))
    return patched


class DynamicNegativeGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DynamicNegativeGuidance",
            display_name="Dynamic Negative Guidance",
            category="advanced/guidance",
            description="Patches a model so that every stock sampler avoids `negative`, dynamically. The sampler's "
            "own positive and negative keep their meaning. The patch works at cfg 1 too. Chain several patches to "
            "avoid several things.",
            search_aliases=["dng", "negative prompt", "avoid", "model patch", "cfg 1 negative", "distilled negative"],
            inputs=[
                io.Model.Input("model", tooltip="The model to patch. Its other patches keep working."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the images should not show. If nothing is connected, the model stays unchanged.",
                ),
                settings_input(run_choices()),
                more_concepts_input(),
            ],
            accept_all_inputs=True,
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The patched model, for any stock sampler.")],
        )

    @classmethod
    def execute(cls, model, negative=None, **values) -> io.NodeOutput:
        return io.NodeOutput(patch_model(model, concepts_from(negative, values)))


NODES = [DynamicNegativeGuidance]
