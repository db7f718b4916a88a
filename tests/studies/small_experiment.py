"""A tiny experiment on random networks."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dng_core.cli import experiment as experiment_command
from dng_core.models.networks import UNet, UNetConfig
from dng_core.models.weight_files import DenoiserInfo, save_denoiser
from dng_core.schedules import DDPMSchedule
from dng_core.settings import Settings
from dng_core.studies.class_removal import Point, weights_digest

NAMES = ("ant", "bee", "cow")
NETWORK = UNetConfig(8, 1, 64, (1,), blocks_per_level=1, attention_levels=(), num_classes=3)
CHAIN = DDPMSchedule.named("linear")
EXPERIMENT = """
name = "try"
denoiser = "{denoiser}"
classifier = "{classifier}"
dataset = "folder"
classes = ["ant"]
images = 8
search_images = 4
steps = 3
batch = 8
[methods.NP]
scales = [0.0, 2.0]
[methods.SLD]
scales = [1.0]
search_scales = [5.0]
[methods.SLD.search]
threshold = [0.04, 0.2]
[methods.CCFG]
scales = [1.0]
[methods.DNG]
scales = [1.0]
"""


def random_denoiser(path: Path, network: UNetConfig = NETWORK, seed: int = 0, names: tuple[str, ...] = NAMES) -> Path:
    torch.manual_seed(seed)
    state = UNet(network).state_dict()
    # Labels make a difference, of more than a grey level, as a group of the normalisation has more than one channel.
    state["class_embedding.weight"] *= 20
    save_denoiser(path, state, DenoiserInfo("try", network, "linear", (-1.0, 1.0), names))
    return path


def experiment(folder: Path, change: Callable[[str], str] = lambda text: text) -> None:
    text = EXPERIMENT.format(denoiser=folder / "denoiser.safetensors", classifier=folder / "classifier.safetensors")
    (folder / "try.toml").write_text(change(text))


def dng_experiment(folder: Path, *options: object) -> int:
    parser = argparse.ArgumentParser()
    experiment_command.add_arguments(parser)
    arguments = [folder / "try.toml", "--output", folder / "out", "--device", "cpu", "--jobs", 1, *options]
    return experiment_command.run(parser.parse_args([str(a) for a in arguments]))


def point(folder: Path, **changes: object) -> Point:
    source = str(folder / "denoiser.safetensors")
    plain = Point(source, "", weights_digest(source), 0, Settings(), steps=3, images=6, batch=4, seed=0)
    return replace(plain, **changes)  # type: ignore[arg-type]


def runs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "out" / "runs").iterdir()}
