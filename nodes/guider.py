"""The guider that samples away from concepts and keeps the trace: what every DNG sampler node runs."""

import math
from collections.abc import Sequence

import comfy.samplers

from ..dng_core.calibration import Evidence, evidence_of
from ..dng_core.guidance import NegativeGuidance, Trace
from .patch import has_dng_patch
from .run.begin import begin_run
from .run.checks import check_conditioning, check_states, check_unconditional, shapes_explained
from .run.concept import Concept, keys_of
from .run.samplers import name_of


class NegativeGuider(comfy.samplers.CFGGuider):
    """A CFGGuider that also guides away from concepts.

    Parameters
    ----------
    previous: the trace of an earlier run, if the next run goes on from its latent.
    observing: also track concepts whose guidance scale is 0. Such a run has no live chart.

    After a run, ``trace`` holds what was tracked, and is None where nothing was tracked. ``evidence`` holds what was
    observed of each concept, and is empty unless ``observing``; ``shape`` is that of one image's state.
    """

    def __init__(
        self,
        model,
        positive,
        concepts: Sequence[Concept],
        unconditional,
        cfg: float,
        previous: Trace | None = None,
        observing: bool = False,
    ) -> None:
        super().__init__(model)
        self.previous = previous
        self._observing = observing
        self._concepts = [concept for concept in concepts if concept.active or observing]
        if self._concepts and has_dng_patch(model):
            raise ValueError(
                "the model already carries a Dynamic Negative Guidance patch, so that the push would be applied "
                "twice; use either the patch with a stock sampler, or a DNG sampler with the unpatched model"
            )
        if not math.isclose(cfg, 1.0) and unconditional is None:
            raise ValueError(
                f"cfg is {cfg:g}, which needs an unconditional prediction: connect `unconditional` (usually an empty "
                "prompt), or set cfg to 1. In this node `negative` is what to avoid, and no replacement for it"
            )
        check_conditioning(positive, "positive")
        check_conditioning(unconditional or [], "unconditional")
        for concept in concepts:
            check_conditioning(concept.conditioning, "negative", positive)
        if unconditional and _has_image(positive) and not _has_image(unconditional):
            raise ValueError(
                "`positive` carries an image (inpainting or image-to-video), but `unconditional` does not, so that "
                "classifier-free guidance would compare two images: pass the empty prompt through the same node as "
                "`positive`"
            )
        self.trace: Trace | None = None
        self.evidence: list[Evidence] = []
        self.shape: tuple[int, ...] = ()
        conds = {"positive": positive}
        if unconditional is not None:
            conds["negative"] = unconditional
        self._keys = keys_of(self._concepts)
        self.inner_set_conds(conds | {k: c.conditioning for k, c in zip(self._keys, self._concepts, strict=True)})
        self.set_cfg(cfg)

    def sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        check_states(noise, latent_image, denoise_mask)
        with shapes_explained(latent_image):
            return super().sample(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)

    def outer_sample(
        self, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None,
        **kwargs,
    ):  # fmt: skip
        self.trace = None
        inputs = (noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
        if not self._concepts:
            check_unconditional(name_of(sampler), self.conds.get("negative"))
            return super().outer_sample(*inputs, **kwargs)
        for concept in self._concepts:
            check_conditioning(concept.conditioning, "negative", batch=noise.shape[0])
        tracked = (sampler, sigmas, noise.shape, denoise_mask, self.previous, seed)
        run = begin_run(self, self._concepts, self._keys, *tracked, charted=not self._observing)
        samples = super().outer_sample(*inputs, **kwargs)
        trace = run.finish()
        if trace is None:  # a baseline tracks nothing, and hands the trace before it on
            trace = self.previous
        elif self.previous is not None:
            trace = self.previous.then(trace)
        self.trace = trace
        if self._observing and isinstance(run.guidance, NegativeGuidance):
            self.evidence, self.shape = evidence_of(run.guidance), tuple(noise.shape[1:])
        return samples


def _has_image(conditioning: list) -> bool:
    return any("concat_latent_image" in options for _, options in conditioning)
