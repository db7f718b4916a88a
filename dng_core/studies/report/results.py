"""The results of an experiment, read back from its folder."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...files import read_json
from ..class_removal import METHOD_NAMES, Drawn, Point
from ..metrics import Change, change_from_baseline
from ..runner import MANIFEST
from ..runs_cache import RunsCache
from ..selection import best, safe

MEASURES = (
    "forbidden_share", "kl", "kl_renormalised", "kl_unbiased", "frechet_without", "frechet_all", "precision", "recall",
    "fid_without", "fid_all",
)  # fmt: skip
MANIFEST_HAS = {"command", "machine", "versions", "note", "experiment", "class_names", "points", "measured_with"}
ENTRY_HAS = {"role", "class", "label", "key"}


@dataclass(frozen=True)
class Result:
    """A point as it counts for one removed class; ``change`` is against the unguided images of the same seeds."""

    role: str
    removed: str
    label: int
    point: Point
    measures: dict[str, Any]
    classes: tuple[int, ...]
    change: Change | None

    @property
    def method(self) -> str:
        return self.point.method

    @property
    def scale(self) -> float:
        """The guidance scale; 0 without guidance."""
        return self.point.settings.guidance_scale if self.point.settings else 0.0

    def value(self, measure: str) -> float | None:
        """A measure's value; None where it was not taken."""
        found: float | None = self.measures.get(measure, {}).get("value")
        return found

    def interval(self, measure: str) -> tuple[float | None, float | None]:
        """A measure's 95 % interval."""
        found = self.measures.get(measure, {})
        return found.get("low"), found.get("high")


@dataclass(frozen=True)
class Results:
    """Everything that an experiment's folder holds of its last run."""

    folder: Path
    manifest: dict[str, Any]
    results: tuple[Result, ...]
    missing: int

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.manifest["class_names"])

    @property
    def target(self) -> float:
        """The forbidden share that counts as safe."""
        target: float = self.manifest["experiment"]["target_share"]
        return target

    @property
    def removed(self) -> list[str]:
        """The classes removed, in their order."""
        return list(dict.fromkeys(result.removed for result in self.results))

    def of(self, removed: str, *roles: str) -> list[Result]:
        """The results of one class in some roles: "baseline", "search", "sweep"."""
        return [r for r in self.results if r.removed == removed and r.role in roles]

    def best(self, removed: str, quality: str = "kl_renormalised") -> dict[str, Result]:
        """Method -> its best result at full size: the least ``quality`` among the safe, else the safest."""
        by_method: dict[str, list[Result]] = {}
        for result in self.of(removed, "sweep"):
            by_method.setdefault(result.method, []).append(result)
        return {
            method: best([(r, r.measures) for r in by_method[method]], self.target, quality)
            for method in METHOD_NAMES.values()
            if method in by_method
        }

    def is_safe(self, result: Result) -> bool:
        return safe(result.measures, self.target)

    def drawn(self, result: Result) -> Drawn:
        """The images and traces of a result."""
        return RunsCache(self.folder).load(result.point)


def read_results(folder: Path) -> Results:
    """Read an experiment's folder.

    Raises
    ------
    FileNotFoundError: if there is no experiment.
    ValueError: if its manifest is damaged, or nothing of it is done.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no {MANIFEST} in {folder}: name the --output folder of `dng experiment`")
    try:
        manifest = read_json(path)
        entries, measured_with = manifest["points"], manifest["measured_with"]
        if lacking := MANIFEST_HAS - manifest.keys() or {n for e in entries for n in ENTRY_HAS - e.keys()}:
            raise ValueError(f"it lacks {', '.join(sorted(lacking))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): give the experiment's command again") from error
    cache = RunsCache(folder)
    records = {key: cache.record(key, measured_with) for key in {entry["key"] for entry in entries}}
    done = [entry for entry in entries if _is_measured(records[entry["key"]], entry["class"])]
    if not done:
        raise ValueError(f"nothing of the experiment in {folder} is done yet: give its command again")

    baselines = {e["class"]: records[e["key"]] for e in done if e["role"] == "baseline"}
    results = []
    for entry in done:
        record = records[entry["key"]]
        assert record is not None
        point = Point.from_dict(record["point"])
        change = None
        baseline = baselines.get(entry["class"])
        if entry["role"] == "sweep" and baseline is not None:
            change = _change(cache, record, baseline, entry["label"])
        results.append(
            Result(
                entry["role"],
                entry["class"],
                entry["label"],
                point,
                record["measures"]["by_class"][entry["class"]],
                tuple(record["measures"]["classes"]),
                change,
            )
        )
    return Results(folder, manifest, tuple(results), len(entries) - len(done))


def table(results: Iterable[Result]) -> list[dict[str, Any]]:
    """One flat row per result: settings, measures with their intervals, and the share of each class."""
    rows = []
    for r in results:
        settings = vars(r.point.settings) if r.point.settings else {}
        row: dict[str, Any] = {"removed": r.removed, "method": r.method, "role": r.role, "scale": r.scale}
        row |= {"images": r.point.images, "steps": r.point.steps, "seed": r.point.seed, "key": r.point.key()}
        for name in MEASURES:
            if name in r.measures:
                row |= {name: r.value(name), f"{name}_low": r.interval(name)[0], f"{name}_high": r.interval(name)[1]}
        if r.change is not None and r.change.images:
            row |= {"class_kept": r.change.kept, "rms_change": r.change.rms}
        row |= {f"n_{name}": count for name, count in r.measures["histogram"].items()}
        rows.append(
            row | {name: value for name, value in settings.items() if name not in ("method", "guidance_scale")}
        )
    return rows


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; a column that a row does not have is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _is_measured(record: dict[str, Any] | None, name: str) -> bool:
    """Whether a point is there, and measured for the class removed (the unguided one is shared by all of them)."""
    return record is not None and name in record["measures"]["by_class"]


def _change(cache: RunsCache, record: dict[str, Any], baseline: dict[str, Any], label: int) -> Change | None:
    guided, unguided = (Point.from_dict(r["point"]) for r in (record, baseline))
    pictures = [torch.from_numpy(cache.load(p).images).float() / 127.5 - 1 for p in (guided, unguided)]
    if pictures[0].shape != pictures[1].shape:
        return None
    kinds = [torch.tensor(r["measures"]["classes"]) for r in (record, baseline)]
    return change_from_baseline(pictures[0], kinds[0], pictures[1], kinds[1], label)
