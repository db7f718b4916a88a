"""Nodes for a Gaussian mixture of which every denoised prediction and every posterior is known exactly.

Researchers and tests sample from the mixture with ComfyUI's own samplers, and compare the result with the truth.
"""

import functools
import json
import math
import re
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from comfy_api.latest import io

from ..dng_core.frames import VE, NoiseFrame
from ..dng_core.guidance import Trace
from ..dng_core.oracle import GaussianMixture, with_attributes
from ..dng_core.studies.metrics import balance_kl_renormalised
from .checks import check_values, shape_text
from .inputs import TRACE
from .run.concept import input_of
from .run.regions import used_sizes

CHANNELS, SIZE, STD = 1, 4, 0.2
"""The shape of the latents, and the standard deviation of each component. The means are standard normal in 16
dimensions, so that two of them lie some sqrt(32) = 5.7 apart, and the components hardly overlap."""
TOPICS, TOPIC_DISTANCE = 2, 45.0
"""The number of topics, and how far apart they lie: some eight times as far as two components of one topic."""
RARE = 0.1
"""P(A0) of the correlated attributes. The other values of A share the rest."""
RELATED, UNRELATED = 1 / 3, 0.02
"""P(B0 | A0), and P(B0) given any other value of A."""
KINDS = ("components", "attributes", "correlated attributes", "topics")
PREDICTIONS = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
    "flow": comfy.model_base.ModelType.FLOW,
}


@functools.cache
def mixture(components: int, kind: str = "components") -> GaussianMixture:
    """The mixture that the nodes sample from, of 1 x 4 x 4 latents. Its means are drawn with the fixed seed 0.

    ``kind``: "components" lie independently of one another. "attributes" are all pairs of two independent attributes A
    and B. "correlated attributes" are the same pairs, with a rare A0 that makes B0 likely. "topics" are two groups of
    components that lie far apart.
    """
    shape = (CHANNELS, SIZE, SIZE)
    if kind == "topics":
        if components % TOPICS:
            raise ValueError(f"the mixture of {TOPICS} topics needs an even number of `components`, not {components}")
        return GaussianMixture.topics(TOPICS, components, shape, TOPIC_DISTANCE, STD)
    if kind == "components":
        return GaussianMixture.random(components, shape, STD)
    values = attribute_values(components)
    return GaussianMixture.attributes(
        values, shape, STD, weights=_correlated(values) if kind == "correlated attributes" else None
    )


def attribute_values(components: int) -> int:
    """How many values each of the two attributes has. Raises ValueError where ``components`` is not a square."""
    values = math.isqrt(components)
    if values**2 != components:
        raise ValueError(f"two attributes need a square number of components, such as 16, not {components}")
    return values


def _correlated(values: int) -> torch.Tensor:
    others = values - 1
    weights = torch.full((values, values), (1 - RARE) / others * (1 - UNRELATED) / others)
    weights[:, 0] = (1 - RARE) / others * UNRELATED
    weights[0] = RARE * (1 - RELATED) / others
    weights[0, 0] = RARE * RELATED
    return weights


class OracleLatent(comfy.latent_formats.LatentFormat):
    scale_factor = 1.0
    latent_channels = CHANNELS
    spacial_downscale_ratio = 1


class OracleConfig(comfy.supported_models_base.BASE):
    latent_format = OracleLatent
    memory_usage_factor = 0.01

    def __init__(self) -> None:
        super().__init__({"disable_unet_model_creation": True})
        self.sampling_settings = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 0.02}


class OracleNetwork(torch.nn.Module):
    """Stands where ComfyUI expects a network. The oracle needs none, since its predictions are formulas."""

    dtype = torch.float32


class OracleModel(comfy.model_base.BaseModel):
    """The mixture as a ComfyUI model: ``apply_model`` returns the exact denoised prediction, whatever the type."""

    def __init__(self, components: int, prediction: str, kind: str) -> None:
        super().__init__(OracleConfig(), PREDICTIONS[prediction])
        self.mixture = mixture(components, kind)
        self.diffusion_model = OracleNetwork()
        self.frame = NoiseFrame("flow") if prediction == "flow" else VE

    def extra_conds(self, **kwargs):
        chosen, given = kwargs.get("oracle_components"), input_of(kwargs.get("prompt_type", "positive"))
        if chosen is None:
            raise ValueError(
                f"the conditioning {given} is none of the oracle model's: connect an Oracle Condition node"
            )
        components = len(self.mixture.weights)
        if kwargs["oracle_of"] != components:
            raise ValueError(
                f"the conditioning {given} is of a mixture of {kwargs['oracle_of']} components, the oracle model has "
                f"{components}: set `of` of its Oracle Condition node to {components}"
            )
        check_shape(kwargs["noise"], "latent_image")
        if (sizes := used_sizes(kwargs.get("area"), (SIZE, SIZE))) != [SIZE, SIZE]:
            raise ValueError(
                f"the conditioning {given} is used in an area of {shape_text(sizes)} alone, but the oracle model "
                f"knows whole samples only, {SIZE}x{SIZE}: remove the area, or use a mask"
            )
        mask = torch.zeros(1, components)
        mask[0, chosen] = 1.0
        return {"oracle_components": comfy.conds.CONDRegular(mask)}

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        wanted = kwargs["oracle_components"]
        denoised = torch.empty_like(x)
        for pattern in wanted.unique(dim=0):
            rows = (wanted == pattern).all(dim=1)
            level = float(t.flatten()[rows][0] if t.numel() > 1 else t)
            components = pattern.nonzero().flatten().tolist()
            if math.isinf(self.frame.sigma(level)):
                weights = self.mixture.weights[components]
                denoised[rows] = torch.tensordot(weights / weights.sum(), self.mixture.means[components], dims=1).to(x)
            else:
                state = self.frame.to_ve(x[rows], level)
                denoised[rows] = self.mixture.denoised(state, self.frame.sigma(level), components)
        return denoised


def check_shape(samples: torch.Tensor, name: str) -> None:
    """Raise ValueError, naming the input, for what is no batch of the mixture's samples."""
    if samples.ndim != 4 or tuple(samples.shape[1:]) != (CHANNELS, SIZE, SIZE):
        raise ValueError(
            f"`{name}` is {shape_text(samples.shape)}, not a batch of the oracle model's samples, which are "
            f"{CHANNELS}x{SIZE}x{SIZE} (channels x height x width): start from an Empty Oracle Latent node"
        )


def _kind_input() -> io.Input:
    return io.Combo.Input(
        "kind",
        optional=True,
        options=list(KINDS),
        default=KINDS[0],
        tooltip="How the components lie. components: independently of one another. attributes: one for every pair of "
        "two attributes A and B, so that their number is a square. correlated attributes: the same pairs, with a rare "
        "A0 that makes B0 likely. topics: in two groups that lie far apart.",
    )


class OracleModelNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGOracleModel",
            display_name="Oracle Model (DNG)",
            category="DNG/oracle",
            is_dev_only=True,
            description="A Gaussian mixture as a MODEL whose predictions are exact, so that samplers can be compared "
            "with the exact answer.",
            search_aliases=["gaussian mixture", "toy model", "oracle", "dng"],
            inputs=[
                io.Int.Input("components", default=8, min=2, max=64, tooltip="The number of components."),
                io.Combo.Input(
                    "prediction",
                    options=list(PREDICTIONS),
                    default="epsilon",
                    tooltip="The kind of model to imitate. epsilon and v_prediction have DDPM's linear noise "
                    "schedule, flow has that of rectified flow. The predictions of all three are exact.",
                ),
                _kind_input(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="A MODEL for any sampler. Oracle Condition gives its conditionings."
                )
            ],
        )

    @classmethod
    def execute(cls, components, prediction, kind=KINDS[0]) -> io.NodeOutput:
        check_values(cls, components=components, prediction=prediction, kind=kind)
        return io.NodeOutput(load_oracle(components, prediction, kind))


def load_oracle(components: int = 8, prediction: str = "epsilon", kind: str = KINDS[0]):
    """A ModelPatcher around the mixture of ``components``, of the kind that :func:`mixture` describes."""
    return comfy.model_patcher.ModelPatcher(
        OracleModel(components, prediction, kind),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


class OracleCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGOracleCondition",
            display_name="Oracle Condition (DNG)",
            category="DNG/oracle",
            is_dev_only=True,
            description="A conditioning for the Oracle Model. It says which components a sample may come from.",
            search_aliases=["gaussian mixture", "oracle", "dng"],
            inputs=[
                io.String.Input(
                    "components",
                    default="all",
                    tooltip="The numbers of the components, counted from 0 and separated by commas, or `all` for the "
                    "whole mixture. In a mixture of attributes, `A0` or `B1` names the value of one attribute, and "
                    "`A0 B1` the values of both.",
                ),
                io.Int.Input("of", default=8, min=2, max=64, tooltip="The number of components of the mixture."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="CONDITIONING", tooltip="A conditioning for the Oracle Model.")
            ],
        )

    @classmethod
    def execute(cls, components, of) -> io.NodeOutput:
        check_values(cls, of=of)
        return io.NodeOutput(oracle_condition(components, of))


def oracle_condition(components: str, of: int = 8) -> list:
    """CONDITIONING for "all", for comma-separated component numbers, or for attributes ("A0", "B1", "A0 B1")."""
    chosen = chosen_components(components, of)
    return [[None, {"oracle_components": chosen, "oracle_of": of, "pooled_output": None}]]


def chosen_components(components: str, of: int, name: str = "components") -> list[int]:
    """The component numbers that the input ``name`` names; raises ValueError, naming it, where it names none."""
    text = components.strip()
    attributes = re.fullmatch(r"(?:A(\d+))?\s*(?:B(\d+))?", text)
    try:
        if text == "all":
            chosen = list(range(of))
        elif text and attributes:
            a, b = (None if value is None else int(value) for value in attributes.groups())
            chosen = with_attributes(attribute_values(of), a, b)
        else:
            chosen = [int(c) for c in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"`{name}` must be `all`, numbers such as `0,3`, or attributes such as `A0 B1` of a square number of "
            f"components; {components!r} is none of these: {error}"
        ) from None
    if not chosen or not all(0 <= c < of for c in chosen):
        raise ValueError(f"`{name}` must name some that the mixture of {of} has, not {components!r}")
    return chosen


class OracleLatentNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGOracleLatent",
            display_name="Empty Oracle Latent (DNG)",
            category="DNG/oracle",
            is_dev_only=True,
            description="An empty latent of the size that the Oracle Model needs.",
            search_aliases=["gaussian mixture", "oracle", "empty latent", "dng"],
            inputs=[
                io.Int.Input("batch_size", default=1000, min=1, max=100000, tooltip="The number of samples to draw.")
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="A latent for a sampler that runs the Oracle Model.")
            ],
        )

    @classmethod
    def execute(cls, batch_size) -> io.NodeOutput:
        check_values(cls, batch_size=batch_size)
        return io.NodeOutput({"samples": torch.zeros(batch_size, CHANNELS, SIZE, SIZE)})


class OracleReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGOracleReport",
            display_name="Oracle Report (DNG)",
            category="DNG/oracle",
            is_dev_only=True,
            description="Counts where samples of the Oracle Model ended: the share of each component, the balance of "
            "those that are not forbidden, and the distance of the samples from the components.",
            search_aliases=["gaussian mixture", "oracle", "dng"],
            is_output_node=True,
            inputs=[
                io.Latent.Input("samples", tooltip="Samples of the Oracle Model."),
                io.String.Input(
                    "forbidden",
                    default="0",
                    tooltip="The components that should not appear, named as in Oracle Condition.",
                ),
                io.Int.Input(
                    "components", default=8, min=2, max=64, tooltip="The number of components of the mixture."
                ),
                _kind_input(),
                io.String.Input(
                    "wanted",
                    optional=True,
                    default="all",
                    tooltip="The components that the positive asks for, named as in Oracle Condition. The balance is "
                    "that of the components which are wanted and not forbidden.",
                ),
                io.Latent.Input(
                    "baseline",
                    optional=True,
                    tooltip="Samples from the same seed, with which the samples are compared one by one.",
                ),
                TRACE.Input(
                    "trace",
                    optional=True,
                    tooltip="The trace of the run. Its last posterior is compared with the exact one.",
                ),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The figures as JSON.")],
        )

    @classmethod
    def execute(
        cls, samples, forbidden, components, kind=KINDS[0], wanted="all", baseline=None, trace=None
    ) -> io.NodeOutput:
        check_values(cls, components=components, kind=kind)
        x, other = samples["samples"], None if baseline is None else baseline["samples"]
        check_shape(x, "samples")
        if not len(x):
            raise ValueError("`samples` holds none to report on; draw at least one")
        if other is not None and other.shape != x.shape:
            raise ValueError(
                f"`baseline` is {shape_text(other.shape)}, but `samples` {shape_text(x.shape)}; compare two "
                "batches of one size, drawn from the same seed"
            )
        if trace is not None and len(trace.sigmas) and trace.posterior.shape[2] != len(x):
            raise ValueError(
                f"`trace` is that of {trace.posterior.shape[2]} samples, but `samples` holds {len(x)}; connect the "
                "trace of the sampler that drew them"
            )
        figures = oracle_figures(
            x.float(),
            chosen_components(forbidden, components, "forbidden"),
            chosen_components(wanted, components, "wanted"),
            truth=mixture(components, kind),
            baseline=None if other is None else other.float(),
            trace=trace,
        )
        text = json.dumps(figures)
        return io.NodeOutput(text, ui={"text": [text], "figures": [figures]})


def oracle_figures(
    x: torch.Tensor,
    forbidden: list[int],
    wanted: list[int],
    truth: GaussianMixture,
    baseline: torch.Tensor | None = None,
    trace: Trace | None = None,
) -> dict[str, Any]:
    """Where the samples ended. A figure that cannot be computed is None.

    With a ``baseline``, the figures also say whether the samples are identical to it bit by bit, the RMS of the
    differences, and how many samples are forbidden here but not there (gained), and there but not here (lost). With a
    ``trace``, they hold for each concept the mean absolute error of the last tracked posterior (compared with the
    exact one of the finished samples) and the mean guidance scale at each step. A single concept stands for all
    forbidden components together; of several concepts each stands for one component.
    """
    finite = bool(torch.isfinite(x).all())
    counts = torch.bincount(truth.classify(x), minlength=len(truth.weights)).tolist()
    rest = [counts[i] for i in wanted if i not in forbidden]
    kl = balance_kl_renormalised([len(x) - sum(rest), *rest], 0)
    figures: dict[str, Any] = {
        "samples": len(x),
        "finite": finite,
        "forbidden_share": sum(counts[i] for i in forbidden) / len(x) if finite else None,
        "kl_renormalised": kl if finite and not math.isnan(kl) else None,
        "median_distance": float(truth.distance(x).median()) if finite else None,
        "counts": counts,
    }
    if baseline is not None:
        difference = float((x - baseline).square().mean().sqrt())
        is_forbidden, was_forbidden = (
            torch.isin(truth.classify(samples), torch.tensor(forbidden)) for samples in (x, baseline)
        )
        figures |= {
            "identical": torch.equal(x, baseline),
            "forbidden_gained": int((is_forbidden & ~was_forbidden).sum()),
            "forbidden_lost": int((was_forbidden & ~is_forbidden).sum()),
            "rms_change": difference if math.isfinite(difference) else None,
        }
    if trace is not None and len(trace.sigmas):
        concepts = trace.posterior.shape[1]
        sets = [forbidden] if concepts == 1 else [[i] for i in forbidden]
        if len(sets) != concepts:
            raise ValueError(
                f"`trace` is that of {concepts} concepts, but `forbidden` names {len(sets)} components; name one for "
                "each concept"
            )
        exact = torch.stack([truth.log_posterior(x, 0.0, chosen).exp() for chosen in sets]).cpu()
        errors = (trace.posterior[-1] - exact).abs().mean(dim=1).tolist()
        figures["posterior_error"] = errors if finite else None
        figures["mean_scale"] = trace.scale.mean(dim=2).T.tolist()
    return figures


NODES = [OracleModelNode, OracleCondition, OracleLatentNode, OracleReport]
