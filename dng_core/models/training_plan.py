"""What `dng train` trains: a plan in a TOML file, or one of the plans of the shipped models."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from .datasets import DATASETS, Dataset
from .networks import UNetConfig
from .picture_book.networks import CrossUNetConfig
from .training_config import TrainingConfig

PLAN_FILES = Path(__file__).parent / "plans"
Model = Literal["denoiser", "classifier", "text_to_image", "judge"]
Labels = Literal["conditional", "none"]
SCENES = "scenes"  # the data of the picture book, which are drawn, not read
SHIPPED_NETWORK = {
    "base_channels": 64,
    "channel_multipliers": (1, 1, 2),
    "blocks_per_level": 1,
    "attention_levels": (1, 2),
    "patch_size": 2,
    "prediction": "v",
}
OF_SCENES: tuple[Model, ...] = ("text_to_image", "judge")
DENOISERS: tuple[Model, ...] = ("denoiser", "text_to_image")
DENOISER_SETTINGS = ("timesteps", "log_sigma_mean", "log_sigma_spread", "weighting", "null_label_share")
DEFAULTS: dict[Model, TrainingConfig] = {
    "denoiser": TrainingConfig(epochs=8.0, schedule="constant", timesteps="log_normal"),
    "classifier": TrainingConfig(epochs=4.0, learning_rate=2e-3, ema_decay=0.99),
    "text_to_image": TrainingConfig(
        epochs=8.0,
        batch_size=32,
        null_label_share=0.1,
        schedule="constant",
        timesteps="log_normal",
        log_sigma_mean=1.0,  # more elements than MNIST's, so that images take shape at more noise
        log_sigma_spread=1.5,
    ),
    "judge": TrainingConfig(epochs=0.8, batch_size=64, learning_rate=2e-3, ema_decay=0.99),
}


@dataclass(frozen=True)
class TrainingPlan:
    """A model to train.

    Parameters
    ----------
    name: the name of the files in the output folder.
    labels: "conditional" trains a denoiser on all classes with their labels (and the null label), "none" trains it
        without labels.
    only: the one class that a denoiser without labels is trained on; "" for all.
    dataset: a data set on the disk, or "scenes" for the picture book's, an endless row.
    network: fields of :class:`UNetConfig` that differ from its defaults, or of :class:`CrossUNetConfig` for a
        text-to-image model; ``width`` and ``residual`` for a classifier; ``width`` for a judge.
    size: the side to which a folder's images are cropped and scaled; 0 takes that of the first image.
    """

    name: str
    model: Model
    dataset: str = "mnist"
    labels: Labels = "conditional"
    only: str = ""
    size: int = 0
    network: Mapping[str, Any] = field(default_factory=dict)
    training: TrainingConfig = DEFAULTS["denoiser"]

    def __post_init__(self) -> None:
        datasets = (SCENES,) if self.model in OF_SCENES else DATASETS
        for name, known in (("model", tuple(DEFAULTS)), ("dataset", datasets), ("labels", ("conditional", "none"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not isinstance(self.name, str) or not isinstance(self.size, int) or self.size < 0:
            raise ValueError(f"name must be a text and size a whole number, not {self.name!r} and {self.size!r}")
        if self.only and (self.model != "denoiser" or self.labels != "none"):
            raise ValueError('only = "CLASS" is for a denoiser with labels = "none"')
        unknown = self.network.keys() - self._network_fields()
        if unknown:
            raise ValueError(f"[network] has unknown {', '.join(sorted(unknown))}")

    def chosen(self, data: Dataset) -> Dataset:
        """The images to train on; ValueError if ``only`` names a class outside the data set."""
        if self.only and self.only not in data.class_names:
            raise ValueError(f"class {self.only!r} is not one of the data set's: {', '.join(data.class_names)}")
        return data.only(data.class_names.index(self.only)) if self.only else data

    def class_names(self, data: Dataset) -> tuple[str, ...]:
        """The classes that the trained model will know; none without labels."""
        return () if self.model == "denoiser" and self.labels == "none" else data.class_names

    def unet(self, data: Dataset) -> UNetConfig:
        """The denoiser's network for the images of a data set."""
        size, channels = data.images.shape[2], data.images.shape[1]
        return UNetConfig(size, channels, num_classes=len(self.class_names(data)), **self.network)

    def with_training(self, **changes: Any) -> "TrainingPlan":
        """The plan with some training settings changed; None leaves a setting as it is."""
        given = {name: value for name, value in changes.items() if value is not None}
        if (unused := given.keys() & set(DENOISER_SETTINGS)) and self.model not in DENOISERS:
            raise ValueError(f"{', '.join(sorted(unused))}: these are settings of a denoiser, not of a {self.model}")
        return replace(self, training=replace(self.training, **given))

    def with_network(self, **changes: Any) -> "TrainingPlan":
        """The plan with some fields of the network changed; None leaves a field as it is."""
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(self, network={**self.network, **given}) if given else self

    def _network_fields(self) -> set[str]:
        if self.model in ("classifier", "judge"):
            return {"width", "residual"} if self.model == "classifier" else {"width"}
        if self.model == "text_to_image":
            return {f.name for f in fields(CrossUNetConfig)}
        return {f.name for f in fields(UNetConfig)} - {"image_size", "in_channels", "num_classes"}


PLANS = {
    "denoiser": TrainingPlan("mnist_denoiser", "denoiser", network=SHIPPED_NETWORK),
    "classifier": TrainingPlan("mnist_classifier", "classifier", training=DEFAULTS["classifier"]),
    "picture_book": TrainingPlan("picture_book", "text_to_image", SCENES, training=DEFAULTS["text_to_image"]),
    "picture_book_judge": TrainingPlan("picture_book_judge", "judge", SCENES, training=DEFAULTS["judge"]),
}


def read_plan(name: str) -> TrainingPlan:
    """The plan of a TOML file, of a name in ``plans``, or of a shipped model ("denoiser", "classifier").

    Raises
    ------
    FileNotFoundError: if there is neither.
    ValueError: if the file is no TOML, or says something unknown or invalid.
    """
    if name in PLANS:
        return PLANS[name]
    known_file = PLAN_FILES / f"{name}.toml"
    path = known_file if known_file.is_file() else Path(name)
    if not path.is_file():
        known_names = ", ".join([*PLANS, *sorted(p.stem for p in PLAN_FILES.glob("*.toml"))])
        raise FileNotFoundError(f"there is no plan {name!r}: give one of {known_names}, or a TOML file")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(TrainingPlan)}
        if unknown := raw.keys() - known:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(sorted(known))})")
        base = DEFAULTS.get(raw.get("model", ""), DEFAULTS["denoiser"])
        raw["training"] = replace(base, **raw.get("training", {}))
        raw["network"] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.get("network", {}).items()}
        return TrainingPlan(**{"name": path.stem} | raw)
    except RecursionError as error:
        raise ValueError(f"{path}: it is nested too deeply") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
