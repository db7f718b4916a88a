"""Public denoisers in their own layouts: diffusers folders, and the class-only checkpoints of the paper's authors.

Both become a :class:`~.networks.UNet` on the linear chain, on which they were trained. Only files that cannot run code
are read: safetensors, JSON, and torch files with ``weights_only``.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import read_json
from .networks import UNet, UNetConfig
from .weight_files import DenoiserInfo, filled, load_denoiser, shipped_denoisers

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
UNCONDITIONAL: tuple[str, ...] = ()
DIFFUSERS_FIXED = {  # the only value of each that this U-Net can have; a config may leave them out
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "time_embedding_type": "positional",
    "attention_head_dim": None,
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15
CIFAR10_NETWORK = UNetConfig(image_size=32, in_channels=3)  # Ho et al. (2020): both public CIFAR-10 models
RESNET = {"GroupNorm_0": "norm1", "Conv_0": "conv1", "Dense_0": "time_emb_proj", "GroupNorm_1": "norm2",
          "Conv_1": "conv2", "NIN_0": "conv_shortcut"}  # fmt: skip
ATTENTION = {"GroupNorm_0": "group_norm", "NIN_0": "to_q", "NIN_1": "to_k", "NIN_2": "to_v", "NIN_3": "to_out.0"}


def open_denoiser(source: str, class_only: UNetConfig = CIFAR10_NETWORK) -> tuple[UNet, DenoiserInfo]:
    """A denoiser by the name of a shipped one, a file, a diffusers folder, or a repository on the Hugging Face hub.

    Parameters
    ----------
    source: a name of :func:`shipped_denoisers`; a ``.safetensors`` file of `dng train`; a ``.pt`` file of the paper's
        authors; a folder with ``config.json``; else "owner/name" on the hub, downloaded by its own client.
    class_only: the shape of the network in a ``.pt`` file, which does not contain the shape.

    Raises
    ------
    FileNotFoundError: if nothing is found under that name.
    ValueError: if the weights are damaged, or of another shape.
    """
    shipped = shipped_denoisers()
    if source in shipped:
        return load_denoiser(shipped[source])
    path = Path(source)
    if path.is_dir():
        return load_diffusers(path)
    if path.suffix == ".safetensors":
        return load_denoiser(path)
    if path.suffix in (".pt", ".pth"):
        return load_class_only(path, class_only)
    if source.count("/") == 1 and not source.startswith((".", "/")):
        return load_diffusers(download(source))
    raise FileNotFoundError(
        f"no denoiser at {source!r}: give one of {', '.join(shipped)}, a .safetensors or .pt file, a folder with "
        f"config.json and {DIFFUSERS_WEIGHTS}, or owner/name on the Hugging Face hub"
    )


def load_diffusers(folder: Path) -> tuple[UNet, DenoiserInfo]:
    """Read an unconditional ``UNet2DModel`` (config.json, safetensors); errors as :func:`open_denoiser`."""
    config_file, weights = folder / "config.json", folder / DIFFUSERS_WEIGHTS
    for path in (config_file, weights):
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {folder}: copy or download the whole folder again")
    try:
        raw = read_json(config_file)
        state_dict = load_file(weights)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged file ({error}): copy or download it again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{config_file} describes no network: it holds no JSON object")
    network = _diffusers_network(config_file, raw)
    renamed = {_new_attention_name(key): value for key, value in state_dict.items()}
    return filled(weights, lambda: UNet(network), renamed), _info(folder.name, network)


def load_class_only(path: Path, network: UNetConfig = CIFAR10_NETWORK) -> tuple[UNet, DenoiserInfo]:
    """Read a checkpoint of the paper's authors: its entry "net" is a state dict of score_sde's DDPM U-Net.

    That layout is one flat list of modules, ``all_modules.N``, in the order in which the network calls them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors ({error}): fetch it again") from error
    if not isinstance(content, dict) or not isinstance(content.get("net"), Mapping):
        raise ValueError(f"{path} has no entry 'net' with a state dict, as the authors' class-only checkpoints do")
    raw = {str(key).removeprefix("module."): value for key, value in content["net"].items()}
    return filled(path, lambda: UNet(network), _from_module_list(path, raw, network)), _info(path.stem, network)


def download(repository: str) -> Path:
    """The folder with a hub repository's config and weights; they are fetched unless the hub's cache has them."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise ValueError(
            f"to download {repository}, huggingface_hub is needed: pip install huggingface_hub, or name a folder"
        ) from error
    try:
        return Path(snapshot_download(repository, allow_patterns=["config.json", DIFFUSERS_WEIGHTS]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{repository} is no local folder and could not be downloaded ({error})") from error


def _diffusers_network(path: Path, raw: dict[str, Any]) -> UNetConfig:
    if raw.get("_class_name") != "UNet2DModel":
        raise ValueError(f"{path} describes a {raw.get('_class_name')}, not an unconditional UNet2DModel")
    try:
        for name, wanted in DIFFUSERS_FIXED.items():
            if raw.get(name, wanted) != wanted:
                raise ValueError(f"{name} is {raw[name]!r}; only {wanted!r} is known")
        if raw["out_channels"] != raw["in_channels"]:
            raise ValueError("out_channels differs from in_channels; only noise predictions are known")
        down, up = raw["down_block_types"], raw["up_block_types"]
        if unknown := {*down} - {"DownBlock2D", "AttnDownBlock2D"}:
            raise ValueError(f"down_block_types has {', '.join(sorted(unknown))}")
        attention = tuple(i for i, kind in enumerate(down) if kind == "AttnDownBlock2D")
        expected = [("AttnUpBlock2D" if i in attention else "UpBlock2D") for i in reversed(range(len(down)))]
        if list(up) != expected:
            raise ValueError(f"up_block_types is {up}; only the mirror image of down_block_types is known")
        channels = raw["block_out_channels"]
        if any(c % channels[0] for c in channels):
            raise ValueError("block_out_channels are not multiples of the first")
        return UNetConfig(
            image_size=raw["sample_size"],
            in_channels=raw["in_channels"],
            base_channels=channels[0],
            channel_multipliers=tuple(c // channels[0] for c in channels),
            blocks_per_level=raw["layers_per_block"],
            attention_levels=attention,
        )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path} describes a network of another shape than this U-Net's: {error}") from error


def _new_attention_name(key: str) -> str:
    parts = key.split(".")
    if "attentions" in parts:
        parts = [OLD_ATTENTION.get(part, part) for part in parts]
    return ".".join(parts)


def module_list_order(network: UNetConfig) -> list[tuple[str, dict[str, str] | None]]:
    """For each of score_sde's modules, in order: our prefix, and our names for its parts (None: it has no parts)."""
    last = len(network.channel_multipliers) - 1
    order: list[tuple[str, dict[str, str] | None]] = [
        ("time_embedding.linear_1", None),
        ("time_embedding.linear_2", None),
        ("conv_in", None),
    ]
    for i in range(last + 1):
        for j in range(network.blocks_per_level):
            order.append((f"down_blocks.{i}.resnets.{j}", RESNET))
            if i in network.attention_levels:
                order.append((f"down_blocks.{i}.attentions.{j}", ATTENTION))
        if i != last:
            order.append((f"down_blocks.{i}.downsamplers.0", {"Conv_0": "conv"}))
    order += [
        ("mid_block.resnets.0", RESNET),
        ("mid_block.attentions.0", ATTENTION),
        ("mid_block.resnets.1", RESNET),
    ]
    for i in range(last + 1):
        for j in range(network.blocks_per_level + 1):
            order.append((f"up_blocks.{i}.resnets.{j}", RESNET))
            if last - i in network.attention_levels:
                order.append((f"up_blocks.{i}.attentions.{j}", ATTENTION))
        if i != last:
            order.append((f"up_blocks.{i}.upsamplers.0", {"Conv_0": "conv"}))
    return [*order, ("conv_norm_out", None), ("conv_out", None)]


def _from_module_list(path: Path, raw: Mapping[str, Tensor], network: UNetConfig) -> dict[str, Tensor]:
    order = module_list_order(network)
    result: dict[str, Tensor] = {}
    for key, value in raw.items():
        if not key.startswith("all_modules."):
            continue  # buffers of the noise schedule
        _, number, *rest = key.split(".")
        prefix, parts = order[int(number)] if number.isdecimal() and int(number) < len(order) else ("", {})
        if parts is not None and (not rest or rest[0] not in parts):
            raise ValueError(f"{path} holds a network of another shape: {key} has no place in it")
        name = prefix if parts is None else f"{prefix}.{parts[rest.pop(0)]}"
        if rest == ["W"]:  # a dense layer over channels, (in, out)
            value = value.T[:, :, None, None] if name.endswith("conv_shortcut") else value.T
            rest = ["weight"]
        result[".".join([name, *("bias" if part == "b" else part for part in rest)])] = value
    return result


def _info(name: str, network: UNetConfig) -> DenoiserInfo:
    return DenoiserInfo(name, network, "linear", (-1.0, 1.0), UNCONDITIONAL)
