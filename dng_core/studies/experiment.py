"""What a class-removal experiment consists of: its file, and the points that it makes of it.

An experiment is a TOML file; those that come with the project are in ``presets``.
"""

import itertools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from ..calibration_files import load_calibration
from ..methods import STUDIED, MethodSettings
from ..models.predictors import Precision
from ..models.weight_files import calibration_of, shipped_denoisers
from .class_removal import METHOD_NAMES, Point, Spacing, Variance

PRESETS = Path(__file__).parent / "presets"
MOST_SEED = 2**40  # a million times this, a batch's seed, is still one that torch takes
METHOD_OF = {METHOD_NAMES[method]: method for method in STUDIED}


@dataclass(frozen=True)
class MethodPlan:
    """How one method is tried out.

    Parameters
    ----------
    scales: guidance scales, each a point at the full number of images.
    search: other settings -> their candidates. All combinations are tried first with few images, at each of
        ``search_scales``, for every class. The sweep over ``scales`` then uses the best combination.
    fixed: other settings, the same everywhere.
    """

    method: str
    scales: tuple[float, ...]
    search: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    search_scales: tuple[float, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError(f"{METHOD_NAMES[self.method]} has no scales to sweep over")
        if self.search and not self.search_scales:
            raise ValueError(f"{METHOD_NAMES[self.method]} has a search without search_scales")
        self.candidates(), self.sweep({})  # makes, and so validates, all settings before anything runs

    def candidates(self) -> list[MethodSettings]:
        """All settings that the search tries; none without a search."""
        if not self.search:
            return []
        combinations = itertools.product(*self.search.values())
        return [
            self._settings(scale, dict(zip(self.search, values, strict=True)))
            for values in combinations
            for scale in self.search_scales
        ]

    def sweep(self, best: Mapping[str, Any]) -> list[MethodSettings]:
        """The settings of the sweep by rising scale, with the best of the search."""
        return [self._settings(scale, best) for scale in sorted(self.scales)]

    def searched(self, settings: MethodSettings) -> dict[str, Any]:
        """Those of ``settings`` that the search decides."""
        return {name: getattr(settings, name) for name in self.search}

    def _settings(self, scale: float, others: Mapping[str, Any]) -> MethodSettings:
        names = {f.name for f in fields(STUDIED[self.method])} - {"guidance_scale"}
        chosen = {**self.fixed, **others}
        if unknown := chosen.keys() - names:
            raise ValueError(f"{METHOD_NAMES[self.method]}: there is no setting {', '.join(sorted(unknown))}")
        if infinite := [key for key, value in chosen.items() if value in (math.inf, -math.inf)]:
            raise ValueError(f"{METHOD_NAMES[self.method]}: {infinite[0]} is infinite: give a large number instead")
        return STUDIED[self.method](guidance_scale=scale, **chosen)


@dataclass(frozen=True)
class Experiment:
    """A class-removal experiment.

    Parameters
    ----------
    denoiser: source of the unconditional or label-conditional network (:func:`~.checkpoints.open_denoiser`).
    class_only: class name -> source of a network trained on this class alone; empty for a label-conditional denoiser.
    classifier: a shipped classifier's name, or a file of `dng train classifier`.
    dataset: the real images to compare with (:func:`~.datasets.load_dataset`); "" for none.
    classes: names of the classes to remove, one after the other; () for all of the classifier's.
    search_classes: names of the classes on which one search finds the settings for all classes; () searches for each
        class on its own.
    adaptive: begin each sweep at the smallest scale that is safe with few images, and end it at the first that is safe
        with all images (:func:`~.selection.next_scale`).
    undesired_every, precision: see :class:`~.class_removal.Point`.
    target_share: the largest forbidden share that is safe. The best settings have the least KL among the safe ones.
    reference_images: the most real images that distances are measured against.
    """

    name: str
    denoiser: str
    classifier: str
    methods: tuple[MethodPlan, ...]
    dataset: str = ""
    class_only: Mapping[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    search_classes: tuple[str, ...] = ()
    adaptive: bool = False
    images: int = 1000
    search_images: int = 128
    steps: int = 50
    batch: int = 125
    seed: int = 0
    spacing: Spacing = "ddpm"
    variance: Variance = "posterior"
    undesired_every: int = 1
    precision: Precision = "float32"
    target_share: float = 0.01
    reference_images: int = 10_000

    def __post_init__(self) -> None:
        least_of = {"images": 4, "search_images": 4, "batch": 1, "undesired_every": 1, "reference_images": 4}
        for name, least in least_of.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {getattr(self, name)!r}")
        if not isinstance(self.seed, int) or abs(self.seed) > MOST_SEED:
            raise ValueError(f"seed must be a whole number between -2^40 and 2^40, not {self.seed!r}")
        for name in ("name", "denoiser", "classifier", "dataset"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, not {getattr(self, name)!r}")
        for name in ("classes", "search_classes"):
            if not isinstance(getattr(self, name), tuple) or not all(isinstance(k, str) for k in getattr(self, name)):
                raise ValueError(f"{name} must be a list of texts, not {getattr(self, name)!r}")
        if not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must be a whole number of at least 1 and at most 1000, not {self.steps!r}")
        if not 0 <= self.target_share < 1:
            raise ValueError(f"target_share must be at least 0 and below 1, not {self.target_share}")
        if self.spacing not in ("ddpm", "karras"):
            raise ValueError(f"spacing must be 'ddpm' or 'karras', not {self.spacing!r}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be 'float32' or 'bfloat16', not {self.precision!r}")
        if self.variance not in ("posterior", "forward"):
            raise ValueError(f"variance must be 'posterior' or 'forward', not {self.variance!r}")

    def labels(self, class_names: tuple[str, ...]) -> list[int]:
        """The labels of the classes to remove; ValueError for a class outside the data set."""
        chosen = self.classes or (tuple(self.class_only) or class_names)
        for name in chosen:
            if name not in class_names:
                raise ValueError(f"class {name!r} is not one of the data set's: {', '.join(class_names)}")
            if self.class_only and name not in self.class_only:
                raise ValueError(f"there is no class-only network for {name!r}: name it under [class_only]")
        for name in self.search_classes:
            if name not in chosen:
                raise ValueError(f"search class {name!r} is not one of the classes to remove: {', '.join(chosen)}")
        if len(class_names) < 2:
            raise ValueError("with one class only, nothing would be left: give data with at least two classes")
        return [class_names.index(name) for name in chosen]

    def point(
        self, weights: Mapping[str, str], label: int | None, name: str, settings: MethodSettings | None, images: int
    ) -> Point:
        """A point; ``weights``: class name -> digest of the networks ("" for the denoiser alone)."""
        return Point(
            denoiser=self.denoiser,
            class_only=self.class_only.get(name, "") if settings else "",
            weights=weights[name if settings and self.class_only else ""],
            forbidden=label if settings else None,
            settings=settings,
            steps=self.steps,
            images=images,
            batch=min(self.batch, images),
            seed=self.seed,
            spacing=self.spacing,
            variance=self.variance,
            undesired_every=self.undesired_every,
            precision=self.precision,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """Those of its fields that make it another experiment, whose points do not belong into the same report.

        They say by which networks, over which steps and from which noise images are drawn, and by what they are
        measured. What is tried out and how often (methods, scales, classes, images) may change from run to run.
        """
        networks, drawn = (
            ("denoiser", "class_only", "classifier"),
            ("steps", "spacing", "variance", "seed", "precision"),
        )
        names = ("name", *networks, "dataset", *drawn)
        return {name: getattr(self, name) for name in names}


def read_experiment(name: str) -> Experiment:
    """The experiment of a preset's name or a TOML file.

    Raises
    ------
    FileNotFoundError: if there is neither.
    ValueError: if the file is no TOML, or says something unknown or invalid.
    """
    preset = PRESETS / f"{name}.toml"
    path = preset if preset.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        raise FileNotFoundError(f"there is no experiment {name!r}: give one of {known}, or a TOML file")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        denoiser = str(raw.get("denoiser", ""))
        methods = tuple(_plan(method, plan, denoiser) for method, plan in raw.pop("methods", {}).items())
        if not methods:
            raise ValueError("it has no [methods.NAME], with NAME one of " + ", ".join(METHOD_OF))
        known_fields = {f.name for f in fields(Experiment)}
        if unknown := raw.keys() - known_fields:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(sorted(known_fields))})")
        return Experiment(methods=methods, **{key: _tuple(value) for key, value in raw.items()})
    except RecursionError as error:
        raise ValueError(f"{path}: it is nested too deeply") from error
    except FileNotFoundError as error:
        raise ValueError(f"{path}: {error}: make it by `dng calibrate`, or set calibrated to false") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _plan(name: str, raw: dict[str, Any], denoiser: str) -> MethodPlan:
    """The plan of ``[methods.NAME]``. ``calibrated = true`` fixes temperature and drift as they were measured."""
    if name not in METHOD_OF:
        raise ValueError(f"there is no method {name!r}: choose from {', '.join(METHOD_OF)}")
    known = {"scales", "search", "search_scales", "fixed", "calibrated"}
    if unknown := raw.keys() - known:
        raise ValueError(
            f"[methods.{name}] has unknown {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
        )
    if not isinstance(calibrated := raw.pop("calibrated", False), bool):
        raise ValueError(f"[methods.{name}] calibrated must be true or false, not {calibrated!r}")
    if calibrated:
        path = calibration_of(shipped_denoisers().get(denoiser, Path(denoiser)))
        found = load_calibration(path).calibration
        raw["fixed"] = {**raw.get("fixed", {}), "temperature": found.temperature, "drift": found.drift}
    search = {key: _tuple(value) for key, value in raw.get("search", {}).items()}
    return MethodPlan(METHOD_OF[name], **{k: _tuple(v) for k, v in raw.items() if k != "search"}, search=search)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
