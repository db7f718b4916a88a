"""Weights of the class models: one safetensors file each, whose metadata describes its network.

Only safetensors files are read. They hold tensors and text, and no code.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..files import parse_json, read_json, write_whole
from .networks import Classifier, ResidualClassifier, SmallClassifier, UNet, UNetConfig, check_within_bounds

Numbers = Literal["float32", "float16"]
NUMBERS: tuple[Numbers, ...] = get_args(Numbers)  # the number formats of a weights file
SHIPPED = Path(__file__).resolve().parent / "weights"
RETRAIN = "reinstall DNG, or train it with `dng train`"


@dataclass(frozen=True)
class DenoiserInfo:
    """What a denoiser's file says of it: a network on images of ``data_range``, black to white.

    An old file names no ``prediction`` for its network, which then predicts epsilon.
    ``schedule``: the training chain's name (:meth:`DDPMSchedule.named`); ``class_names``: the names of labels 0, 1,
    ... (the label after the last is the null label). So far, the data range is always -1 .. 1.
    """

    name: str
    network: UNetConfig
    schedule: str
    data_range: tuple[float, float]
    class_names: tuple[str, ...]

    @property
    def full_name(self) -> str:
        """What its calibration calls it."""
        return f"pixel model {self.name}, {self.network.prediction}"


@dataclass(frozen=True)
class ClassifierInfo:
    """What a classifier's file says of it: it takes (batch, in_channels, image_size, image_size) in ``data_range``."""

    name: str
    image_size: int
    in_channels: int
    width: int
    data_range: tuple[float, float]
    class_names: tuple[str, ...]
    residual: bool = False

    def __post_init__(self) -> None:
        check_within_bounds(self, image_size=4096, in_channels=64, width=1024)
        if not isinstance(self.residual, bool):
            raise ValueError(f"residual must be true or false, not {self.residual!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what it sees."""
        return self.in_channels, self.image_size, self.image_size

    def network(self) -> Classifier:
        """The network that its weights are for, with random weights."""
        kind = ResidualClassifier if self.residual else SmallClassifier
        return kind(self.in_channels, len(self.class_names), self.width)


def shipped_denoisers() -> dict[str, Path]:
    """The denoisers that come with the project: name -> file (:func:`load_denoiser` says if it is missing)."""
    return {name: SHIPPED / f"{name}_denoiser.safetensors" for name in ("mnist", "cifar10")}


def shipped_calibrations() -> dict[str, Path]:
    """The calibrations that come with the project, of denoisers and of the picture book: name -> file."""
    ending = ".calibration.json"
    files = sorted(SHIPPED.glob(f"*{ending}"))
    return {path.name.removesuffix(ending).removesuffix("_denoiser"): path for path in files}


def calibration_of(weights: Path) -> Path:
    """Where the calibration of a model lies: beside its weights."""
    return weights.with_suffix(".calibration.json")


def shipped_classifiers() -> dict[str, Path]:
    """The classifiers that come with the project: name -> file."""
    return {name: SHIPPED / f"{name}_classifier.safetensors" for name in ("mnist", "cifar10")}


def save_denoiser(
    path: Path, state_dict: Mapping[str, Tensor], info: DenoiserInfo, numbers: Numbers = "float32"
) -> None:
    """Write a denoiser's weights; the file appears whole or not at all.

    ``numbers``: "float16" halves the file, at a relative error of 5e-4. Both formats are loaded as float32. ValueError
    for weights too large for the format.
    """
    write_weights(path, state_dict, "denoiser", info, numbers)


def save_classifier(
    path: Path, state_dict: Mapping[str, Tensor], info: ClassifierInfo, numbers: Numbers = "float32"
) -> None:
    """Write a classifier's weights, as :func:`save_denoiser` does for a denoiser."""
    write_weights(path, state_dict, "classifier", info, numbers)


def load_denoiser(path: Path) -> tuple[UNet, DenoiserInfo]:
    """Read a denoiser, in evaluation mode and without gradients, on the CPU.

    Raises
    ------
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged, holds something else, or its tensors don't fit the network it names.
    """
    state_dict, raw = read_weights(path, "denoiser")
    with reading(path):
        network = UNetConfig(**tuples(raw.pop("network")))
        info = DenoiserInfo(network=network, **tuples(raw))
        _check_range(info)
    if len(info.class_names) != network.num_classes:
        raise ValueError(f"{path} names {len(info.class_names)} classes, its network has {network.num_classes}")
    return filled(path, lambda: UNet(network), state_dict), info


def load_classifier(path: Path) -> tuple[Classifier, ClassifierInfo]:
    """Read a classifier, as :func:`load_denoiser` does a denoiser."""
    state_dict, raw = read_weights(path, "classifier")
    with reading(path):
        info = ClassifierInfo(**tuples(raw))
        _check_range(info)
    return filled(path, info.network, state_dict), info


def open_classifier(source: str) -> tuple[Classifier, ClassifierInfo]:
    """A classifier by the name of a shipped one, or its file; errors as :func:`load_classifier`."""
    return load_classifier(shipped_classifiers().get(source, Path(source)))


Network = TypeVar("Network", bound=nn.Module)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any error from an unreadable description into one message that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} describes a network that this version of DNG doesn't know ({error!r}): update DNG, or train it "
            f"anew with `dng train`"
        ) from error


def write_weights(path: Path, state_dict: Mapping[str, Tensor], kind: str, info: Any, numbers: Numbers) -> None:
    """Write weights of a ``kind`` with their description, a dataclass; as :func:`save_denoiser`."""
    dtype: torch.dtype = getattr(torch, numbers)
    tensors = {
        k: (v.to(dtype) if v.is_floating_point() else v).detach().cpu().contiguous().clone()
        for k, v in state_dict.items()
    }
    if beyond := [k for k, v in tensors.items() if not torch.equal(v.isfinite(), state_dict[k].isfinite().cpu())]:
        raise ValueError(f"{path} is not written: {', '.join(beyond)} hold numbers too large for {numbers}")
    write_whole(path, save(tensors, metadata={"kind": kind, "info": json.dumps(asdict(info))}))


def read_weights(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a ``kind`` and their description, which the caller reads within :func:`reading`."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: {RETRAIN}")
    if (expected := recorded_digest(path)) and expected != file_digest(path):
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {path.stem}.json: {RETRAIN}")
    try:
        tensors, metadata = read_safetensors(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}): {RETRAIN}") from error
    if metadata.get("kind") != kind:
        raise ValueError(f"{path} holds {metadata.get('kind', 'something that DNG did not write')}, not a {kind}")
    with reading(path):
        return tensors, dict(parse_json(metadata["info"]))


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded_digest(path: Path) -> str:
    """The SHA-256 that the record beside a weights file says it has; "" where no record says one."""
    try:
        return str(read_json(path.with_suffix(".json"))["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; SafetensorError where it is damaged or of another kind."""
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118


def tuples(raw: dict[str, Any]) -> dict[str, Any]:
    """A description from JSON, with its lists as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}


def _check_range(info: DenoiserInfo | ClassifierInfo) -> None:
    if info.data_range != (-1.0, 1.0):
        raise ValueError(f"its data range is {info.data_range}, not -1 .. 1")


def filled(path: Path, make: Callable[[], Network], state_dict: Mapping[str, Tensor]) -> Network:
    """The network that ``make`` makes with the weights of a file, in float32, for use; ValueError if they don't fit.

    It is made without memory of its own: whatever sizes a file describes, no more is allocated than its tensors take.
    """
    copies = {k: v.to(torch.float32, copy=True) if v.is_floating_point() else v.clone() for k, v in state_dict.items()}
    try:
        with torch.device("meta"):
            model = make()
        model.load_state_dict(copies, assign=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the weights in {path} are of another shape, and don't fit their network: {RETRAIN} ({error})"
        ) from error
    return model.eval().requires_grad_(False)
