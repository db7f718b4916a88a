"""`dng gpu` in small, on the CPU: everything that it does with a GPU but the check, which needs one."""

import argparse
import json

import pytest
import torch
from PIL import Image

from dng_core.cli import gpu, train
from dng_core.models.checkpoints import open_denoiser
from dng_core.models.weight_files import load_denoiser
from dng_core.schedules import DDPMSchedule
from dng_core.studies.class_removal import chain_name
from dng_core.studies.network_figures import SHOWN, ZOOM

PLAN = """
model = "denoiser"
dataset = "folder"
[network]
base_channels = 32
channel_multipliers = [1]
blocks_per_level = 1
attention_levels = []
patch_size = 2
[training]
batch_size = 4
"""


def dng_gpu(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return gpu.run(parser.parse_args([str(a) for a in arguments]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A plan and a data set of two shades; a measurement of MNIST's network that takes a moment."""
    for shade, name in ((40, "dark"), (200, "light")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (8, 8), shade + i).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "shades.toml").write_text(PLAN)
    monkeypatch.setattr(gpu.bench, "PRODUCT_SIZE", 64)
    monkeypatch.setattr(gpu, "SAMPLING_STEPS", 2)
    return tmp_path


def options(folder, *more: object) -> list[object]:
    small = ["--repeats", 2, "--timed-steps", 10, "--batch", 1, "--device", "cpu"]
    return ["--data", folder / "data", "--plan", folder / "shades.toml", "--output", folder / "out", *small, *more]


def test_it_measures_trains_for_the_time_given_and_keeps_all_in_one_folder(folder, monkeypatch, capsys):
    """The training gets nine tenths of the minutes that the check and the measurement leave."""
    asked: list[float] = []
    original = train.train

    def trained(args: argparse.Namespace) -> None:
        asked.append(args.minutes)
        args.minutes = 0.01
        original(args)

    monkeypatch.setattr(train, "train", trained)
    assert dng_gpu(*options(folder, "--minutes", 5)) == 0
    out = folder / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["gpu.json", "gpu.md", *(f"shades.{end}" for end in ("safetensors", "json", "checkpoint", "png"))]
    )
    found = json.loads((out / "gpu.json").read_text())
    assert found["waits for the device"] == "not checked: there is no GPU here"
    assert "both predictions in one batch" in found["speed"]
    assert len(asked) == 1
    assert 0.9 * (5 - found["seconds"] / 60) < asked[0] < 4.5
    steps = json.loads((out / "shades.json").read_text())["steps"]
    assert found["trained"].startswith(f"{steps} steps, {steps * 4 / 16:.1f} epochs")
    assert load_denoiser(out / "shades.safetensors")[1].class_names == ("dark", "light")
    with Image.open(out / "shades.png") as picture:
        assert picture.size == (SHOWN * ZOOM * 8, 3 * ZOOM * 8)
    assert "**speed**" in (out / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--minutes", 0], "--minutes must be above 0, not 0"),
        (["--minutes", "nan"], "--minutes must be above 0, not nan"),
        (["--plan", "classifier"], "trains no label-conditional denoiser"),
        (["--plan", "absent"], "there is no plan 'absent'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(folder, capsys, changes, message):
    assert dng_gpu(*options(folder, *changes)) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_what_was_measured_is_kept_where_no_time_is_left_to_train(folder, capsys):
    assert dng_gpu(*options(folder, "--minutes", 0.001)) == 1
    assert "no time is left to train: give more --minutes" in capsys.readouterr().err
    assert "speed" in json.loads((folder / "out" / "gpu.json").read_text())
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["gpu.json", "gpu.md"]


def test_the_checked_run_is_dng(monkeypatch):
    """The run that a GPU must not wait for guides, and ends in finite images."""
    scales: list[torch.Tensor] = []
    original = gpu.NegativeGuidance.__call__

    def seen(self, *args):
        result = original(self, *args)
        scales.append(self.trace().scale[-1])
        return result

    monkeypatch.setattr(gpu.NegativeGuidance, "__call__", seen)
    network, info = open_denoiser("mnist")
    gpu.guided_run(network, DDPMSchedule.named(chain_name(info)), "cpu")
    assert len(scales) == gpu.GUIDED_STEPS
    assert any(float(scale.max()) > 0 for scale in scales)
