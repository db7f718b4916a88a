"""The guider that samples away from concepts and keeps the trace: what every DNG sampler node runs."""

import math
from collections.abc import Sequence

import comfy.samplers

from ..dng_core.guidance import Trace
from .bridge import Concept, begin_run, check_conditioning, check_unconditional, seed_of
from .patch import has_dng_patch
from .sampler_kernels import name_of


class NegativeGuider(comfy.samplers.CFGGuider):
    """A CFGGuider that also guides away from concepts. ``trace`` is that of the last run; None if it was unguided."""

    def __init__(
        self, model, positive, concepts: Sequence[Concept], unconditional, cfg: float, previous: Trace | None = None
    ) -> None:
        super().__init__(model)
        self._previous = previous
        self._concepts = [concept for concept in concepts if concept.active]
        if self._concepts and has_dng_patch(model):
            raise ValueError(
                "the model already carries a Dynamic Negative Guidance patch; use either the patch with a stock "
                "sampler or a DNG sampler with the unpatched model, or the push would be applied twice"
            )
        if not math.isclose(cfg, 1.0) and unconditional is None:
            raise ValueError(
                f"cfg is {cfg:g}, which needs an unconditional prediction: connect `unconditional` (usually an empty "
                "prompt), or set cfg to 1. `negative` is what to avoid here, so it cannot stand in for it"
            )
        check_conditioning(positive, "positive")
        check_conditioning(unconditional or [], "unconditional")
        for concept in concepts:
            check_conditioning(concept.conditioning, "negative", positive)
        if unconditional and _has_image(positive) and not _has_image(unconditional):
            raise ValueError(
                "`positive` carries an image (inpainting or image-to-video), `unconditional` does not: pass the empty "
                "prompt through the same node as `positive`, or classifier-free guidance would compare two images"
            )
        self.trace: Trace | None = None
        conds = {"positive": positive}
        if unconditional is not None:
            conds["negative"] = unconditional
        self._keys = [f"dng_{i}" for i in range(len(self._concepts))]
        self.inner_set_conds(conds | {k: c.conditioning for k, c in zip(self._keys, self._concepts, strict=True)})
        self.set_cfg(cfg)

    def outer_sample(self, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        self.trace = None
        if not self._concepts:
            check_unconditional(name_of(sampler), self.conds.get("negative"))
            return super().outer_sample(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        for concept in self._concepts:
            check_conditioning(concept.conditioning, "negative", batch=noise.shape[0])
        seed = seed_of(args, kwargs)
        run = begin_run(
            self, self._concepts, self._keys, sampler, sigmas, noise.shape, denoise_mask, self._previous, seed
        )
        samples = super().outer_sample(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        run.finish()
        trace = run.trace()
        self.trace = trace if self._previous is None else self._previous.then(trace)
        return samples


def _has_image(conditioning: list) -> bool:
    return any("concat_latent_image" in options for _, options in conditioning)
