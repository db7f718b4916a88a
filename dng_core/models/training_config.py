"""How long and how to train: the settings of `dng train`."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["auto", "float32", "bfloat16"]
Schedule = Literal["constant", "cosine"]
Timesteps = Literal["uniform", "log_normal"]
Weighting = Literal["simple", "min_snr"]
Optimiser = Literal["adamw", "sgd"]
Shifts = Literal["batch", "image"]
Compile = Literal["off", "on"]
CHOICES: dict[str, tuple[str, ...]] = {
    "precision": get_args(Precision),
    "schedule": get_args(Schedule),
    "timesteps": get_args(Timesteps),
    "weighting": get_args(Weighting),
    "optimiser": get_args(Optimiser),
    "shifts": get_args(Shifts),
    "compile": get_args(Compile),
}


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how to train. The defaults are a choice.

    Parameters
    ----------
    schedule: the learning rate after a linear warm-up of ``warmup_steps``. A "constant" one falls linearly to 0 only
        over the last ``decay_share`` of all steps. Before this fall, a run can still be made longer or shorter.
        A "cosine" one falls to 0 from the start.
    ema_decay: the decay per step of the exponential moving average of the weights.
    timesteps: how a denoiser's timesteps are drawn. "uniform" draws all alike. "log_normal" draws log sigma with mean
        ``log_sigma_mean`` and standard deviation ``log_sigma_spread`` (Karras et al. 2022, sec. 5) and takes the
        nearest timestep, so that most training is spent where images take shape.
    weighting: weights of a denoiser's squared error of epsilon or v. "simple" weighs all timesteps alike; "min_snr"
        weighs the error of x_0 by min(SNR, 5) (Hang et al. 2023).
    null_label_share: the share of a denoiser's labels that is replaced by the null label, and of captions by none.
    mirror_share: the share of images that are mirrored left to right; 0 for digits, 0.5 for photographs.
    optimiser: "adamw", or "sgd" with Nesterov's momentum, which suits a :class:`ResidualClassifier`.
    shifts: a classifier's images are shifted by up to two pixels, all of a "batch" alike, or each "image" by up to
        four of its own.
    image_noise: the largest standard deviation of the noise on a classifier's images, whose pixels are -1 to 1.
    checkpoint_every, checkpoint_minutes: steps, and minutes, after which a checkpoint is written; 0 for never. The
        last step always writes one.
    precision: "bfloat16" computes forward passes in mixed precision (weights, their average and the loss stay in
        float32); "auto" takes it where the device is fast at it (:func:`fast_bfloat16`).
    minutes: above 0, the training ends after so much time in place of ``epochs``, and the learning rate falls by the
        time that has passed. The weights then depend on the machine's speed.
    compile: "on" compiles the network on a GPU (``torch.compile``, which needs Triton and a C compiler): the first
        step takes a minute, and the others are faster. A CPU takes no notice.
    """

    epochs: float
    batch_size: int = 128
    learning_rate: float = 8e-4
    warmup_steps: int = 200
    ema_decay: float = 0.999
    null_label_share: float = 0.3
    seed: int = 0
    checkpoint_every: int = 0
    checkpoint_minutes: float = 3.0
    precision: Precision = "auto"
    schedule: Schedule = "cosine"
    decay_share: float = 0.3
    timesteps: Timesteps = "uniform"
    log_sigma_mean: float = 0.6
    log_sigma_spread: float = 1.2
    weighting: Weighting = "simple"
    mirror_share: float = 0.0
    image_noise: float = 0.3
    optimiser: Optimiser = "adamw"
    shifts: Shifts = "batch"
    minutes: float = 0.0
    compile: Compile = "off"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("batch_size", "seed", "warmup_steps", "checkpoint_every"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "learning_rate", "warmup_steps", "log_sigma_spread"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("seed", "checkpoint_every", "checkpoint_minutes", "image_noise", "minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("decay_share", "ema_decay", "null_label_share", "mirror_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not math.isfinite(self.log_sigma_mean):
            raise ValueError(f"log_sigma_mean must be a finite number, not {self.log_sigma_mean}")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step, 0 .. total - 1."""
        return self._rate(step, step, total)

    def rate_after(self, step: int, seconds: float) -> float:
        """The learning rate of a step of a training by ``minutes``, after ``seconds`` of it."""
        return self._rate(step, int(seconds * 1000), max(int(self.minutes * 60_000), 1))

    def _rate(self, step: int, done: int, total: int) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        if self.schedule == "cosine":
            return self.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(done / total, 1.0)))
        left = max(total - done, 0) / max(total - self.decay_starts(total), 1)
        return self.learning_rate * warmup * min(1.0, left)

    def decay_starts(self, total: int) -> int:
        """The step up to which all steps are the same, whatever the length of the training."""
        return 0 if self.schedule == "cosine" else total - math.floor(self.decay_share * total)
