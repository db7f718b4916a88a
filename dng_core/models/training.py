"""Training of the shipped models: a denoiser by its squared error, a classifier, and the loop that they share.

Every step draws its timesteps, noise and dropped labels from a generator on the training's device, seeded by (seed,
step). A run that was stopped and resumed from its checkpoint therefore gives the same weights as an unbroken one.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from ..files import write_whole
from ..schedules import DDPMSchedule
from .mnist import images_digest, to_model_range
from .networks import Prediction, UNet, UNetConfig
from .training_config import Precision, TrainingConfig
from .weight_files import ClassifierInfo, read_safetensors

MIN_SNR = 5.0  # gamma of Hang et al. (2023)
MOMENTUM, DECAY = 0.9, 5e-4  # of "sgd": those of Zagoruyko & Komodakis (2016, arXiv 1605.07146)
MOST_SHIFT = {"batch": 2, "image": 4}  # pixels by which a classifier's images are shifted: a choice, and that paper's
FREE = ("checkpoint_every", "checkpoint_minutes", "compile")  # settings that change the weights by rounding at most
KEPT_LOSSES = 500  # the last ones, whose mean a training tells; a choice
LOOK_EVERY = {"cpu": 1, "cuda": 100}  # steps between looks at the loss, each of which waits for a GPU; a choice
WARM_STEPS = 10  # of each run, which the measured speed leaves out: a GPU loads and compiles kernels in them
LossFunction = Callable[[nn.Module, Tensor, torch.Generator], Tensor]  # (model, indices of the batch, generator)


@dataclass(frozen=True)
class TrainingResult:
    """What a training run leaves behind: the averaged weights and the mean loss of its last 500 steps.

    ``seconds`` counts the time spent in steps, over all runs of a resumed training. ``images_per_second`` is the speed
    of the last of these runs, without its first ten steps; 0 if it had no more.
    """

    state_dict: dict[str, Tensor]
    loss: float
    steps: int
    seconds: float
    images_per_second: float


class DenoisingError:
    """The squared error of what a denoiser predicts, weighted and averaged over a batch, on the linear chain."""

    def __init__(self, prediction: Prediction, config: TrainingConfig, device: torch.device) -> None:
        self.prediction, self.config = prediction, config
        self.schedule = DDPMSchedule.named("linear")
        self.alpha_bars = self.schedule.alpha_bars.to(device=device, dtype=torch.float32)
        snr = self.alpha_bars / (1 - self.alpha_bars)
        least = snr.clamp(max=MIN_SNR) / (snr if prediction == "epsilon" else snr + 1)
        self.weights = least if config.weighting == "min_snr" else torch.ones_like(snr)

    def __call__(self, x0: Tensor, predict: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator) -> Tensor:
        """The loss of clean images x0, (n, channels, height, width), whose timesteps and noise it draws.

        ``predict`` gives the prediction for the states x_t and their timesteps, (n,).
        """
        spread = (torch.arange(len(x0), device=generator.device) + uniform((len(x0),), generator)) / len(x0)
        timestep = _timesteps(spread, self.schedule, self.config).to(x0.device)
        noise = normal(x0.shape, generator).to(x0.device)
        alpha = self.alpha_bars[timestep][:, None, None, None].sqrt()
        spread_of_noise = (1 - alpha**2).sqrt()
        target = noise if self.prediction == "epsilon" else alpha * noise - spread_of_noise * x0
        error = predict(alpha * x0 + spread_of_noise * noise, timestep) - target
        return (self.weights[timestep] * error.square().mean(dim=(1, 2, 3))).mean()


def train_denoiser(
    images: Tensor,
    labels: Tensor,
    network: UNetConfig,
    config: TrainingConfig,
    checkpoint: Path,
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
) -> TrainingResult:
    """Train a denoiser by the squared error of what it predicts (Ho et al. 2020, eq. 14, for epsilon and "simple").

    A network without classes is trained without labels. ``images``: (n, channels, height, width) uint8. They go to the
    device once and stay uint8, because bringing a batch to the model's range takes a ten-thousandth of a step.
    ``initial``: weights to start from, in place of random ones; their network may predict something else.
    Returns the exponential moving average of the weights.
    """
    torch.manual_seed(config.seed)
    model = UNet(network)
    error = DenoisingError(network.prediction, config, device)
    identity = f"denoiser {network.to_dict()} on {images_digest(images, labels)}"
    images, labels = images.to(device), labels.to(device)

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        def predict(x_t: Tensor, timestep: Tensor) -> Tensor:
            dropped = uniform((len(index),), generator) < config.null_label_share
            label = labels[index].masked_fill(dropped, network.num_classes) if network.num_classes else None
            return model(x_t, timestep, label)

        batch = _mirrored(images[index], config.mirror_share, generator)
        return error(to_model_range(batch), predict, generator)

    return optimise(model, loss, len(images), config, checkpoint, device, identity, initial)


def train_classifier(
    images: Tensor,
    labels: Tensor,
    info: ClassifierInfo,
    config: TrainingConfig,
    checkpoint: Path,
    device: torch.device,
    initial: Mapping[str, Tensor] | None = None,
) -> TrainingResult:
    """Train a classifier by cross-entropy. ``images`` and ``initial`` are as in :func:`train_denoiser`.

    Images are shifted as ``config.shifts`` says. Each image gets Gaussian noise of a random size up to
    ``config.image_noise``, so that noise left in generated images does not decide the class.
    """
    torch.manual_seed(config.seed)
    model = info.network()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a fifth faster on a CPU with AVX2
    identity = f"classifier {info} on {images_digest(images, labels)}"
    images, labels = images.to(device), labels.to(device)
    together = config.shifts == "batch"

    def loss(model: nn.Module, index: Tensor, generator: torch.Generator) -> Tensor:
        most, count = MOST_SHIFT[config.shifts], 1 if together else len(index)
        shift = torch.randint(-most, most + 1, (2, count), generator=generator, device=device)
        shifted = _shifted(images[index], *shift)
        batch = to_model_range(_mirrored(shifted, config.mirror_share, generator))
        size = config.image_noise * uniform((len(index), 1, 1, 1), generator)
        batch = batch + size * normal(batch.shape, generator)
        return F.cross_entropy(model(batch), labels[index], label_smoothing=0.05)

    return optimise(model, loss, len(images), config, checkpoint, device, identity, initial)


@torch.no_grad()
def classifier_accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` (uint8) that the classifier labels rightly."""
    device = next(classifier.parameters()).device
    right = 0
    for start in range(0, len(images), 1000):
        batch = to_model_range(images[start : start + 1000]).to(device)
        right += int((classifier(batch).argmax(dim=1).cpu() == labels[start : start + 1000]).sum())
    return right / len(images)


def fast_bfloat16(device: torch.device) -> tuple[bool, str]:
    """Whether a device computes in bfloat16 faster than in float32, and the reason for the answer.

    A CPU with AMX or AVX-512 BF16 is faster. Other CPUs emulate bfloat16, which is several times slower than float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
        return fast, f"{torch.cuda.get_device_name(device)} {'has' if fast else 'lacks'} bfloat16"
    found = _cpu_bfloat16()
    return bool(found), f"this processor has {' and '.join(found) or 'neither AMX nor AVX-512 for bfloat16'}"


def chosen_precision(precision: Precision, device: torch.device) -> tuple[Precision, str]:
    """The precision that a setting means on a device, and why; ValueError for bfloat16 where it is slow."""
    fast, why = fast_bfloat16(device)
    if precision == "bfloat16" and not fast:
        raise ValueError(f"precision bfloat16 would be slower than float32 here, {why}: use auto or float32")
    if precision != "auto":
        return precision, "as asked"
    return ("bfloat16" if fast else "float32"), why


def _cpu_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The processor's instructions for bfloat16, as Linux lists them; elsewhere as torch's own query finds them."""
    if cpuinfo.is_file():
        flags = cpuinfo.read_text(encoding="utf-8", errors="replace").split()
        return [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    queries = {"amx": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}  # torch 2.6 and later
    return [name for name, query in queries.items() if getattr(torch.cpu, query, bool)()]


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Numbers between 0 and 1, on the generator's device."""
    return torch.rand(tuple(shape), generator=generator, device=generator.device)


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers, on the generator's device."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device)


def _timesteps(spread: Tensor, schedule: DDPMSchedule, config: TrainingConfig) -> Tensor:
    """Timesteps, (n,) long, whose quantiles are ``spread``, (n,) in 0 .. 1."""
    if config.timesteps == "uniform":
        return (spread * len(schedule.betas)).long()
    normal = torch.special.ndtri(spread.double().clamp(1e-6, 1 - 1e-6))
    return schedule.timestep((config.log_sigma_mean + config.log_sigma_spread * normal).exp())


def _mirrored(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A random ``share`` of the images, (n, channels, height, width), mirrored left to right."""
    if not share:
        return images
    chosen = uniform((len(images),), generator) < share
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def _shifted(images: Tensor, dy: Tensor, dx: Tensor) -> Tensor:
    """The images, (n, channels, height, width), moved down and right by whole pixels, (n,) or (1,) each.

    What leaves at one edge comes in at the opposite one.
    """
    rows = (torch.arange(images.shape[2], device=images.device) - dy[:, None]) % images.shape[2]
    columns = (torch.arange(images.shape[3], device=images.device) - dx[:, None]) % images.shape[3]
    number = torch.arange(len(images), device=images.device)
    return images[number[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(3, 1)


def optimise(
    model: nn.Module,
    loss: LossFunction,
    count: int,
    config: TrainingConfig,
    checkpoint: Path,
    device: torch.device,
    identity: str,
    initial: Mapping[str, Tensor] | None,
    endless: bool = False,
) -> TrainingResult:
    """Train ``model`` on ``count`` images to the end of ``config.epochs``, starting at the checkpoint if there is one.

    A checkpoint made before the learning rate falls can also start a longer or shorter run. Each epoch shuffles the
    indices 0 .. ``count`` - 1. An ``endless`` row of images is taken in its order instead, and each only once: then
    ``count`` is just how many make an epoch.
    """
    if config.batch_size > count:
        raise ValueError(f"batch_size {config.batch_size} is above the number of images, {count}")
    if initial is not None:
        model.load_state_dict(initial)
        identity += f" from {hashlib.sha256(save(dict(initial))).hexdigest()}"
    model = model.to(device).train()
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as its matrix units compute
    current = model.state_dict()
    average = {k: v.detach().clone() for k, v in current.items()}
    floats = [k for k, v in current.items() if v.is_floating_point()]
    averages, weights = [average[k] for k in floats], [current[k] for k in floats]
    optimiser = _optimiser(model, config)
    total = 0 if config.minutes else math.ceil(config.epochs * count / config.batch_size)  # 0: as many as fit
    per_epoch = count // config.batch_size
    precision, _ = chosen_precision(config.precision, device)
    stepped = model
    if config.compile == "on" and device.type == "cuda":
        stepped = cast(nn.Module, torch.compile(model))
    identity = json.dumps([identity, _settled(config, precision)])
    losses: list[float] = []
    start, seconds = 0, 0.0
    if checkpoint.exists():
        start, seconds, losses, planned = _load_checkpoint(checkpoint, model, average, optimiser, identity)
        if total != planned and start > min(config.decay_starts(total), config.decay_starts(planned)):
            raise ValueError(
                f"the checkpoint at step {start} is of a run of {planned} steps, whose learning rate has begun to "
                f"fall, or would have in one of {total}: give the epochs it was started with, or remove {checkpoint} "
                f"to start afresh"
            )

    unseen: list[Tensor] = []  # losses that no one has looked at yet
    order, order_epoch = torch.empty(0), -1
    began = time.monotonic() - seconds
    saved = time.monotonic()
    warm_at = math.nan
    size = config.batch_size
    bar = {"desc": "training", "unit": "image", "mininterval": 1.0, "dynamic_ncols": True}
    step, last = start - 1, start == total > 0 or 0 < 60 * config.minutes <= seconds
    with tqdm(total=total * size or None, initial=start * size, **bar) as progress:
        while not last:
            step, passed = step + 1, time.monotonic() - began
            last = passed >= 60 * config.minutes if config.minutes else step + 1 == total
            epoch, position = divmod(step, per_epoch)
            if epoch != order_epoch and not endless:
                shuffle = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
                order, order_epoch = torch.randperm(count, generator=shuffle).to(device), epoch
            index = order[position * size : (position + 1) * size]
            if endless:
                index = torch.arange(step * size, (step + 1) * size)
            generator = torch.Generator(device).manual_seed((config.seed + 1) * 1_000_000_007 + step)

            for group in optimiser.param_groups:
                group["lr"] = config.rate_after(step, passed) if config.minutes else config.rate(step, total)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"), _attention(device):
                value = loss(stepped, index, generator)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()

            with torch.no_grad():
                get_ema_multi_avg_fn(min(config.ema_decay, (1 + step) / (10 + step)))(averages, weights, None)
            unseen.append(value.detach())
            now = time.monotonic()
            by_steps = config.checkpoint_every > 0 and (step + 1) % config.checkpoint_every == 0
            by_time = config.checkpoint_minutes > 0 and now - saved >= 60 * config.checkpoint_minutes
            keep = by_steps or by_time or last
            if keep or (step + 1) % LOOK_EVERY[device.type] == 0:
                losses, unseen = [*losses, *_finite(unseen, step)][-KEPT_LOSSES:], []
                progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}", refresh=False)
            progress.update(size)
            if step + 1 == start + WARM_STEPS:
                warm_at = time.monotonic()
            if keep:
                for key in average.keys() - floats:  # the counters of batch normalisation
                    average[key].copy_(current[key])
                saved = time.monotonic()
                seconds = saved - began
                metadata = {"identity": identity, "step": str(step + 1), "of": str(total), "seconds": f"{seconds:.1f}"}
                _save_checkpoint(checkpoint, model, average, optimiser, metadata, losses)
    measured = step + 1 - start - WARM_STEPS
    speed = measured * size / (began + seconds - warm_at) if measured > 0 else 0.0
    return TrainingResult(average, sum(losses) / len(losses), step + 1, seconds, speed)


def _finite(losses: list[Tensor], step: int) -> list[float]:
    """The losses of the last steps up to ``step`` as numbers; FloatingPointError if one is not finite."""
    values = torch.stack(losses).tolist()
    for at, value in enumerate(values, step + 1 - len(values)):
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} at step {at}; lower the learning rate")
    return values


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """How attention is computed in training: on a CPU, plainly.

    There torch's fused attention takes so long on the way back that the picture book is trained 1.1 to 1.5 times as
    fast without it (AMX, one thread, batches of 32; torch 2.11).
    """
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _optimiser(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if config.optimiser == "sgd":
        return torch.optim.SGD(trained, lr=config.learning_rate, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
    return torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)


def _save_checkpoint(
    path: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    metadata: dict[str, str],
    losses: list[float],
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": v for k, v in state.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_whole(path, save(tensors, metadata=metadata))


def _settled(config: TrainingConfig, precision: Precision) -> dict[str, Any]:
    """The settings that decide the weights of every step before the learning rate falls."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    if config.schedule == "constant":
        del settings["epochs"]
    return settings | {"precision": precision}


def _load_checkpoint(
    path: Path, model: nn.Module, average: dict[str, Tensor], optimiser: torch.optim.Optimizer, identity: str
) -> tuple[int, float, list[float], int]:
    """Load a checkpoint; returns its step, the seconds spent, the last losses, and the planned number of steps."""
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
    step, total = int(metadata["step"]), int(metadata["of"])
    return step, float(metadata["seconds"]), tensors["losses"].tolist(), total
