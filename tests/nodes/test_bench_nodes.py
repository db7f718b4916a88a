"""The nodes of the benchmark: networks in the shapes of known families, and a count of predictions."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench_nodes(comfyui) -> ModuleType:
    """The module `nodes` of the folder nodes/bench/, loaded by its path: it must not hide ComfyUI's."""
    name = "bench_of_the_checkout"
    spec = importlib.util.spec_from_file_location(name, ROOT / "nodes" / "bench" / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.nodes")


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
def test_comfyui_takes_weights_of_these_shapes_for_the_family(bench_nodes, family):
    import comfy.model_detection
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    shape = bench_nodes.NETWORKS[family]
    network = UNetModel(**shape, device="meta", operations=comfy.ops.disable_weight_init)
    weights = network.state_dict()
    found = comfy.model_detection.model_config_from_unet(weights, "")
    assert type(found).__name__ == family
    assert not [key for key in shape if key in found.unet_config and found.unet_config[key] != shape[key]]
    millions = sum(weight.numel() for weight in weights.values()) / 1e6
    assert millions == pytest.approx({"SD15": 859.5, "SDXL": 2567.5}[family], abs=0.1)  # as published


def small(shape: dict) -> dict:
    """The shape with one block a level, 32 wide."""
    levels = len(shape["channel_mult"])
    heads = {"num_heads": -1, "num_head_channels": 16}
    depths = heads | {"transformer_depth": [1] * levels, "transformer_depth_output": [1] * 2 * levels}
    return shape | {"model_channels": 32, "num_res_blocks": [1] * levels, "transformer_depth_middle": 1} | depths


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
def test_a_random_network_draws_and_every_prediction_is_counted(bench, bench_nodes, family):
    shape = small(bench_nodes.NETWORKS[family])
    model = bench_nodes.random_model(family, shape)
    positive, negative = (bench_nodes.RandomText.execute(family, seed)[0] for seed in (0, 1))
    latent = {"samples": torch.zeros(2, 4, 8, 8)}
    for cfg, predictions in ((1.0, 2 * 3), (5.0, 2 * 2 * 3)):
        counted, counter = bench_nodes.CountPredictions.execute(model).args
        out = bench.sample(counted, positive=positive, negative=negative, cfg=cfg, steps=3, latent=latent)
        (report,) = bench_nodes.ReportRun.execute(counter, {"samples": out}).ui["bench"]
        assert report["predictions"] == predictions
        assert report["finite"] and float(out.std()) > 0.1
    assert not bench_nodes.ReportRun.execute(counter, {"samples": out / 0}).ui["bench"][0]["finite"]
    assert bench_nodes.ReportRun.execute(counter, {"samples": out}).ui["bench"][0]["digest"] == report["digest"]
    assert bench_nodes.ReportRun.execute(counter, {"samples": out + 1}).ui["bench"][0]["digest"] != report["digest"]


def test_the_weights_are_the_same_each_time(bench_nodes):
    shape = small(bench_nodes.NETWORKS["SD15"])
    first, second = (bench_nodes.random_model("SD15", shape).model.diffusion_model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["input_blocks.0.0.weight"].std() == pytest.approx((4 * 9) ** -0.5, rel=0.1)


def test_seeds_are_a_list_and_the_looks_of_all_its_runs_are_added_up(bench, bench_nodes):
    (seeds,) = bench_nodes.Seeds.execute(7, 3).args
    assert seeds == [7, 8, 9] and bench_nodes.Seeds.GET_SCHEMA().outputs[0].is_output_list
    empty = torch.zeros(0)
    traces = [bench.guidance.Trace(empty, empty, empty, made=made, spared=2) for made in (1, 3)]
    assert bench_nodes.ReportLooks.execute(traces).ui["figures"] == [{"made": 4, "spared": 4}]
