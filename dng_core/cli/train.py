"""``dng train``: trains the models that ship with the project, and what a plan says."""

import argparse
import errno
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import read_json, write_json
from ..models.datasets import Dataset, load_dataset
from ..models.devices import devices
from ..models.mnist import MNIST_MD5, to_model_range
from ..models.networks import PREDICTIONS, UNet
from ..models.picture_book.judge import Judge, judge_accuracy
from ..models.picture_book.networks import CrossUNetConfig, PictureBook
from ..models.picture_book.pictures import pages
from ..models.picture_book.training import TEXT, train_judge, train_picture_book
from ..models.picture_book.weights import (
    JudgeInfo,
    PictureBookInfo,
    load_judge,
    load_picture_book,
    save_judge,
    save_picture_book,
)
from ..models.training import (
    TrainingResult,
    chosen_precision,
    classifier_accuracy,
    train_classifier,
    train_denoiser,
)
from ..models.training_config import CHOICES
from ..models.training_plan import (
    DEFAULTS,
    DENOISER_SETTINGS,
    DENOISERS,
    PLANS,
    SCENES,
    Model,
    TrainingPlan,
    read_plan,
)
from ..models.weight_files import (
    NUMBERS,
    ClassifierInfo,
    DenoiserInfo,
    file_digest,
    load_classifier,
    load_denoiser,
    save_classifier,
    save_denoiser,
)

CLASSIFIER_WIDTH = 32  # a choice
LEAST_FITTING = 0.5  # of the numbers of the smaller network, to be taken from one of another shape; a choice
TEST_SCENES = 4000  # on which a judge is tested; a choice
OPTIONS = {  # fields of TrainingConfig and what they are
    "epochs": "passes over the training images; of scenes, times 100,000 new ones",
    "minutes": "train for so long in place of epochs; 0 for by epochs",
    "batch_size": "images per step",
    "learning_rate": "peak learning rate",
    "seed": "seed of the weights, batches and noise",
    "warmup_steps": "steps over which the learning rate rises",
    "schedule": "course of the learning rate: constant until its last part, or cosine",
    "decay_share": "the last share of all steps, in which a constant learning rate falls to 0",
    "ema_decay": "decay per step of the weights' moving average",
    "timesteps": "how a denoiser's timesteps are drawn",
    "log_sigma_mean": "mean log sigma of log-normal timesteps",
    "log_sigma_spread": "standard deviation of log sigma of log-normal timesteps",
    "weighting": "weights of a denoiser's errors",
    "null_label_share": "share of a denoiser's labels or captions that is dropped",
    "mirror_share": "share of images that are mirrored left to right",
    "optimiser": "optimiser: adamw, or sgd with Nesterov's momentum",
    "shifts": "what a classifier's shifts are drawn for: a batch, or each image",
    "image_noise": "largest standard deviation of the noise on a classifier's images",
    "checkpoint_every": "steps between checkpoints, 0 for none",
    "checkpoint_minutes": "minutes between checkpoints, 0 for none",
    "compile": "compile the network on a GPU, which takes a minute and is faster from then on: off or on",
    "precision": "precision of forward passes; auto takes bfloat16 where the processor is fast at it",
}


@dataclass(frozen=True)
class Files:
    """What a training run reads and writes in its output folder."""

    weights: Path
    record: Path
    checkpoint: Path

    @classmethod
    def of(cls, output: Path, name: str) -> "Files":
        return cls(*(output / f"{name}{ending}" for ending in (".safetensors", ".json", ".checkpoint")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng train``."""
    parser.description = (
        "Train one of the models that ship with DNG, or what a plan says. A run that was stopped goes on from its "
        "checkpoint in the output folder when the same command is given again, and ends with the same weights."
    )
    parser.add_argument("plan", help=f"{', '.join(PLANS)}, or a TOML file (see docs/experiments.md)")
    parser.add_argument("--data", type=Path, help="folder of the data set (MNIST: its four IDX files; scenes: none)")
    parser.add_argument("--download", action="store_true", help="fetch MNIST or CIFAR-10 into --data")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights, record and checkpoint")
    parser.add_argument("--start-from", type=Path, metavar="WEIGHTS", help="weights to go on from (default: random)")
    for option, text in OPTIONS.items():
        flag, default = f"--{option.replace('_', '-')}", getattr(DEFAULTS["denoiser"], option)
        kind: dict[str, Any] = {"choices": CHOICES[option]} if option in CHOICES else {"type": type(default)}
        parser.add_argument(flag, help=_default(text, option), **kind)
    parser.add_argument("--prediction", choices=PREDICTIONS, help="network's output (default: the plan's; shipped: v)")
    parser.add_argument("--numbers", choices=NUMBERS, default="float32", help="weights' format (default: float32)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads (default: all cores; on a busy machine 1 is best; another number rounds differently)",
    )


def run(args: argparse.Namespace) -> int:
    """Train, write weights and record, and print both paths; returns 1, with a message, if that fails."""
    try:
        train(args)
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"dng train: {error}", file=sys.stderr)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            print(
                "What the last checkpoint holds is kept: free some space and give the command again.",
                file=sys.stderr,
            )
        return 1
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        print(f"dng train: too little memory ({error}): give a smaller --batch-size", file=sys.stderr)
        return 1
    return 0


def train(args: argparse.Namespace) -> None:
    """What :func:`run` does.

    Raises
    ------
    OSError: if the data is not there or the output can't be written.
    ValueError: for a bad plan or option, damaged data, or a checkpoint of another run.
    FloatingPointError: if the loss is no longer finite.
    """
    plan = read_plan(args.plan).with_training(**{name: getattr(args, name) for name in OPTIONS})
    plan = plan.with_network(prediction=args.prediction)
    device = torch.device(devices(args.device)[0])
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be 1 or more, not {args.threads}")
        torch.set_num_threads(args.threads)
    precision, why = chosen_precision(plan.training.precision, device)
    plan = plan.with_training(precision=precision)
    print(f"precision {precision}: {why}; threads: {torch.get_num_threads()}")
    torch.manual_seed(plan.training.seed)
    trained = _train_on_scenes if plan.dataset == SCENES else _train_on_files
    result, source, figures = trained(args, plan, device)
    files = Files.of(args.output, plan.name)
    record = _record(args, plan, source, device, result) | figures | {"sha256": file_digest(files.weights)}
    if args.start_from and (earlier := args.start_from.with_suffix(".json")).is_file():
        record["started_from"] = read_json(earlier)
    write_json(files.record, record)
    print(f"loss {result.loss:.5f}" + "".join(f", {k.replace('_', ' ')} {v:.4f}" for k, v in figures.items()))
    print(f"weights: {files.weights}\nrecord: {files.record}\n{files.checkpoint} is no longer needed")


def _train_on_files(
    args: argparse.Namespace, plan: TrainingPlan, device: torch.device
) -> tuple[TrainingResult, dict[str, Any], dict[str, float]]:
    """Train on a data set from the disk and write the weights: the result, what the data were, and figures."""
    if args.data is None:
        raise ValueError(f"the plan {plan.name} trains on {plan.dataset}: give its folder as --data")
    everything = load_dataset(plan.dataset, args.data, train=True, download=args.download, size=plan.size or None)
    data, class_names = plan.chosen(everything), plan.class_names(everything)
    shape = data.images.shape[1:]
    name = plan.name.removesuffix(f"_{plan.model}")
    info: DenoiserInfo | ClassifierInfo
    if plan.model == "denoiser":
        info, test = DenoiserInfo(name, plan.unet(everything), "linear", (-1.0, 1.0), class_names), None
        model: nn.Module = UNet(info.network)
    else:
        wanted = {"width": CLASSIFIER_WIDTH, **plan.network}
        info = ClassifierInfo(name, shape[1], shape[0], data_range=(-1.0, 1.0), class_names=class_names, **wanted)
        model, test = info.network(), _test_split(plan, args.data, everything)
    initial = _initial(plan, model, args.start_from) if args.start_from else None
    args.output.mkdir(parents=True, exist_ok=True)
    files = Files.of(args.output, plan.name)
    figures: dict[str, float] = {}
    files.record.unlink(missing_ok=True)  # that of an earlier run would call the new weights damaged
    run = (plan.training, files.checkpoint, device, initial)
    if isinstance(info, DenoiserInfo):
        result = train_denoiser(data.images, data.labels, info.network, *run)
        save_denoiser(files.weights, result.state_dict, info, args.numbers)
    else:
        result = train_classifier(data.images, data.labels, info, *run)
        model.load_state_dict(result.state_dict)
        judged, measured = (test, "test_accuracy") if test else (data, "training_accuracy")
        figures[measured] = classifier_accuracy(model.eval(), judged.images, judged.labels)
        save_classifier(files.weights, result.state_dict, info, args.numbers)

    source: dict[str, Any] = {"name": data.name, "images": len(data.images), "digest": data.digest()}
    if plan.dataset == "mnist":
        source["md5"] = MNIST_MD5
    if data.note:
        source["note"] = data.note
    return result, source, figures


def _train_on_scenes(
    args: argparse.Namespace, plan: TrainingPlan, device: torch.device
) -> tuple[TrainingResult, dict[str, Any], dict[str, float]]:
    """Train on the picture book's scenes, as :func:`_train_on_files` on files."""
    if args.data is not None or args.download:
        raise ValueError(f"the plan {plan.name} draws its own scenes: leave out --data and --download")
    args.output.mkdir(parents=True, exist_ok=True)
    files = Files.of(args.output, plan.name)
    files.record.unlink(missing_ok=True)  # that of an earlier run would call the new weights damaged
    figures: dict[str, float] = {}
    if plan.model == "text_to_image":
        unet = CrossUNetConfig(**plan.network)
        initial = _initial(plan, PictureBook(TEXT, unet), args.start_from) if args.start_from else None
        result = train_picture_book(unet, plan.training, files.checkpoint, device, initial)
        save_picture_book(files.weights, result.state_dict, PictureBookInfo(TEXT, unet), args.numbers)
    else:
        judge = Judge(**plan.network)
        initial = _initial(plan, judge, args.start_from) if args.start_from else None
        result = train_judge(judge.width, plan.training, files.checkpoint, device, initial)
        save_judge(files.weights, result.state_dict, JudgeInfo(judge.width), args.numbers)
        pictures, _, labels = pages(range(TEST_SCENES), plan.training.seed + 1)
        judge.load_state_dict(result.state_dict)
        accuracy = judge_accuracy(judge.eval(), to_model_range(pictures), labels)
        figures = {f"accuracy_{name}": share for name, share in accuracy.items()}
    return result, {"name": "scenes", "images": result.steps * plan.training.batch_size}, figures


def _default(text: str, field: str) -> str:
    values = {model: getattr(config, field) for model, config in DEFAULTS.items()}
    if len(set(values.values())) == 1:
        return f"{text} (default: {values['denoiser']})"
    return f"{text} (default: " + ", ".join(f"{v} for the {k}" for k, v in values.items()) + ")"


def _initial(plan: TrainingPlan, model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The weights of ``path``. A tensor of another shape than the model's, or a missing one, is the model's own."""
    loaders: dict[Model, Callable[[Path], tuple[nn.Module, Any]]] = {
        "denoiser": load_denoiser,
        "classifier": load_classifier,
        "text_to_image": load_picture_book,
        "judge": lambda path: (load_judge(path), None),
    }
    network, _ = loaders[plan.model](path)
    own, theirs = model.state_dict(), network.state_dict()
    if isinstance(network, UNet) and isinstance(model, UNet):
        theirs = _with_levels(theirs, len(network.up_blocks), len(model.up_blocks))
    fitting = {k: v for k, v in theirs.items() if k in own and v.shape == own[k].shape}
    taken, *whole = (sum(v.numel() for v in tensors.values()) for tensors in (fitting, theirs, own))
    if taken < LEAST_FITTING * min(whole):
        raise ValueError(f"--start-from: {path} holds another network than the plan {plan.name} trains")
    if afresh := [name for name in own if name not in fitting]:
        print(f"{path} is of a network of another shape: {len(afresh)} of {len(own)} tensors start afresh")
    if isinstance(network, UNet) and isinstance(model, UNet):
        was, wanted = network.config.prediction, model.config.prediction
        if was != wanted:
            print(f"{path} predicts {was}; from here on it is trained to predict {wanted}")
    return own | fitting


def _with_levels(weights: Mapping[str, Tensor], levels: int, wanted: int) -> dict[str, Tensor]:
    """A U-Net's weights under the names that they have in one of ``wanted`` levels in place of ``levels``.

    The way up begins at the coarsest level, so that the same resolution is another number in a deeper network.
    """

    def renamed(name: str) -> str:
        part, _, rest = name.partition(".")
        if part != "up_blocks":
            return name
        number, _, rest = rest.partition(".")
        return f"{part}.{int(number) + wanted - levels}.{rest}"

    return {renamed(name): value for name, value in weights.items()}


def _test_split(plan: TrainingPlan, folder: Path, training: Dataset) -> Dataset | None:
    """The data to test a classifier on; None where all data are for training (a folder without splits)."""
    test = load_dataset(plan.dataset, folder, train=False, size=plan.size or None)
    if test.class_names != training.class_names:
        raise ValueError(
            f"{folder}: the classes of train ({', '.join(training.class_names)}) are not those of test "
            f"({', '.join(test.class_names)})"
        )
    return None if test.digest() == training.digest() else test


def _record(
    args: argparse.Namespace,
    plan: TrainingPlan,
    source: dict[str, Any],
    device: torch.device,
    result: TrainingResult,
) -> dict[str, Any]:
    command = ["dng", "train", args.plan, *(["--data", str(args.data)] if args.data else [])]
    command += ["--output", str(args.output)]
    if args.start_from:
        command += ["--start-from", str(args.start_from)]
    unused = {"epochs"} if plan.training.minutes else {"minutes"}
    if plan.model not in DENOISERS:
        unused |= set(DENOISER_SETTINGS)
    for option in OPTIONS:
        if option not in unused:
            value = getattr(plan.training, option)
            command += [f"--{option.replace('_', '-')}", value if isinstance(value, str) else f"{value:.9g}"]
    if plan.model == "denoiser":
        command += ["--prediction", plan.network.get("prediction", "epsilon")]
    command += ["--numbers", args.numbers, "--threads", str(torch.get_num_threads())]
    return {
        "command": shlex.join([*command, "--device", device.type]),
        "seed": plan.training.seed,
        "steps": result.steps,
        "images_per_second": round(result.images_per_second, 1),
        "loss": result.loss,
        "seconds": round(result.seconds, 2),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "data": source,
    }
