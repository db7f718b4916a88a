"""ComfyUI's other model patches beside DNG, on its own UNet with random weights.

One step of euler gives the denoised prediction. What a patch changes in classifier-free guidance is what gets pushed;
what it changes in the network, it changes in the undesired prediction too.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

CFG, SCALE = 3.0, 1 / 7


def extra(module: str, name: str) -> Any:
    """A node of ComfyUI's extras: called with a model, the patched one."""
    node = getattr(importlib.import_module("comfy_extras." + module), name)
    run = node.execute if hasattr(node, "execute") else node().patch
    return lambda *args: run(*args)[0]


def lora(networks: Any, model: Any) -> Any:
    """What a LoRA loader does: changes of weights, added while the model is in use."""
    patched = model.clone()
    generator = torch.Generator().manual_seed(5)
    for key, weight in model.model.state_dict().items():
        if "attn2.to_k" in key:
            patched.add_patches({key: ("diff", (0.3 * torch.randn(weight.shape, generator=generator),))}, 1.0)
    return patched


def wrapper(networks: Any, model: Any) -> Any:
    """A model function wrapper, of which a model has one: it may look at what is in the batch."""
    patched = model.clone()

    def scaled(apply_model: Callable, args: dict) -> Tensor:
        assert len(args["input"]) % len(args["cond_or_uncond"]) == 0
        return 0.9 * apply_model(args["input"], args["timestep"], **args["c"])

    patched.set_model_unet_function_wrapper(scaled)
    return patched


# Those that change how predictions are combined.
COMBINED: dict[str, Callable[[Any, Any], Any]] = {
    "RescaleCFG": lambda n, m: extra("nodes_model_advanced", "RescaleCFG")(m, 0.7),
    "APG": lambda n, m: extra("nodes_apg", "APG")(m, 0.5, 2.0, 0.0),
    "CFGZeroStar": lambda n, m: extra("nodes_cfg", "CFGZeroStar")(m),
    "CFGNorm": lambda n, m: extra("nodes_cfg", "CFGNorm")(m, 0.8),
    "TCFG": lambda n, m: extra("nodes_tcfg", "TCFG")(m),
    "Mahiro": lambda n, m: extra("nodes_mahiro", "Mahiro")(m),
    "PAG": lambda n, m: extra("nodes_pag", "PerturbedAttentionGuidance")(m, 3.0),
    "SAG": lambda n, m: extra("nodes_sag", "SelfAttentionGuidance")(m, 0.5, 2.0),
    "FreSca": lambda n, m: extra("nodes_fresca", "FreSca")(m, 1.0, 1.25, 2),
    "EpsilonScaling": lambda n, m: extra("nodes_eps", "EpsilonScaling")(m, 1.01),
}

# Those that change the network, for every conditioning alike.
NETWORK: dict[str, Callable[[Any, Any], Any]] = {
    "LoRA": lora,
    "FreeU": lambda n, m: extra("nodes_freelunch", "FreeU")(m, 1.2, 1.4, 0.8, 0.3),
    "FreeU_V2": lambda n, m: extra("nodes_freelunch", "FreeU_V2")(m, 1.2, 1.4, 0.8, 0.3),
    "HyperTile": lambda n, m: extra("nodes_hypertile", "HyperTile")(m, 64, 2, 0, False),
    "model function wrapper": wrapper,
}


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    """The model that the tests of this file share: runs leave nothing on it."""
    return {}


@pytest.fixture
def model(networks: Any, shared: dict[str, Any]) -> Any:
    """16 x 16 latents and channels that FreeU looks for (4 times its model_channels)."""
    if "SD" not in shared:
        family = networks.FAMILIES["epsilon UNet (SD 1.5)"]
        network = networks.UNET | {"channel_mult": [1, 2, 4], "num_res_blocks": [1, 1, 1]}
        network |= {"transformer_depth": [1, 1, 1], "transformer_depth_output": [1] * 6}
        shared["SD"] = networks.Family(family.config, network, family.latent).build()
    return shared["SD"]


def options(networks: Any, steps: int = 1, cfg: float = CFG, sampler: str = "euler") -> dict[str, Any]:
    return {
        "latent": {"samples": torch.zeros(2, 4, 16, 16)},
        "steps": steps,
        "cfg": cfg,
        "sampler_name": sampler,
        "scheduler": "simple",
        "positive": networks.prompt(0),
    }


def stock(bench: Any, networks: Any, model: Any, **changes: Any) -> Tensor:
    return bench.sample(model, **options(networks, **changes), negative=networks.prompt(1))


def guided(bench: Any, networks: Any, model: Any, settings: dict | None = None, **changes: Any) -> Tensor:
    concept = bench.concept(networks.prompt(2), **settings or {})
    return bench.dng(model, concept, **options(networks, **changes), unconditional=networks.prompt(1))[0]


def alone(bench: Any, networks: Any, model: Any, seed: int) -> Tensor:
    """The denoised prediction under one prompt."""
    return bench.sample(model, **options(networks, cfg=1.0) | {"positive": networks.prompt(seed)})


def difference(bench: Any, networks: Any, model: Any, reference: int = 1) -> Tensor:
    """D_n - D_ref."""
    return alone(bench, networks, model, 2) - alone(bench, networks, model, reference)


def close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", COMBINED)
def test_what_a_patch_of_cfg_makes_is_pushed_by_the_models_own_predictions(bench, networks, model, name):
    patched = COMBINED[name](networks, model)
    base = stock(bench, networks, patched)
    assert not torch.allclose(base, stock(bench, networks, model), rtol=1e-3)
    wanted = base - SCALE * difference(bench, networks, model)
    close(guided(bench, networks, patched), wanted)
    close(stock(bench, networks, bench.patch(patched, networks.prompt(2))), wanted)
    close(stock(bench, networks, COMBINED[name](networks, bench.patch(model, networks.prompt(2)))), wanted)


@pytest.mark.parametrize("name", NETWORK)
def test_a_patch_of_the_network_holds_for_the_undesired_prediction_too(bench, networks, model, name):
    patched = NETWORK[name](networks, model)
    torch.manual_seed(0)
    base = stock(bench, networks, patched)
    if name != "HyperTile":  # draws its tiles anew at every call
        assert not torch.allclose(base, stock(bench, networks, model), rtol=1e-3)
        wanted = base - SCALE * difference(bench, networks, patched)
        close(guided(bench, networks, patched), wanted)
        close(stock(bench, networks, NETWORK[name](networks, bench.patch(model, networks.prompt(2)))), wanted)
    assert bool(guided(bench, networks, patched).isfinite().all())


@pytest.mark.parametrize("name", [*COMBINED, *NETWORK])
def test_scale_0_beside_a_patch_is_the_stock_sampler(bench, networks, model, name):
    patched = {**COMBINED, **NETWORK}[name](networks, model)
    torch.manual_seed(0)
    wanted = stock(bench, networks, patched, steps=2)
    torch.manual_seed(0)
    out = guided(bench, networks, patched, {"guidance_scale": 0.0}, steps=2)
    if name != "HyperTile":
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_nag_alters_the_positive_alone(bench, networks, model, cfg):
    """NAG needs both branches, at cfg 1 too; the undesired is still compared with the plain unconditional."""
    patched = extra("nodes_nag", "NAGuidance")(model, 5.0, 0.5, 1.5)
    base = stock(bench, networks, patched, cfg=cfg)
    assert not torch.allclose(base, stock(bench, networks, model, cfg=cfg), rtol=1e-3)
    wanted = base - SCALE * difference(bench, networks, model)
    close(guided(bench, networks, patched, cfg=cfg), wanted)
    close(stock(bench, networks, bench.patch(patched, networks.prompt(2)), cfg=cfg), wanted)


def test_tome_runs(bench, networks, model):
    """It merges tokens that it draws at random, so that no two runs are alike."""
    patched = extra("nodes_tomesd", "TomePatchModel")(model, 0.3)
    assert bool(guided(bench, networks, patched, steps=3).isfinite().all())


@pytest.mark.parametrize(("reference", "place"), [("auto", 1), ("positive", 0)])
def test_a_patch_that_knows_two_conditionings_only_is_given_no_third(bench, networks, model, reference, place):
    """IP-Adapter and PuLID pick embeddings by `cond_or_uncond`, 0 or 1. The undesired takes its reference's place."""
    attention = importlib.import_module("comfy.ldm.modules.attention").optimized_attention
    generator = torch.Generator().manual_seed(3)
    pictures = [torch.randn(1, 3, 32, generator=generator) for _ in range(2)]

    def with_pictures(places: tuple[int, int]) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
            chosen = [pictures[places[i]] for i in extra_options["cond_or_uncond"]]
            each = len(q) // len(chosen)
            width = torch.cat([c.repeat(each, 1, q.shape[-1] // 32) for c in chosen])
            heads = extra_options["n_heads"]
            return attention(q, k, v, heads) + attention(q, width, width, heads)

        patched = model.clone()
        for block in (("input", 1), ("middle", 0)):
            patched.set_model_attn2_replace(attend, *block)
        return patched

    patched = with_pictures((0, 1))
    base = stock(bench, networks, patched)
    same_picture = with_pictures((place, place))
    wanted = base - SCALE * difference(bench, networks, same_picture, reference=place)
    settings = {"reference": reference}
    close(guided(bench, networks, patched, settings), wanted)
    close(stock(bench, networks, bench.patch(patched, networks.prompt(2), reference)), wanted)

    kept = {"reference": reference, "rule": "probe", "temperature": 0.01}
    concepts = [bench.concept(networks.prompt(seed), **kept) for seed in (2, 3)]
    out, _ = bench.dng(patched, concepts, **options(networks, steps=3), unconditional=networks.prompt(1))
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_caches_that_skip_evaluations_leave_the_image_finite(bench, networks, model, name):
    """A skipped step is jumped over by the posterior; the next run starts afresh."""
    patched = extra("nodes_easycache", name)(model, 3.0, 0.0, 1.0, False)
    settings = {"temperature": 0.01}
    first = guided(bench, networks, patched, settings, steps=6)
    assert bool(first.isfinite().all())
    assert torch.equal(guided(bench, networks, patched, settings, steps=6), first)


def test_a_mask_that_changes_by_the_step_works(bench, networks, model):
    patched = extra("nodes_differential_diffusion", "DifferentialDiffusion")(model)
    mask = torch.linspace(0, 1, 16).repeat(1, 16, 1)
    content = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    concept = bench.concept(networks.prompt(2), temperature=0.01)
    given = options(networks, steps=4) | {"latent": {"samples": content, "noise_mask": mask}}
    out, trace = bench.dng(patched, concept, **given, unconditional=networks.prompt(1))
    assert bool(out.isfinite().all()) and trace.posterior.shape == (4, 1, 2)
    torch.testing.assert_close(out[..., :1], content[..., :1], rtol=1e-4, atol=1e-4)


def test_skipped_layers_stay_the_unconditionals(bench, networks):
    """SkipLayerGuidanceDiTSimple evaluates the unconditional with layers left out: D_u is what it made of it."""
    flux = networks.FAMILIES["distilled guidance (Flux)"]
    model = networks.Family(flux.config, networks.FLUX | {"depth": 2}, flux.latent).build()
    patched = extra("nodes_slg", "SkipLayerGuidanceDiTSimple")(model, 0.0, 1.0, "1", "")
    given = options(networks) | {"latent": flux.empty()}
    base, other = (
        bench.sample(patched, **given | {"cfg": cfg}, negative=networks.prompt(1)) for cfg in (CFG, CFG + 1)
    )
    assert not torch.allclose(base, bench.sample(model, **given, negative=networks.prompt(1)), rtol=1e-3)
    unconditional = base - CFG * (other - base)
    undesired = bench.sample(model, **given | {"cfg": 1.0, "positive": networks.prompt(2)})
    out, _ = bench.dng(patched, bench.concept(networks.prompt(2)), **given, unconditional=networks.prompt(1))
    close(out, base - SCALE * (undesired - unconditional))


@pytest.mark.slow
def test_a_compiled_model_samples_the_same(bench, networks):
    """TorchCompileModel, with the backend that needs no compiler."""
    flux = networks.FAMILIES["distilled guidance (Flux)"]
    model = flux.build()
    compiled = extra("nodes_torch_compile", "TorchCompileModel")(model, "eager")
    given = options(networks, steps=2) | {"latent": flux.empty()}
    concept = bench.concept(networks.prompt(2), temperature=0.01)
    wanted, expected = bench.dng(model, concept, **given, unconditional=networks.prompt(1))
    out, trace = bench.dng(compiled, concept, **given, unconditional=networks.prompt(1))
    close(out, wanted)
    close(trace.posterior, expected.posterior)
    close(
        bench.sample(
            bench.patch(compiled, networks.prompt(2), temperature=0.01), **given, negative=networks.prompt(1)
        ),
        wanted,
    )
