"""``dng train``: trains the models that ship with the project, on MNIST."""

import argparse
import json
import os
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import MNIST_MD5, load_mnist
from .networks import Classifier, UNet, UNetConfig
from .training import TrainingConfig, TrainingResult, classifier_accuracy, train_classifier, train_denoiser
from .weights import ClassifierInfo, DenoiserInfo, load_classifier, load_denoiser, save_classifier, save_denoiser

DIGITS = tuple("0123456789")
DENOISER = UNetConfig(
    image_size=28,
    in_channels=1,
    base_channels=64,
    channel_multipliers=(1, 1),
    blocks_per_level=1,
    attention_levels=(1,),
    num_classes=len(DIGITS),
    patch_size=2,
)
CLASSIFIER_WIDTH = 32
DEFAULTS = {
    "denoiser": TrainingConfig(epochs=8.0),
    "classifier": TrainingConfig(epochs=4.0, learning_rate=2e-3, ema_decay=0.99),
}


@dataclass(frozen=True)
class Files:
    """What a training run reads and writes in its output folder."""

    weights: Path
    record: Path
    checkpoint: Path

    @classmethod
    def of(cls, output: Path, model: str) -> "Files":
        return cls(*(output / f"mnist_{model}{ending}" for ending in (".safetensors", ".json", ".checkpoint")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng train``."""
    parser.description = (
        "Train one of the models that ship with DNG. A run that was stopped goes on from its checkpoint in the output "
        "folder when the same command is given again, and ends with the same weights."
    )
    parser.add_argument("model", choices=tuple(DEFAULTS), help="what to train")
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's four IDX files (.gz or not)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights, record and checkpoint")
    parser.add_argument("--start-from", type=Path, metavar="WEIGHTS", help="weights to go on from (default: random)")
    parser.add_argument("--epochs", type=float, help=_default("passes over the 60,000 training images", "epochs"))
    parser.add_argument("--batch-size", type=int, help=_default("images per step", "batch_size"))
    parser.add_argument("--learning-rate", type=float, help=_default("peak learning rate", "learning_rate"))
    parser.add_argument("--seed", type=int, help=_default("seed of the weights, batches and noise", "seed"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--checkpoint-every", type=int, help=_default("steps between checkpoints", "checkpoint_every"))


def run(args: argparse.Namespace) -> int:
    """Train, write the weights and the record beside them, print both paths; 1 with a message if that can't be."""
    try:
        train(args)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"dng train: {error}", file=sys.stderr)
        return 1
    return 0


def train(args: argparse.Namespace) -> None:
    """What :func:`run` does.

    Raises
    ------
    OSError: if the data is not there or the output can't be written.
    ValueError: for data that is not MNIST's, a bad option, and a checkpoint of another run.
    FloatingPointError: if the loss is no longer finite.
    """
    config = _config(args)
    device = _device(args.device)
    initial = _initial(args.model, args.start_from) if args.start_from else None
    images, labels = load_mnist(args.data, train=True)
    args.output.mkdir(parents=True, exist_ok=True)
    files = Files.of(args.output, args.model)

    figures: dict[str, Any] = {}
    if args.model == "denoiser":
        result = train_denoiser(images, labels, DENOISER, config, files.checkpoint, device, initial)
        info = DenoiserInfo("mnist", DENOISER, "linear", (-1.0, 1.0), DIGITS)
        save_denoiser(files.weights, result.state_dict, info)
    else:
        result = train_classifier(images, labels, len(DIGITS), config, files.checkpoint, device, initial)
        classifier = Classifier(1, len(DIGITS), CLASSIFIER_WIDTH)
        classifier.load_state_dict(result.state_dict)
        figures["test_accuracy"] = classifier_accuracy(classifier.eval(), *load_mnist(args.data, train=False))
        save_classifier(
            files.weights,
            result.state_dict,
            ClassifierInfo("mnist", 28, 1, CLASSIFIER_WIDTH, (-1.0, 1.0), DIGITS),
        )

    record = _record(args, config, device, result) | figures
    if args.start_from and (earlier := args.start_from.with_suffix(".json")).is_file():
        record["started_from"] = json.loads(earlier.read_text(encoding="utf-8"))
    partial = files.record.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, files.record)
    print(f"loss {result.loss:.5f}" + "".join(f", {k.replace('_', ' ')} {v:.4f}" for k, v in figures.items()))
    print(f"weights: {files.weights}\nrecord: {files.record}\n{files.checkpoint} is no longer needed")


def _default(text: str, field: str) -> str:
    values = {model: getattr(config, field) for model, config in DEFAULTS.items()}
    if len(set(values.values())) == 1:
        return f"{text} (default: {values['denoiser']})"
    return f"{text} (default: " + ", ".join(f"{v} for the {k}" for k, v in values.items()) + ")"


def _config(args: argparse.Namespace) -> TrainingConfig:
    base = DEFAULTS[args.model]

    def chosen(name: str) -> Any:
        value = getattr(args, name)
        return getattr(base, name) if value is None else value

    return TrainingConfig(
        epochs=chosen("epochs"),
        batch_size=chosen("batch_size"),
        learning_rate=chosen("learning_rate"),
        warmup_steps=base.warmup_steps,
        ema_decay=base.ema_decay,
        null_label_share=base.null_label_share,
        seed=chosen("seed"),
        checkpoint_every=chosen("checkpoint_every"),
    )


def _initial(model: str, path: Path) -> dict[str, Tensor]:
    load = load_denoiser if model == "denoiser" else load_classifier
    network, _ = load(path)
    state_dict = network.state_dict()
    expected = UNet(DENOISER) if model == "denoiser" else Classifier(1, len(DIGITS), CLASSIFIER_WIDTH)
    if {k: v.shape for k, v in state_dict.items()} != {k: v.shape for k, v in expected.state_dict().items()}:
        raise ValueError(f"--start-from: {path} holds another network than `dng train {model}` trains")
    return state_dict


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _record(
    args: argparse.Namespace, config: TrainingConfig, device: torch.device, result: TrainingResult
) -> dict[str, Any]:
    command = ["dng", "train", args.model, "--data", str(args.data), "--output", str(args.output)]
    if args.start_from:
        command += ["--start-from", str(args.start_from)]
    for option in ("epochs", "batch_size", "learning_rate", "seed", "checkpoint_every"):
        command += [f"--{option.replace('_', '-')}", f"{getattr(config, option):g}"]
    return {
        "command": shlex.join([*command, "--device", device.type]),
        "seed": config.seed,
        "steps": result.steps,
        "loss": result.loss,
        "seconds": round(result.seconds),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "data": {"name": "MNIST", "md5": MNIST_MD5},
    }
