"""The throughput benchmark compares variants that compute the same images."""

import argparse

import torch

from dng_core.experiments import bench_command
from dng_core.experiments.networks import GroupNorm, UNet, UNetConfig
from dng_core.experiments.weights import DenoiserInfo, save_denoiser
from dng_core.schedules import DDPMSchedule

NETWORK = UNetConfig(8, 1, 32, (1,), blocks_per_level=1, attention_levels=(), num_classes=3)


def test_every_variant_predicts_the_same():
    torch.manual_seed(0)
    found = bench_command.variants(UNet(NETWORK).eval(), DDPMSchedule.named("linear"))
    x = torch.randn(2, 1, 8, 8)
    ours = GroupNorm.forward
    with torch.no_grad():
        results = []
        for variant in found:
            with bench_command._group_norm(variant.torch_group_norm):
                reference, (undesired,) = variant.predict(x, 1.5)
            results.append(torch.stack([reference, undesired]))
    assert GroupNorm.forward is ours
    assert len(results) == 4 and not torch.equal(*results[0])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-5)


def test_the_command_prints_ratios_to_the_plain_loop(tmp_path, capsys):
    torch.manual_seed(0)
    info = DenoiserInfo("try", NETWORK, "linear", (-1.0, 1.0), ("a", "b", "c"))
    save_denoiser(tmp_path / "d.safetensors", UNet(NETWORK).state_dict(), info)
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    options = ["--denoiser", str(tmp_path / "d.safetensors"), "--batch", "2", "--timed-steps", "2", "--repeats", "1"]
    assert bench_command.run(parser.parse_args([*options, "--device", "cpu"])) == 0
    rows = [line for line in capsys.readouterr().out.split("\n") if line.startswith("| ")][2:]
    assert len(rows) == 4 and "1.00 x" in rows[0] and "one batch" in rows[3]
    assert bench_command.run(parser.parse_args([*options, "--repeats", "0"])) == 1
    assert "at least 1" in capsys.readouterr().err
