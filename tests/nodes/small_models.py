"""ComfyUI's own architectures, built small with random weights: one of each family that samples in its own way.

Loaded by path from conftest.py, since the tests' folders are not on sys.path.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.nested_tensor
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models as known
import pytest
import torch
from torch import Tensor

CPU = torch.device("cpu")
UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "context_dim": 16,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "num_heads": -1,
    "num_head_channels": 16,
}
SDXL_UNET = UNET | {"adm_in_channels": 8 + 6 * 256, "num_classes": "sequential", "use_linear_in_transformer": True}
MMDIT = {
    "input_size": None,
    "patch_size": 2,
    "in_channels": 16,
    "depth": 1,
    "pos_embed_max_size": 8,
    "num_patches": 64,
    "adm_in_channels": 8,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}},
    "pos_embed_scaling_factor": None,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 8,
    "context_in_dim": 16,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "dim": 48,
    "ffn_dim": 64,
    "freq_dim": 16,
    "text_dim": 16,
    "num_heads": 2,
    "num_layers": 1,
    "text_len": 8,
}
LTXAV = {
    "image_model": "ltxav",
    "in_channels": 8,
    "audio_in_channels": 128,
    "cross_attention_dim": 32,
    "audio_cross_attention_dim": 32,
    "attention_head_dim": 16,
    "audio_attention_head_dim": 16,
    "num_attention_heads": 2,
    "audio_num_attention_heads": 2,
    "caption_channels": 16,
    "num_layers": 1,
    "connector_attention_head_dim": 16,
    "connector_num_attention_heads": 1,
    "connector_num_layers": 1,
}
PIXELDIT = {
    "image_model": "pixeldit_t2i",
    "num_groups": 2,
    "hidden_size": 32,
    "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 32,
    "pixel_num_groups": 2,
    "patch_depth": 1,
    "pixel_depth": 1,
    "patch_size": 4,
    "txt_embed_dim": 16,
    "txt_max_length": 8,
}


@dataclass(frozen=True)
class Family:
    """How to build a model of a family, and the shapes that its latents (one, or several packed) have.

    ``config`` is the family's name in ``comfy.supported_models``; a ComfyUI that lacks it has no test of the family.
    """

    config: str
    network: dict[str, Any]
    latent: tuple[tuple[int, ...], ...]
    model: Callable[[Any], Any] | None = None

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        """A ModelPatcher with random weights stored in ``dtype``; those that CPUs cannot compute in are cast."""
        if not hasattr(known, self.config):
            pytest.skip(f"this ComfyUI does not know the family {self.config}")
        config = getattr(known, self.config)(self.network)
        config.unet_config |= self.network
        config.set_inference_dtype(dtype, torch.float32 if dtype.itemsize < 2 else None)
        model = self.model(config) if self.model else config.get_model({}, device=CPU)
        randomize(model.diffusion_model, seed)
        model.eval()
        return comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)

    def empty(self, batch: int = 2) -> dict:
        """An empty LATENT."""
        parts = [torch.zeros(batch, *shape) for shape in self.latent]
        return {"samples": parts[0] if len(parts) == 1 else comfy.nested_tensor.NestedTensor(parts)}


def v_prediction(config: Any) -> Any:
    return comfy.model_base.BaseModel(config, comfy.model_base.ModelType.V_PREDICTION, device=CPU)


FAMILIES = {
    "epsilon UNet (SD 1.5)": Family("SD15", UNET, ((4, 8, 8),)),
    "v-prediction UNet (SD 2.1)": Family("SD20", UNET, ((4, 8, 8),), v_prediction),
    "UNet with ADM (SDXL)": Family("SDXL", SDXL_UNET, ((4, 8, 8),)),
    "MMDiT (SD3)": Family("SD3", MMDIT, ((16, 8, 8),)),
    "distilled guidance (Flux)": Family("Flux", FLUX, ((16, 8, 8),)),
    "video (Wan)": Family("WAN21_T2V", WAN, ((16, 3, 8, 8),)),
    "packed video and audio (LTXAV)": Family("LTXAV", LTXAV, ((8, 2, 4, 4), (8, 6, 16))),
    "pixel space (PixelDiT)": Family("PixelDiTT2I", PIXELDIT, ((3, 16, 16),)),
}


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Every weight drawn anew, scaled by its inputs; gains near 1. ComfyUI leaves them uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(module.state_dict().items()):
        if not weight.is_floating_point():
            continue
        drawn = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            drawn = drawn / max(weight[0].numel(), 1) ** 0.5
        else:
            drawn = 0.1 * drawn + ("norm" in name and name.endswith("weight"))
        weight.copy_(drawn)


def prompt(seed: int, tokens: int = 5, width: int = 16, **extra: Any) -> list:
    """CONDITIONING of random embeddings, as a text encoder would give it."""
    generator = torch.Generator().manual_seed(1000 + seed)
    embedding = torch.randn(1, tokens, width, generator=generator)
    return [[embedding, {"pooled_output": torch.randn(1, 8, generator=generator)} | extra]]


def small_clip() -> Any:
    """Stable Diffusion 1.5's text encoder with ComfyUI's real tokenizer, 16 wide, with random weights."""
    config = {
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "eos_token_id": 49407,
    }
    text_model = functools.partial(comfy.sd1_clip.SDClipModel, textmodel_json_config=config)

    class Target:
        params: dict = {}
        tokenizer = comfy.sd1_clip.SD1Tokenizer
        clip = comfy.sd1_clip.SD1ClipModel

    clip = comfy.sd.CLIP(Target, model_options={"clip_l_class": text_model, "load_device": CPU, "offload_device": CPU})
    randomize(clip.cond_stage_model, 0)
    return clip


def parts(samples: Any) -> Sequence[Tensor]:
    """The tensors of a latent, packed or not."""
    return samples.unbind() if samples.is_nested else [samples]
