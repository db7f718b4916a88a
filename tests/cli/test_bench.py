"""The benchmarks: variants that predict the same, and what is asked of a ComfyUI."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from dng_core.cli import bench as bench_command
from dng_core.headless import locate
from dng_core.headless import server as headless_server
from dng_core.headless.figures import speed_figures
from dng_core.headless.figures.speed_figures import Speeds
from dng_core.models.networks import UNet, UNetConfig
from dng_core.models.weight_files import DenoiserInfo, save_denoiser
from dng_core.schedules import DDPMSchedule

NETWORK = UNetConfig(8, 1, 64, (1,), blocks_per_level=1, attention_levels=(), num_classes=3)


def test_every_variant_predicts_the_same():
    torch.manual_seed(0)
    found = bench_command.variants(UNet(NETWORK).eval(), DDPMSchedule.named("linear"), 10)
    assert [every for _, every in found.values()] == [1, 1, 10]
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        (plain, plain_undesired), (reference, undesired), _ = (
            (reference, undesired) for reference, (undesired,) in (predict(x, 1.5) for predict, _ in found.values())
        )
    assert (plain - plain_undesired).abs().max() > 1e-3
    torch.testing.assert_close(reference, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(undesired, plain_undesired, atol=1e-5, rtol=1e-5)


def test_the_command_prints_ratios_to_the_plain_loop(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    info = DenoiserInfo("try", NETWORK, "linear", (-1.0, 1.0), ("a", "b", "c"))
    save_denoiser(tmp_path / "d.safetensors", UNet(NETWORK).state_dict(), info)
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    options = ["--denoiser", str(tmp_path / "d.safetensors"), "--batch", "2", "--repeats", "2", "--device", "cpu"]
    options += ["--timed-steps", "4", "--undesired-every", "2"]
    predicted: list[int] = []
    original = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *a: predicted.append(len(x)) or original(self, x, *a))
    assert bench_command.run(parser.parse_args(options)) == 0
    turn = [2, 2] * 4 + [4] * 4 + [4, 2] * 2  # the two runs without a network predict nothing
    assert predicted[: 3 * len(turn)] == turn * 3  # one untimed
    printed = capsys.readouterr().out
    rows = [line for line in printed.split("\n") if line.startswith("| ")][2:]
    assert len(rows) == 3 and "1.00 x" in rows[0] and "one batch" in rows[1] and "once in 2 steps" in rows[2]
    assert "a product of two 1024 x 1024 matrices" in printed
    assert bench_command.run(parser.parse_args([*options, "--repeats", "1"])) == 1
    assert "--repeats at least 2" in capsys.readouterr().err
    assert bench_command.run(parser.parse_args([*options, "--undesired-every", "3"])) == 1
    assert "no multiple of --undesired-every 3" in capsys.readouterr().err


def test_what_guidance_takes_of_a_step_is_printed_for_known_latents(capsys, monkeypatch):
    """The share is that of two predictions which run at the rate of a product, of operations that are known here."""
    monkeypatch.setattr(bench_command, "LATENTS", {"small": ((4, 8, 8), 1e9), "video": ((4, 3, 8, 8), 1e30)})
    seconds = {True: 2.0, False: 1.5}  # with guidance and without

    def sampling(predict, every, shape, chain, args, device, guided=True, between=None):
        return guided, shape

    product = 2 * bench_command.PRODUCT_SIZE**3 / 1e9  # a machine of 10^9 operations a second
    monkeypatch.setattr(bench_command, "sampling", sampling)
    taken = lambda tasks, repeats, device: [[seconds[guided]] for guided, _ in tasks[:2]] + [[product]]  # noqa: E731
    monkeypatch.setattr(bench_command, "timings", taken)
    assert dng_bench("step", "--device", "cpu", "--timed-steps", "5") == 0
    small, video = [line for line in capsys.readouterr().out.split("\n") if line.startswith(("| small", "| video"))]
    assert small == "| small | 256 | 100.00 | 5.00000% |"  # 0.5 seconds in 5 steps, of two predictions of a second
    assert video == "| video | 768 | 100.00 | 0.00000% |"
    assert dng_bench("step", "--device", "cpu", "--repeats", "1") == 1
    assert "--repeats at least 2" in capsys.readouterr().err


def test_guidance_is_measured_beside_the_same_run_without_it():
    """Without guidance the sampler asks for no undesired prediction, and draws the same noise."""
    drawn: list[list[torch.Tensor]] = []
    chain = DDPMSchedule.named("linear")
    args = argparse.Namespace(batch=2, timed_steps=4)
    for guided in (True, False):
        states: list[torch.Tensor] = []

        def predict(x, sigma, states=states):
            states.append(x)
            return 0.5 * x, [0.5 * x]  # nothing to push away from

        bench_command.sampling(predict, 1, (4, 3, 8, 8), chain, args, "cpu", guided)()
        drawn.append(states)
    assert [len(states) for states in drawn] == [4, 4]
    torch.testing.assert_close(drawn[0], drawn[1])


def test_operations_are_those_of_every_convolution_and_product():
    """Counted by hand for a network without attention: 2 x weights x output pixels; linear layers once."""
    network = UNet(NETWORK).eval()
    expected = 0
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            pixels = 8 * 8 if isinstance(module, torch.nn.Conv2d) else 1
            expected += 2 * module.weight.numel() * pixels
    attention = network.mid_block.attentions[0]
    expected += (
        2 * sum(m.weight.numel() for m in (attention.to_q, attention.to_k, attention.to_v, *attention.to_out)) * 63
    )
    expected += 2 * 2 * 64 * 64 * 64  # the two products of attention: 64 pixels, 64 channels
    assert bench_command.flops_of_a_prediction(network) == expected


def dng_bench(*options: object) -> int:
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    return bench_command.run(parser.parse_args([str(option) for option in options]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", 0], "--batch and --steps must be at least 1"),
        (["--repeats", 1], "--repeats at least 2"),
        (["--size", 512], "--size is of the models sd15 and sdxl: name one in --models"),
        (["--models", "sd15", "--size", 0], "--size must be a multiple of 64, not 0"),
        (["--models", "sd15", "--size", 500], "--size must be a multiple of 64, not 500"),
    ],
)
def test_options_that_make_no_benchmark_of_comfyui_are_refused(capsys, options, message):
    assert dng_bench("comfyui", *options) == 1
    assert message in capsys.readouterr().err


def test_every_model_has_a_comfyui_of_its_own_and_one_table_shows_them_all(capsys, monkeypatch):
    started: list[list[str]] = []

    def server(location: object, pack: Path, further: list[Path]) -> Any:
        started.append([folder.name for folder in further])
        return nullcontext(f"server {len(started)}")

    def measure(server: str, subject: Any, *numbers: int) -> Speeds:
        assert numbers == (2, 30, 15, 0)
        row = {"model": subject.model, "avoided": subject.avoided, "where": server, "ratio": 4 / 3}
        return Speeds([row], [f"{subject.model}: no such node"] if subject.model == "mnist" else [])

    monkeypatch.setattr(locate, "find_comfyui", lambda folder: "location")
    monkeypatch.setattr(headless_server, "comfyui_server", server)
    monkeypatch.setattr(speed_figures, "measure_speeds", measure)
    assert dng_bench("comfyui", "--batch", 2) == 0
    assert started == [["bench"]] * 2
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("2 at once, 30 steps of euler_ancestral, 15 turns, on ")
    assert rest == [
        "",
        "| model | avoided | where | ratio |",
        "| --- | --- | --- | --- |",
        "| mnist | 0 | server 1 | 1.333 |",
        "| picture-book | flower (related) | server 2 | 1.333 |",
        "| picture-book | boat (unrelated) | server 2 | 1.333 |",
        "",
        "mnist: no such node",
    ]
