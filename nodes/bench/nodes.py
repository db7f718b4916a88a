"""The nodes of the benchmark, and of the figure on economy."""

import hashlib
import time
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

CATEGORY = "DNG/benchmark"
COUNT = io.Custom("DNG_BENCH_COUNT")
TRACE = io.Custom("DNG_TRACE")  # of the pack, whose modules these nodes cannot import

COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True, "legacy": False,
    "num_head_channels": -1, "use_temporal_attention": False,
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "SD15": COMMON
    | {
        "model_channels": 320, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 8,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": False,
        "context_dim": 768, "adm_in_channels": None,
    },
    "SDXL": COMMON
    | {
        "model_channels": 320, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "num_heads": -1,
        "num_head_channels": 64, "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "use_linear_in_transformer": True,
        "context_dim": 2048, "num_classes": "sequential", "adm_in_channels": 2816,
    },
}  # fmt: skip
"""Shapes of U-Nets by the names of their configs in ``comfy.supported_models``. ComfyUI itself reads such a shape from
the weights of a checkpoint; a test checks that it finds the family in weights of these shapes."""
TOKENS = 77  # of a prompt, in CLIP's text encoders
POOLED = 1280  # the width of SDXL's pooled text


class Counter:
    """Counts the predictions of a model: the rows of all the batches that it evaluates."""

    def __init__(self) -> None:
        self.predictions = 0

    def __call__(self, executor: Any, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        self.predictions += len(x)
        return executor(x, *rest, **options)


class CountPredictions(io.ComfyNode):
    """MODEL -> the same, counted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGBenchCount",
            category=CATEGORY,
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output(), COUNT.Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """Another one each time: no run takes the counter, or the samples, of an earlier run."""
        return time.monotonic_ns()

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        counted, counter = model.clone(), Counter()
        counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "dng_bench", counter)
        return io.NodeOutput(counted, counter)


class ReportRun(io.ComfyNode):
    """What a run took, and by what its samples are known."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGBenchReport",
            category=CATEGORY,
            is_output_node=True,
            inputs=[COUNT.Input("count"), io.Latent.Input("samples")],
            outputs=[],
        )

    @classmethod
    def execute(cls, count: Counter, samples: dict[str, Any]) -> io.NodeOutput:
        values = samples["samples"].float().cpu()
        report = {
            "predictions": count.predictions,
            "finite": bool(values.isfinite().all()),
            "digest": hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest(),
        }
        return io.NodeOutput(ui={"bench": [report]})


class Seeds(io.ComfyNode):
    """The seeds of as many runs: ComfyUI executes a node once for each element of a list."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGBenchSeeds",
            category=CATEGORY,
            inputs=[io.Int.Input("first", min=0), io.Int.Input("runs", min=1)],
            outputs=[io.Int.Output(is_output_list=True)],
        )

    @classmethod
    def execute(cls, first: int, runs: int) -> io.NodeOutput:
        return io.NodeOutput([first + run for run in range(runs)])


class ReportLooks(io.ComfyNode):
    """How many undesired predictions the runs of a list evaluated, and at how many calls they did without one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGBenchLooks",
            category=CATEGORY,
            is_output_node=True,
            is_input_list=True,
            inputs=[TRACE.Input("traces")],
            outputs=[],
        )

    @classmethod
    def execute(cls, traces: list[Any]) -> io.NodeOutput:
        made, spared = (sum(counts) for counts in zip(*((t.made, t.spared) for t in traces), strict=True))
        return io.NodeOutput(ui={"figures": [{"made": made, "spared": spared}]})


class RandomNetwork(io.ComfyNode):
    """A U-Net of a known shape with random weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGBenchNetwork",
            category=CATEGORY,
            inputs=[io.Combo.Input("family", options=list(NETWORKS))],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, family: str) -> io.NodeOutput:
        return io.NodeOutput(random_model(family, NETWORKS[family]))


class RandomText(io.ComfyNode):
    """CONDITIONING of random values, in the shape of a family's text encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGBenchText",
            category=CATEGORY,
            inputs=[io.Combo.Input("family", options=list(NETWORKS)), io.Int.Input("seed", min=0)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, family: str, seed: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        text = torch.randn(1, TOKENS, NETWORKS[family]["context_dim"], generator=generator)
        return io.NodeOutput([[text, {"pooled_output": torch.randn(1, POOLED, generator=generator)}]])


def random_model(family: str, network: dict[str, Any]) -> Any:
    """A MODEL of a family of ``comfy.supported_models``, with a U-Net of the shape ``network`` and random weights.

    The weights are bfloat16 where ComfyUI computes in bfloat16, and float32 elsewhere, as on every CPU.
    """
    management = comfy.model_management
    config = getattr(comfy.supported_models, family)(network)
    config.unet_config |= network
    device, offload = management.get_torch_device(), management.unet_offload_device()
    config.set_inference_dtype(torch.bfloat16 if management.should_use_bf16(device) else torch.float32, None)
    model = config.get_model({}, device=offload)
    randomize(model.diffusion_model)
    model.eval()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)


@torch.no_grad()
def randomize(network: torch.nn.Module) -> None:
    """Draw each weight anew, with the variance 1 / inputs, under which activations neither vanish nor overflow.

    ComfyUI leaves the weights of a new network as the memory was. Biases become 0 and gains 1.
    """
    generator = torch.Generator(next(network.parameters()).device).manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            bound = (3 / weight[0].numel()) ** 0.5
            weight.uniform_(-bound, bound, generator=generator)
        else:  # one-dimensional weights are the gains of normalisations
            weight.fill_(name.endswith("weight"))


NODES: list[type[io.ComfyNode]] = [CountPredictions, ReportRun, Seeds, ReportLooks, RandomNetwork, RandomText]
