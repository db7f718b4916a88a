"""Everything that ComfyUI attaches to a conditioning, on its own UNet with random weights.

One step of euler gives the denoised prediction itself. So the guided image must be what the method makes of the
images that the stock KSampler draws with each conditioning alone, D_u + w (D_p - D_u) - lambda (D_n - D_u).
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

CFG, SCALE = 3.0, 1 / 7
ROLES = ["positive", "unconditional", "negative"]


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    """Models that the tests of this file share: runs leave nothing on them."""
    return {}


@pytest.fixture
def model(networks: Any, shared: dict[str, Any]) -> Any:
    return shared.setdefault("SD", networks.FAMILIES["epsilon UNet (SD 1.5)"].build())


def prompts(networks: Any) -> dict[str, list]:
    return {role: networks.prompt(seed) for seed, role in enumerate(ROLES)}


def one_step(bench: Any, model: Any, conditioning: list, batch: int = 2) -> Tensor:
    """The denoised prediction under one conditioning, by the stock KSampler at cfg 1."""
    return bench.sample(
        model, latent(batch), steps=1, cfg=1.0, sampler_name="euler", scheduler="simple", positive=conditioning
    )


def guided(bench: Any, model: Any, conds: dict[str, list], cfg: float = CFG, **changes: Any) -> Tensor:
    concept = bench.concept(conds["negative"], **changes)
    return bench.dng(
        model,
        concept,
        latent(2),
        steps=1,
        cfg=cfg,
        sampler_name="euler",
        scheduler="simple",
        positive=conds["positive"],
        unconditional=conds["unconditional"],
    )[0]


def latent(batch: int) -> dict:
    return {"samples": torch.zeros(batch, 4, 8, 8)}


def expected(positive: Tensor, unconditional: Tensor, negative: Tensor) -> Tensor:
    return unconditional + CFG * (positive - unconditional) - SCALE * (negative - unconditional)


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


# What may be attached to any of the three


def control(networks: Any, to_uncond: bool = False, strength: float = 1.0) -> dict[str, Any]:
    """A ControlNet with random weights and a random hint."""
    controlnet = importlib.import_module("comfy.controlnet")
    unused = ("out_channels", "transformer_depth_output", "use_temporal_attention")
    config = {k: v for k, v in networks.UNET.items() if k not in unused}
    network = importlib.import_module("comfy.cldm.cldm").ControlNet(**config, hint_channels=3)
    networks.randomize(network, 7)
    net = controlnet.ControlNet(network.eval(), load_device=networks.CPU)
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"control": net.set_cond_hint(hint, strength), "control_apply_to_uncond": to_uncond}


def lora_hooks(networks: Any) -> dict[str, Any]:
    """Hooks that change weights of the network while this conditioning is evaluated, as a LoRA on a prompt does."""
    hooks = importlib.import_module("comfy.hooks")
    other = networks.FAMILIES["epsilon UNet (SD 1.5)"].build(seed=9).model.state_dict()
    weights = {k: v for k, v in other.items() if "attn2" in k}
    return {"hooks": hooks.create_hook_model_as_lora(weights, None, 0.7, 0.0)}


def left_mask(networks: Any) -> dict[str, Any]:
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1.0
    return {"mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False}


def add(extra: Callable[[Any], dict]) -> Callable[[Any, list], list]:
    return lambda networks, conditioning: [[c[0], c[1] | extra(networks)] for c in conditioning]


ATTACHED: dict[str, Callable[[Any, list], list]] = {
    "ControlNet": add(control),
    "LoRA hooks": add(lora_hooks),
    "combined": lambda networks, conditioning: conditioning + networks.prompt(11),
    "two regions": lambda networks, conditioning: [
        *add(left_mask)(networks, conditioning),
        *add(lambda n: {"mask": 1 - left_mask(n)["mask"], "mask_strength": 1.0})(networks, networks.prompt(11)),
    ],
    "longer prompt": lambda networks, conditioning: networks.prompt(12, tokens=7),
    "within its range": add(lambda networks: {"start_percent": 0.0, "end_percent": 0.5}),
    "default for the rest": lambda networks, conditioning: [
        *add(left_mask)(networks, conditioning),
        *add(lambda n: {"default": True})(networks, networks.prompt(11)),
    ],
    "a prompt for each image": lambda networks, conditioning: [
        [torch.cat([conditioning[0][0], networks.prompt(13)[0][0]]), conditioning[0][1]]
    ],
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("what", ATTACHED)
def test_what_is_attached_counts_where_it_is_attached(bench, networks, model, what, role):
    conds = prompts(networks)
    plain = one_step(bench, model, conds[role])
    conds[role] = ATTACHED[what](networks, conds[role])
    alone = {name: one_step(bench, model, cond) for name, cond in conds.items()}
    if what != "within its range":
        assert not torch.allclose(alone[role], plain, rtol=1e-2)
    close(guided(bench, model, conds), expected(*alone.values()))

    stock = bench.sample(
        model, latent(2), steps=1, cfg=CFG, sampler_name="euler", scheduler="simple",
        positive=conds["positive"], negative=conds["unconditional"],
    )  # fmt: skip
    assert torch.equal(guided(bench, model, conds, guidance_scale=0.0), stock)


def test_a_controlnet_for_all_reaches_the_undesired_too(bench, networks, model):
    """ComfyUI's older ControlNet node: what it sets on the positive holds for every other conditioning."""
    conds = prompts(networks)
    conds["positive"] = add(lambda n: control(n, to_uncond=True))(networks, conds["positive"])
    everywhere = {role: add(control)(networks, cond) for role, cond in prompts(networks).items()}
    alone = [one_step(bench, model, cond) for cond in everywhere.values()]
    close(guided(bench, model, conds), expected(*alone))


def test_a_region_of_the_undesired_pushes_there_only(bench, networks, model):
    conds = prompts(networks)
    alone = [one_step(bench, model, cond) for cond in conds.values()]
    everywhere, nowhere = expected(*alone), expected(alone[0], alone[1], alone[1])
    conds["negative"] = add(left_mask)(networks, conds["negative"])
    out = guided(bench, model, conds)
    close(out[..., :4], everywhere[..., :4])
    close(out[..., 4:], nowhere[..., 4:])
    conds["negative"] = add(lambda n: {"area": (8, 4, 0, 0), "strength": 1.0})(networks, prompts(networks)["negative"])
    close(guided(bench, model, conds), out)


def test_an_area_of_the_positive_is_the_stock_samplers(bench, networks, model):
    """ComfyUI evaluates every other conditioning in that area too, the undesired one included."""
    conds = prompts(networks)
    small = add(lambda n: {"area": (8, 4, 0, 0), "strength": 1.0})(networks, networks.prompt(11))
    conds["positive"] = conds["positive"] + small
    options = {"steps": 1, "cfg": CFG, "sampler_name": "euler", "scheduler": "simple", "positive": conds["positive"]}
    base = bench.sample(model, latent(2), negative=conds["unconditional"], **options)
    # D_p and D_u as the stock sampler has them, from two runs at other cfg scales: it is linear in the scale.
    other = bench.sample(model, latent(2), negative=conds["unconditional"], **options | {"cfg": CFG + 1})
    positive_less_unconditional = other - base
    unconditional = base - CFG * positive_less_unconditional
    swapped = bench.sample(model, latent(2), negative=conds["negative"], **options)
    swapped_other = bench.sample(model, latent(2), negative=conds["negative"], **options | {"cfg": CFG + 1})
    negative = swapped - CFG * (swapped_other - swapped)
    out = guided(bench, model, conds)
    wanted = base - SCALE * (negative - unconditional)
    torch.testing.assert_close(out, wanted, rtol=1e-2, atol=2e-3 * float(wanted.abs().max()))


def test_hooks_of_every_concept_count(bench, networks, model):
    conds, second = prompts(networks), networks.prompt(5)
    hooked = add(lora_hooks)(networks, second)
    concepts = [bench.concept(conds["negative"]), bench.concept(hooked)]
    out, _ = bench.dng(
        model, concepts, latent(2), steps=1, cfg=CFG, sampler_name="euler", scheduler="simple",
        positive=conds["positive"], unconditional=conds["unconditional"],
    )  # fmt: skip
    positive, unconditional, first = (one_step(bench, model, cond) for cond in conds.values())
    other = one_step(bench, model, hooked)
    assert not torch.allclose(other, one_step(bench, model, second), rtol=1e-2)
    scale = (1 / 8) / (1 - 2 / 8)
    close(out, unconditional + CFG * (positive - unconditional) - scale * (first + other - 2 * unconditional))


def test_an_undesired_that_is_masked_out_everywhere_changes_nothing(bench, networks, model):
    conds = prompts(networks)
    conds["negative"] = add(lambda n: {"mask": torch.zeros(1, 8, 8), "mask_strength": 1.0})(
        networks, conds["negative"]
    )
    alone = [one_step(bench, model, cond) for cond in (conds["positive"], conds["unconditional"])]
    close(guided(bench, model, conds), expected(*alone, alone[1]))


@pytest.mark.parametrize("area", [(4, 4, 8, 0), (4, 4, 0, 9), ("percentage", 0.5, 0.5, 1.0, 0.0)])
def test_an_undesired_area_outside_the_latent_is_refused(bench, networks, model, area):
    conds = prompts(networks)
    conds["negative"] = add(lambda n: {"area": area, "strength": 1.0})(networks, conds["negative"])
    with pytest.raises(ValueError, match="area of the conditioning `negative` lies outside the latent"):
        guided(bench, model, conds)


# What belongs to the image, not to the prompt


def test_the_undesired_takes_the_distilled_guidance_of_the_positive(bench, networks):
    """FluxGuidance is set on the positive alone; without it the undesired would be predicted at another guidance."""
    flux = networks.FAMILIES["distilled guidance (Flux)"]
    model = flux.build()
    positive, negative = networks.prompt(0, guidance=2.0), networks.prompt(1)
    options = {"steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    wanted, other = (
        bench.sample(model, flux.empty(), positive=cond, **options)
        for cond in (networks.prompt(1, guidance=2.0), negative)
    )
    assert not torch.allclose(wanted, other, rtol=1e-2)
    base = bench.sample(model, flux.empty(), positive=positive, **options)
    out, _ = bench.dng(model, bench.concept(negative), flux.empty(), positive=positive, **options)
    close(out, base - SCALE * (wanted - base))
    assert torch.equal(bench.sample(bench.patch(model, negative), flux.empty(), positive=positive, **options), out)
    own = bench.concept(networks.prompt(1, guidance=3.5))
    out, _ = bench.dng(model, own, flux.empty(), positive=positive, **options)
    close(out, base - SCALE * (other - base))


def test_an_unconditional_without_the_positives_image_is_refused(bench, networks, model):
    conds = prompts(networks)
    conds["positive"] = add(lambda n: {"concat_latent_image": torch.zeros(1, 4, 8, 8)})(networks, conds["positive"])
    with pytest.raises(ValueError, match=r"`positive` carries an image .* `unconditional` does not"):
        guided(bench, model, conds)


# Batches of prompts as a text encoder gives them


def test_prompts_of_unequal_length_work(bench, networks, model):
    """More than 77 tokens become two or more chunks; ComfyUI repeats the shorter one to a common length."""
    clip = networks.small_clip()
    encode = bench.stock.CLIPTextEncode().encode
    conds = {role: encode(clip, text)[0] for role, text in zip(ROLES, ("a cat", "", "a dog, " * 60), strict=True)}
    assert conds["positive"][0][0].shape[1] < conds["negative"][0][0].shape[1]
    alone = [one_step(bench, model, cond) for cond in conds.values()]
    close(guided(bench, model, conds), expected(*alone))
