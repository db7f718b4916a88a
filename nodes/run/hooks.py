"""The hooks by which ComfyUI's sampling run and dng_core's guidance meet at every model call.

A run's hooks live in the guider's ``model_options``, which ComfyUI copies for every run. So the hooks end with the
run, and nothing is left behind on the model.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ...dng_core.economy import places
from ...dng_core.frames import NoiseFrame
from ...dng_core.guidance import HELD, Given, Guidance, Probed, Some, Trace
from ...dng_core.kernels import at_least_float32
from .concept import Reference
from .live import LiveChart
from .part import divisible
from .regions import in_range, where_covered

WRAPPER_KEY = "dynamic_negative_guidance"


@dataclass(frozen=True)
class Evaluated:
    """What one model call evaluated, kept from ComfyUI's first hook until its second.

    Parameters
    ----------
    level: the noise level of the call, in the sampler's frame.
    positive, unconditional: the sampler's own predictions; None where ComfyUI left the unconditional one out.
    negatives: the prediction under each concept; Some where only some images were evaluated, and HELD where none were,
        to save time; None where the concept does not apply at this noise level.
    entries: the conditioning entries of each concept that apply.
    probed: the probe and the predictions at its state; None without one.
    """

    level: float
    positive: Tensor
    unconditional: Tensor | None
    negatives: list[Given]
    entries: list[list[dict]]
    probed: Probed | None


@dataclass
class Run:
    """One guided sampling run: the hooks that ComfyUI calls, and the guidance that they feed.

    Parameters
    ----------
    guider: the guider of the run; its conds hold the undesired conditionings under ``keys``.
    keys: one for each concept.
    probing: whether each concept asks for probes.
    reference: what the undesired predictions are compared with.
    guidance: made for this run.
    frame: the noise frame of the sampler's states and levels.
    chart: the live chart; None where nothing is to be drawn.
    adaptive: whether the sampler chooses its own levels. Such a sampler would try smaller and smaller steps for ever
        on a prediction that is NaN, so that each of its predictions is checked at once.
    """

    guider: comfy.samplers.CFGGuider
    keys: Sequence[str]
    probing: Sequence[bool]
    reference: Reference
    guidance: Guidance
    frame: NoiseFrame
    chart: LiveChart | None
    adaptive: bool = False
    _inner_calc: Callable[[dict], list[Tensor]] | None = None
    _evaluated: Evaluated | None = None
    _finite: list[tuple[float, Tensor]] = field(default_factory=list)
    _looked_at: dict[int, list[int]] = field(default_factory=dict)
    _end: tuple[Tensor, float] | None = None

    def install(self) -> None:
        """Hook into the run's options. Patches already there keep working, and see the unguided predictions."""
        options = self.guider.model_options
        self._inner_calc = options.get("sampler_calc_cond_batch_function")
        options["sampler_calc_cond_batch_function"] = self.calc_cond_batch
        options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), self.post_cfg]
        add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, WRAPPER_KEY, self.sampler_sample, options, True)

    def sampler_sample(self, executor, guider, sigmas, *args, **kwargs) -> Tensor:
        """Keep the state where the sampler stops, since the evidence of its last jump is still to be counted.

        Raises ValueError where that state holds NaN or infinite values.
        """
        samples = executor(guider, sigmas, *args, **kwargs)
        if not bool(torch.isfinite(samples).all()):
            broken = [level for level, finite in self._finite if not bool(finite)]
            repeated = [level for level, following in pairwise(sigmas.tolist()) if level == following]
            why = f"because the model predicted some, first at sigma {broken[0]:.4g}" if broken else "in the sampler"
            if repeated and not (broken and broken[0] >= repeated[0]):
                raise ValueError(
                    f"sampling ended in NaN or infinite values, since `sigmas` repeats the noise level "
                    f"{repeated[0]:.4g}, and this sampler divides by how far a step goes; take fewer `steps`, or "
                    "another scheduler"
                )
            raise ValueError(failed(why))
        if self.guidance.ignored():
            logging.warning(
                "Dynamic Negative Guidance: the model predicted NaN or infinite values under what is to be avoided; "
                "they did not push. Run the model in bfloat16 or float32."
            )
        # Samplers give back what ComfyUI takes for a latent, which is the state in the VE frame.
        self._end = at_least_float32(samples), self.frame.sigma(float(sigmas[-1]))
        return samples

    def calc_cond_batch(self, args: dict) -> list[Tensor]:
        """Evaluate the sampler's own conditionings and the undesired ones, in one batch where ComfyUI finds room."""
        conds = args["conds"]
        level = float(args["sigma"].flatten()[0])  # waits for the device, before the forward pass
        undesired = [self.guider.conds[key] for key in self.keys]
        active = [[c for c in entries if in_range(c, level)] for entries in undesired]
        awake = self._awake(active, self.frame.sigma(level))
        asked = [entries if rows is None or rows else [] for entries, rows in zip(active, awake, strict=True)]
        probed = self._evaluate_probe(args, level, asked)  # first: patches expect the sampler's own call to be last

        negatives: list[Given] = [HELD if entries else None for entries in active]
        whole = []
        for i, (entries, rows) in enumerate(zip(asked, awake, strict=True)):
            if rows and self._inner_calc is None and divisible(args, entries):
                negatives[i] = self._evaluate_some(args, entries, rows)
            elif entries:
                whole.append(i)
        out, extra = self._evaluate(args, conds, [asked[i] for i in whole])
        for i, negative in zip(whole, extra, strict=True):
            negatives[i] = negative
        unconditional = out[1] if conds[1] is not None else None
        self._evaluated = Evaluated(level, out[0], unconditional, negatives, active, probed)
        return out

    def _awake(self, active: list[list[dict]], sigma: float) -> list[list[int] | None]:
        """For each concept, the images to evaluate at this call, by their places in the batch; None for all.

        Where other entries apply than at the last look, by their timestep ranges, all images are looked at again.
        """
        awake = self.guidance.awake(sigma)
        for i, entries in enumerate(active):
            applying = [id(entry) for entry in entries]
            if applying != self._looked_at.get(i):
                awake[i] = None
            if awake[i] != []:
                self._looked_at[i] = applying
        return awake

    def _evaluate_some(self, args: dict, entries: list[dict], rows: Sequence[int]) -> Some:
        """The prediction under undesired entries for some images of the batch, in a call of their own."""
        index = places(rows, args["input"].device)
        of_these = {**args, "input": args["input"][index], "sigma": args["sigma"][index]}
        return Some(rows, index, self._calc(of_these, [entries])[0])

    def _evaluate(self, args: dict, conds: list, undesired: list) -> tuple[list[Tensor], list[Tensor]]:
        """The predictions under the sampler's ``conds`` and under the undesired.

        Patches that replace cross attention ("attn2": IP-Adapter, PuLID) know the positive and the unconditional by
        their places in the call. Beside such a patch, an undesired conditioning is evaluated in a call of its own, in
        its reference's place. Other patches (SAG) take note of the call that came last. So the sampler's own call,
        with all of ``conds``, is last.
        """
        replaced = args["model_options"].get("transformer_options", {}).get("patches_replace", {})
        if self._inner_calc is None and "attn2" not in replaced:
            both = self._calc(args, [*conds, *undesired])
            return both[: len(conds)], both[len(conds) :]
        place = 1 if self.reference == "auto" and args["conds"][1] is not None else 0
        extra = [self._calc(args, [*[None] * place, entries])[place] for entries in undesired]
        return list(self._inner_calc(args)) if self._inner_calc is not None else self._calc(args, conds), extra

    def _evaluate_probe(self, args: dict, level: float, asked: list[list[dict]]) -> Probed | None:
        """The reference and the undesired predictions a little way off, where the rule "probe" asks for them.

        ComfyUI evaluates one state per batch, so this is a batch of its own. (Beside a patch that evaluates
        conditionings itself, all of the sampler's are evaluated once more.)
        """
        wanted = [entries if probing else [] for entries, probing in zip(asked, self.probing, strict=True)]
        undesired = [entries for entries in wanted if entries]
        if not undesired:
            return None
        state = args["input"]
        x = self.frame.to_ve(at_least_float32(state), level)
        probe = self.guidance.probe(x, self.frame.sigma(level))
        if probe is None:
            return None
        there = {**args, "input": self.frame.from_ve(probe.x, level).to(state.dtype)}
        which = 0 if self.reference == "positive" or args["conds"][1] is None else 1
        own = [entries if place == which else None for place, entries in enumerate(args["conds"])]
        out, extra = self._evaluate(there, own, undesired)
        reference, remaining = out[which], iter(extra)
        negatives = [where_covered(next(remaining), reference, e) if e else None for e in wanted]
        return Probed(probe, reference, negatives)

    def post_cfg(self, args: dict) -> Tensor:
        """Push what the sampler would use without DNG away from the undesired concepts."""
        if self._evaluated is None:
            raise RuntimeError(
                "a patch on this model skipped the evaluation that Dynamic Negative Guidance needs; remove that patch"
            )
        said, self._evaluated = self._evaluated, None
        base = args["denoised"]
        self._finite.append((said.level, base.isfinite().all()))
        if self.reference == "cfg":
            reference = base
        elif self.reference == "positive" or said.unconditional is None:
            reference = said.positive
        else:
            reference = said.unconditional
        negatives = [
            covered(negative, reference, entries)
            for negative, entries in zip(said.negatives, said.entries, strict=True)
        ]
        x = self.frame.to_ve(at_least_float32(args["input"]), said.level)
        guided = self.guidance(x, self.frame.sigma(said.level), base, reference, negatives, said.probed)
        if self.adaptive and not bool(guided.isfinite().all()):
            raise ValueError(failed(f"because the model predicted some, first at sigma {said.level:.4g}"))
        if self.chart is not None:
            self.chart.update()
        return guided

    def finish(self) -> Trace | None:
        """Complete the chart of a run that is over; its trace, or None where nothing was tracked."""
        if self.chart is not None:
            self.chart.finish()
        return self.guidance.trace(self._end)

    @staticmethod
    def _calc(args: dict, conds: list) -> list[Tensor]:
        return comfy.samplers.calc_cond_batch(
            args["model"], conds, args["input"], args["sigma"], args["model_options"]
        )


def covered(negative: Given, reference: Tensor, entries: list[dict]) -> Given:
    """What was evaluated, with the reference where no entry reaches."""
    if isinstance(negative, Some):
        return negative._replace(negative=where_covered(negative.negative, reference[negative.at], entries))
    return where_covered(negative, reference, entries) if isinstance(negative, Tensor) else negative


def failed(why: str) -> str:
    """The error of a run that ended in NaN."""
    return (
        f"sampling ended in NaN or infinite values, {why}; run the model in bfloat16 or float32, or lower `cfg`, or "
        "`guidance_scale` if it only happens with guidance on"
    )
