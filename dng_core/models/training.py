"""Training of the shipped models: a label-conditional DDPM and a classifier.

Every step draws its batch, timesteps, noise and dropped labels from a generator seeded by (seed, step), so a run that
was stopped and resumed from its checkpoint gives the same weights as one that was not.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from ..files import write_whole
from ..schedules import DDPMSchedule
from .mnist import images_digest, to_model_range
from .networks import Classifier, UNet, UNetConfig
from .weight_files import read_safetensors

Precision = Literal["float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
LossFunction = Callable[[nn.Module, Tensor, torch.Generator], Tensor]  # (model, indices of the batch, generator)


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train; the learning rate warms up linearly and decays by a cosine to zero.

    ``checkpoint_every`` counts steps; 0 writes a checkpoint at the end only. ``precision`` "bfloat16" computes forward
    passes in mixed precision (weights, their average and the loss stay in float32), which is for GPUs.
    """

    epochs: float
    batch_size: int = 128
    learning_rate: float = 8e-4
    warmup_steps: int = 200
    ema_decay: float = 0.999
    null_label_share: float = 0.3
    seed: int = 0
    checkpoint_every: int = 250
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")
        for name in ("epochs", "batch_size", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("seed", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves behind: the averaged weights and the mean loss of its last 500 steps.

    ``seconds`` counts the time spent in steps, of all the runs that a resumed training took.
    """

    state_dict: dict[str, Tensor]
    loss: float
    steps: int
    seconds: float


def train_denoiser(
    images: Tensor,
    labels: Tensor,
    network: UNetConfig,
    config: TrainingConfig,
    checkpoint: Path,
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
) -> TrainingResult:
    """Train the epsilon network by the simple loss of Ho et al. (eq. 14), a share of the labels dropped to null.

    A network without classes is trained without labels. ``images``: (n, channels, height, width) uint8. ``initial``:
    weights to start from, in place of random ones. Returns the exponential moving average of the weights.
    """
    torch.manual_seed(config.seed)
    schedule = DDPMSchedule.named("linear")
    alpha_bars = schedule.alpha_bars.to(device=device, dtype=torch.float32)
    model = UNet(network)

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        x0 = to_model_range(images[index])
        spread = (torch.arange(len(index)) + torch.rand(len(index), generator=generator)) / len(index)
        timestep = (spread * len(alpha_bars)).long()
        noise = torch.randn(x0.shape, generator=generator)
        dropped = torch.rand(len(index), generator=generator) < config.null_label_share
        label = labels[index].masked_fill(dropped, network.num_classes) if network.num_classes else None
        x0, timestep, noise = (v.to(device) for v in (x0, timestep, noise))
        label = None if label is None else label.to(device)
        alpha_bar = alpha_bars[timestep][:, None, None, None]
        return F.mse_loss(model(alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, timestep, label), noise)

    identity = f"denoiser {network.to_dict()} on {images_digest(images, labels)}"
    return _optimise(model, loss, len(images), config, checkpoint, device, identity, initial)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    config: TrainingConfig,
    checkpoint: Path,
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
    width: int = 32,
) -> TrainingResult:
    """Train the classifier by cross-entropy. ``images`` and ``initial`` as above.

    Batches are shifted by up to two pixels, and each image gets Gaussian noise of a random size up to 0.3 (on a range
    of -1 to 1), so that the remains of noise in generated images don't decide the class.
    """
    torch.manual_seed(config.seed)
    model = Classifier(images.shape[1], num_classes, width)
    identity = f"classifier {images.shape[1]} {num_classes} {width} on {images_digest(images, labels)}"

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = to_model_range(torch.roll(images[index], (dy, dx), dims=(2, 3)))
        size = 0.3 * torch.rand(len(index), 1, 1, 1, generator=generator)
        batch = batch + size * torch.randn(batch.shape, generator=generator)
        return F.cross_entropy(model(batch.to(device)), labels[index].to(device), label_smoothing=0.05)

    return _optimise(model, loss, len(images), config, checkpoint, device, identity, initial)


@torch.no_grad()
def classifier_accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` (uint8) that the classifier labels rightly."""
    device = next(classifier.parameters()).device
    right = 0
    for start in range(0, len(images), 1000):
        batch = to_model_range(images[start : start + 1000]).to(device)
        right += int((classifier(batch).argmax(dim=1).cpu() == labels[start : start + 1000]).sum())
    return right / len(images)


def _optimise(
    model: nn.Module,
    loss: LossFunction,
    count: int,
    config: TrainingConfig,
    checkpoint: Path,
    device: torch.device,
    identity: str,
    initial: Mapping[str, Tensor] | None,
) -> TrainingResult:
    """Train ``model`` on ``count`` images from the checkpoint on, if there is one, to the end of ``config.epochs``."""
    if config.batch_size > count:
        raise ValueError(f"batch_size {config.batch_size} is above the number of images, {count}")
    if initial is not None:
        model.load_state_dict(initial)
        identity += f" from {hashlib.sha256(save(dict(initial))).hexdigest()}"
    model = model.to(device).train()
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    total = math.ceil(config.epochs * count / config.batch_size)
    per_epoch = count // config.batch_size
    identity = json.dumps([identity, repr(replace(config, checkpoint_every=0))])
    losses: list[float] = []
    start, seconds = 0, 0.0
    if checkpoint.exists():
        start, seconds, losses = _load_checkpoint(checkpoint, model, average, optimiser, identity)

    order, order_epoch = torch.empty(0), -1
    began = time.monotonic() - seconds
    with tqdm(total=total, initial=start, desc="training", unit="step", dynamic_ncols=True) as progress:
        for step in range(start, total):
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch:
                shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
                order, order_epoch = torch.randperm(count, generator=shuffle), epoch
            index = order[position * config.batch_size : (position + 1) * config.batch_size]
            generator = torch.Generator().manual_seed((config.seed + 1) * 1_000_000_007 + step)

            warmup = min(1.0, (step + 1) / config.warmup_steps)
            decay = 0.5 * (1 + math.cos(math.pi * step / total))
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * warmup * decay
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                value = loss(model, index, generator)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()

            weight = 1 - min(config.ema_decay, (1 + step) / (10 + step))
            for key, current in model.state_dict().items():
                if current.is_floating_point():
                    average[key].lerp_(current, weight)
                else:
                    average[key].copy_(current)

            losses = [*losses[-499:], value.item()]
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss became {losses[-1]} at step {step}; lower the learning rate")
            progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)
            progress.update()
            due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
            if due or step + 1 == total:
                seconds = time.monotonic() - began
                _save_checkpoint(checkpoint, model, average, optimiser, identity, step + 1, seconds, losses)
    return TrainingResult(average, sum(losses) / len(losses), total, seconds)


def _save_checkpoint(
    path: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    identity: str,
    step: int,
    seconds: float,
    losses: list[float],
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": v for k, v in state.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_whole(path, save(tensors, metadata={"identity": identity, "step": str(step), "seconds": f"{seconds:.1f}"}))


def _load_checkpoint(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimiser: torch.optim.Optimizer, identity: str
) -> tuple[int, float, list[float]]:
    remedy = f"remove {path} to start afresh"
    try:
        tensors, metadata = read_safetensors(path)
    except SafetensorError as error:
        raise ValueError(f"the checkpoint is damaged ({error}); {remedy}") from error
    if metadata.get("identity") != identity:
        raise ValueError(f"the checkpoint was made with other settings, data or network; {remedy}")
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for key, value in average.items():
        value.copy_(tensors[f"average.{key}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(metadata["step"]), float(metadata.get("seconds", 0)), tensors["losses"].tolist()
