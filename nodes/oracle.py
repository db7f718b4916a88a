"""Nodes for a Gaussian mixture whose every denoiser and posterior is known: the truth, inside ComfyUI.

Researchers and tests sample from it with real samplers and compare the result with the exact answer.
"""

import functools
import json
import math

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from comfy_api.latest import io

from ..dng_core.experiments.metrics import balance_kl_renormalised
from ..dng_core.kernels import VE, NoiseFrame
from ..dng_core.oracle import GaussianMixture

CHANNELS, SIZE, STD = 1, 4, 0.2
PREDICTIONS = {
    "epsilon": comfy.model_base.ModelType.EPS,
    "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
    "flow": comfy.model_base.ModelType.FLOW,
}


@functools.cache
def mixture(components: int) -> GaussianMixture:
    """The mixture of the node: 1 x 4 x 4 latents, standard deviation 0.2, means of the fixed seed 0."""
    return GaussianMixture.random(components, (CHANNELS, SIZE, SIZE), STD)


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
    """Stands where a network would be. The model answers exactly, without one."""

    dtype = torch.float32


class OracleModel(comfy.model_base.BaseModel):
    """The mixture as a ComfyUI model: ``apply_model`` returns the exact denoised prediction, whatever the type."""

    def __init__(self, components: int, prediction: str) -> None:
        super().__init__(OracleConfig(), PREDICTIONS[prediction])
        self.mixture = mixture(components)
        self.diffusion_model = OracleNetwork()
        self.frame = NoiseFrame("flow") if prediction == "flow" else VE

    def extra_conds(self, **kwargs):
        chosen = kwargs.get("oracle_components")
        if chosen is None:
            raise ValueError("the oracle model takes its conditioning from an Oracle Condition node")
        mask = torch.zeros(1, len(self.mixture.weights))
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
                state = self.frame.scale(level) * x[rows]
                denoised[rows] = self.mixture.denoised(state, self.frame.sigma(level), components)
        return denoised


class OracleModelNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGOracleModel",
            display_name="Oracle Model (DNG)",
            category="DNG/oracle",
            description="A Gaussian mixture with exact denoisers as a MODEL, to check samplers against the truth.",
            search_aliases=["gaussian mixture", "toy model", "oracle", "dng"],
            inputs=[
                io.Int.Input("components", default=8, min=2, max=64, tooltip="Equally likely mixture components."),
                io.Combo.Input(
                    "prediction",
                    options=list(PREDICTIONS),
                    default="epsilon",
                    tooltip="The noise schedule and frame of the model: DDPM's linear chain for epsilon and "
                    "v_prediction, rectified flow for flow. Predictions are exact in all.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="For any sampler; conditioning from Oracle Condition.")
            ],
        )

    @classmethod
    def execute(cls, components, prediction) -> io.NodeOutput:
        return io.NodeOutput(load_oracle(components, prediction))


def load_oracle(components: int = 8, prediction: str = "epsilon"):
    """A ModelPatcher around the mixture of ``components``."""
    return comfy.model_patcher.ModelPatcher(
        OracleModel(components, prediction),
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
            description="Conditioning for the Oracle Model: the components that a sample may come from.",
            search_aliases=["gaussian mixture", "oracle", "dng"],
            inputs=[
                io.String.Input(
                    "components",
                    default="all",
                    tooltip="Component numbers separated by commas, counted from 0, or `all` for the whole mixture.",
                ),
                io.Int.Input("of", default=8, min=2, max=64, tooltip="How many components the mixture has."),
            ],
            outputs=[io.Conditioning.Output(display_name="CONDITIONING", tooltip="For the Oracle Model.")],
        )

    @classmethod
    def execute(cls, components, of) -> io.NodeOutput:
        return io.NodeOutput(oracle_condition(components, of))


def oracle_condition(components: str, of: int = 8) -> list:
    """CONDITIONING for "all" or for comma-separated component numbers."""
    try:
        chosen = list(range(of)) if components.strip() == "all" else [int(c) for c in components.split(",")]
    except ValueError:
        raise ValueError(f"`components` must be `all` or numbers such as `0,3`, not {components!r}") from None
    if not chosen or not all(0 <= c < of for c in chosen):
        raise ValueError(f"`components` must name numbers from 0 to {of - 1}, not {components!r}")
    return [[None, {"oracle_components": chosen, "pooled_output": None}]]


class OracleLatentNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGOracleLatent",
            display_name="Empty Oracle Latent (DNG)",
            category="DNG/oracle",
            description="An empty latent of the Oracle Model's size.",
            search_aliases=["gaussian mixture", "oracle", "empty latent", "dng"],
            inputs=[io.Int.Input("batch_size", default=1000, min=1, max=100000, tooltip="How many samples to draw.")],
            outputs=[io.Latent.Output(display_name="LATENT", tooltip="For a sampler that runs the Oracle Model.")],
        )

    @classmethod
    def execute(cls, batch_size) -> io.NodeOutput:
        return io.NodeOutput({"samples": torch.zeros(batch_size, CHANNELS, SIZE, SIZE)})


class OracleReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGOracleReport",
            display_name="Oracle Report (DNG)",
            category="DNG/oracle",
            description="Where samples of the Oracle Model ended up: share of each component, balance, distance.",
            search_aliases=["gaussian mixture", "oracle", "dng"],
            is_output_node=True,
            inputs=[
                io.Latent.Input("samples", tooltip="Samples of the Oracle Model."),
                io.String.Input("forbidden", default="0", tooltip="Component numbers that should not appear."),
                io.Int.Input("components", default=8, min=2, max=64, tooltip="How many components the mixture has."),
            ],
            outputs=[io.String.Output(display_name="text", tooltip="The figures as JSON.")],
        )

    @classmethod
    def execute(cls, samples, forbidden, components) -> io.NodeOutput:
        truth = mixture(components)
        x = samples["samples"].float()
        unwanted = oracle_condition(forbidden, components)[0][1]["oracle_components"]
        counts = torch.bincount(truth.classify(x), minlength=components).tolist()
        removed = sum(counts[i] for i in unwanted)
        rest = [count for i, count in enumerate(counts) if i not in unwanted]
        figures = {
            "samples": len(x),
            "finite": bool(torch.isfinite(x).all()),
            "forbidden_share": removed / len(x),
            "kl_renormalised": balance_kl_renormalised([removed, *rest], 0),
            "median_distance": float(truth.distance(x).median()),
            "counts": counts,
        }
        text = json.dumps(figures)
        return io.NodeOutput(text, ui={"text": [text], "figures": [figures]})


NODES = [OracleModelNode, OracleCondition, OracleLatentNode, OracleReport]
