"""A checkpoint that ComfyUI takes for Stable Diffusion 1.5: its text encoder, a small U-Net and TAESD, at random."""

import json
from pathlib import Path

import torch

PREFIX = "model.diffusion_model."
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,  # by which, and the width of the text encoder, ComfyUI knows the family
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1],
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
}


def write_small_checkpoint(path: Path) -> None:
    """Write it (300 MB, most of it the text encoder); ComfyUI must be importable."""
    import comfy.clip_model
    import comfy.ops
    import comfy.taesd.taesd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from safetensors.torch import save_file

    torch.manual_seed(0)
    half, operations = torch.float16, comfy.ops.disable_weight_init
    text = json.loads(Path(comfy.__path__[0], "sd1_clip_config.json").read_text(encoding="utf-8"))
    parts = {
        PREFIX: UNetModel(**UNET, dtype=half, device="cpu", operations=operations),
        "cond_stage_model.transformer.": comfy.clip_model.CLIPTextModel(text, half, "cpu", operations),
        "first_stage_model.": comfy.taesd.taesd.TAESD(),
    }
    weights = {
        prefix + name: _random(value) for prefix, part in parts.items() for name, value in part.state_dict().items()
    }
    save_file(weights, path)


def _random(value: torch.Tensor) -> torch.Tensor:
    """Values of that shape under which activations neither vanish nor overflow."""
    fan_in = value[0].numel() if value.ndim > 1 else 1
    return torch.randn(value.shape, dtype=torch.float16) / (2 * max(fan_in, 4) ** 0.5)
