"""Public weights load in their own layouts, and compute what diffusers' UNet2DModel computes with them."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dng_core.models.checkpoints import (
    ATTENTION,
    CIFAR10_NETWORK,
    DIFFUSERS_WEIGHTS,
    OLD_ATTENTION,
    RESNET,
    load_class_only,
    load_diffusers,
    open_denoiser,
)
from dng_core.models.networks import UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

TINY = UNetConfig(16, 3, 32, (1, 2, 2), blocks_per_level=1, attention_levels=(1,))


def difference(ours: UNet, theirs: torch.nn.Module, network: UNetConfig) -> float:
    x = torch.randn(2, network.in_channels, network.image_size, network.image_size)
    timestep = torch.tensor([3, 871])
    with torch.no_grad():
        return float((ours(x, timestep) - theirs(x, timestep).sample).abs().max())


def run_module_list(state: dict[str, Tensor], network: UNetConfig, x: Tensor, timestep: Tensor) -> Tensor:
    """score_sde's DDPM forward pass, from its weights' names alone: an independent reading of the flat layout."""
    numbers = iter(range(10_000))

    def at(number: int, name: str = "") -> tuple[Tensor, Tensor]:
        key = ".".join(filter(None, (f"all_modules.{number}", name)))
        return state[f"{key}.weight"], state[f"{key}.bias"]

    def norm(x: Tensor, number: int, name: str = "") -> Tensor:
        return F.group_norm(x, 32, *at(number, name), eps=1e-6)

    def nin(x: Tensor, number: int, name: str) -> Tensor:
        key = f"all_modules.{number}.{name}"
        return torch.einsum("bchw,cd->bdhw", x, state[f"{key}.W"]) + state[f"{key}.b"][:, None, None]

    def resnet(x: Tensor) -> Tensor:
        n = next(numbers)
        h = F.conv2d(F.silu(norm(x, n, "GroupNorm_0")), *at(n, "Conv_0"), padding=1)
        h = h + F.linear(F.silu(embedding), *at(n, "Dense_0"))[:, :, None, None]
        h = F.conv2d(F.silu(norm(h, n, "GroupNorm_1")), *at(n, "Conv_1"), padding=1)
        return h + (nin(x, n, "NIN_0") if x.shape[1] != h.shape[1] else x)

    def attention(x: Tensor) -> Tensor:
        n = next(numbers)
        h = norm(x, n, "GroupNorm_0")
        q, k, v = (nin(h, n, f"NIN_{i}").flatten(2) for i in range(3))
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5, dim=-1)
        return x + nin(torch.einsum("bij,bcj->bci", weights, v).view_as(x), n, "NIN_3")

    half = network.base_channels // 2
    angles = timestep[:, None] * torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    embedding = F.linear(embedding, *at(next(numbers)))
    embedding = F.linear(F.silu(embedding), *at(next(numbers)))

    skips = [F.conv2d(x, *at(next(numbers)), padding=1)]
    levels = range(len(network.channel_multipliers))
    for i in levels:
        for _ in range(network.blocks_per_level):
            h = resnet(skips[-1])
            skips.append(attention(h) if i in network.attention_levels else h)
        if i != levels[-1]:
            skips.append(F.conv2d(F.pad(skips[-1], (0, 1, 0, 1)), *at(next(numbers), "Conv_0"), stride=2))
    h = resnet(attention(resnet(skips[-1])))
    for i in reversed(levels):
        for _ in range(network.blocks_per_level + 1):
            h = resnet(torch.cat([h, skips.pop()], dim=1))
            h = attention(h) if i in network.attention_levels else h
        if i != 0:
            h = F.conv2d(F.interpolate(h, scale_factor=2), *at(next(numbers), "Conv_0"), padding=1)
    h = F.silu(norm(h, next(numbers)))
    return F.conv2d(h, *at(next(numbers)), padding=1)


def save_diffusers(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def test_a_diffusers_folder_computes_what_diffusers_computes(tmp_path, public_unet):
    theirs = public_unet(TINY)
    ours, info = load_diffusers(save_diffusers(theirs, tmp_path / "model"))
    assert info.class_names == () and info.schedule == "linear"
    assert difference(ours, theirs, TINY) <= 1e-5


def test_the_full_size_of_the_public_cifar_10_model_loads_in_both_layouts(tmp_path, public_unet, class_only_state):
    """google/ddpm-cifar10-32's own configuration (35.7 million parameters), with random weights."""
    theirs = public_unet(CIFAR10_NETWORK)
    ours, info = load_diffusers(save_diffusers(theirs, tmp_path / "model"))
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307
    assert info.network == CIFAR10_NETWORK
    assert difference(ours, theirs, CIFAR10_NETWORK) <= 1e-5
    torch.save({"net": class_only_state(theirs, CIFAR10_NETWORK)}, tmp_path / "cars.pt")
    assert difference(load_class_only(tmp_path / "cars.pt")[0], theirs, CIFAR10_NETWORK) <= 1e-5


def test_the_attention_names_of_old_diffusers_weights_are_known(tmp_path, public_unet):
    """The public CIFAR-10 weights were saved when attention layers were called query, key, value and proj_attn."""
    theirs = public_unet(TINY)
    folder = save_diffusers(theirs, tmp_path / "model")
    old = {new: name for name, new in OLD_ATTENTION.items()}
    state = {}
    for key, value in load_file(folder / DIFFUSERS_WEIGHTS).items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.") if ".attentions." in key else key
        state[key] = value
    assert any(".proj_attn." in key for key in state) and not any(".to_q." in key for key in state)
    save_file(state, folder / DIFFUSERS_WEIGHTS)
    assert difference(load_diffusers(folder)[0], theirs, TINY) <= 1e-5


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_class_only_checkpoint_computes_what_its_layout_and_diffusers_compute(
    tmp_path, prefix, public_unet, class_only_state
):
    theirs = public_unet(TINY)
    state = class_only_state(theirs, TINY)
    torch.save({"net": {prefix + k: v for k, v in state.items()}, "epoch": 800}, tmp_path / "birds.pt")
    ours, _ = load_class_only(tmp_path / "birds.pt", TINY)
    assert difference(ours, theirs, TINY) <= 1e-5

    x, timestep = torch.randn(2, 3, 16, 16), torch.tensor([0, 999])
    with torch.no_grad():
        assert (run_module_list(state, TINY, x, timestep) - ours(x, timestep)).abs().max() <= 1e-5


def test_the_layout_names_every_part():
    assert len(RESNET) == 6 and len(ATTENTION) == 5


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"net": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_class_only(tmp_path / "evil.pt")
    assert "ran" not in capsys.readouterr().out


def test_bad_checkpoints_are_named_with_what_is_wrong(tmp_path, public_unet, class_only_state):
    torch.save({"net": class_only_state(public_unet(TINY), TINY)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="another shape"):
        load_class_only(tmp_path / "other.pt", UNetConfig(16, 3, 32, (1, 2), 1, (1,)))
    with pytest.raises(ValueError, match="another shape"):
        load_class_only(tmp_path / "other.pt")
    torch.save({"model": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="no entry 'net'"):
        load_class_only(tmp_path / "model.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"half\.pt is damaged"):
        load_class_only(tmp_path / "half.pt")
    with pytest.raises(FileNotFoundError, match="no denoiser at"):
        open_denoiser(str(tmp_path / "nothing"))


def test_bad_diffusers_folders_are_named_with_what_is_wrong(tmp_path, public_unet):
    folder = save_diffusers(public_unet(TINY), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16"),
        ({"block_out_channels": [32, 64]}, "another shape"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]}, "SkipDownBlock2D"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_diffusers(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights = (folder / DIFFUSERS_WEIGHTS).read_bytes()
    (folder / DIFFUSERS_WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_diffusers(folder)
    (folder / DIFFUSERS_WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=DIFFUSERS_WEIGHTS):
        load_diffusers(folder)


def test_a_hub_name_that_cannot_be_had_says_so(monkeypatch):
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="no local folder and could not be downloaded"):
        open_denoiser("google/ddpm-cifar10-32")


def test_a_hub_name_is_loaded_from_what_the_hub_gives(tmp_path, monkeypatch, public_unet):
    import huggingface_hub

    theirs = public_unet(TINY)
    folder = save_diffusers(theirs, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(folder))
    assert difference(open_denoiser("google/ddpm-cifar10-32")[0], theirs, TINY) <= 1e-5
