"""Runs an experiment: the search, then the sweep, each point from the cache where it is there."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from .class_removal import METHOD_NAMES, Point, draw, keep_traces, weights_digest
from .experiment import Experiment
from .measuring import Measurer
from .runs_cache import RunsCache, write_json
from .selection import best
from .sweep import Workers, draw_all

MANIFEST = "experiment.json"


@dataclass(frozen=True)
class Entry:
    """A point's part in an experiment: ``role`` is "baseline", "search" or "sweep"; ``name`` the class removed."""

    role: str
    name: str
    label: int
    point: Point

    def to_dict(self) -> dict[str, Any]:
        return {"role": self.role, "class": self.name, "label": self.label, "key": self.point.key()}


@dataclass
class Runner:
    """Runs an experiment in a folder.

    Parameters
    ----------
    about: what the manifest says beside the points (command, versions, notes on the data).
    """

    experiment: Experiment
    measurer: Measurer
    folder: Path
    workers: Workers
    about: Mapping[str, Any]
    settings_of: Mapping[tuple[str, str], Any] = field(default_factory=dict)
    out: TextIO = field(default_factory=lambda: sys.stderr)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cache = RunsCache(self.folder)
        self.class_names = self.measurer.info.class_names
        self.labels = self.experiment.labels(self.class_names)
        sources = self.experiment.class_only
        self.weights = {"": weights_digest(self.experiment.denoiser)}
        self.weights |= {self.class_names[k]: weights_digest(self.experiment.denoiser, sources[self.class_names[k]])
                         for k in self.labels if sources}  # fmt: skip

    def run(self) -> int:
        """Draw and measure what is not there yet; the number of points that failed.

        Raises
        ------
        OSError: if the folder cannot be written (a full disk). What was done stays.
        """
        baselines = [self._entry("baseline", label, None) for label in self.labels]
        searched = [
            self._entry("search", label, settings)
            for label in self.labels
            for plan in self.experiment.methods
            for settings in plan.candidates()
            if (self.class_names[label], METHOD_NAMES[plan.method]) not in self.settings_of
        ]
        self._write_manifest([*baselines, *searched])
        done = self._complete([*baselines, *searched])
        swept = self._sweep_entries(done)
        entries = [*baselines, *searched, *swept]
        self._write_manifest(entries)
        self._complete(swept)
        return len(self.errors)

    def estimate(self) -> str:
        """What a run would cost, by one timed batch: an order of magnitude."""
        entries = [self._entry("baseline", label, None) for label in self.labels]
        plans = self.experiment.methods
        entries += [self._entry("search", n, s) for n in self.labels for plan in plans for s in plan.candidates()]
        entries += [self._entry("sweep", n, s) for n in self.labels for plan in plans for s in plan.sweep({})]
        waiting = {e.point.key(): e.point for e in entries if not self.cache.has(e.point)}
        evaluations = sum(point.evaluations for point in waiting.values())
        if not waiting:
            return "every point is in the cache (as far as the search's outcome can be known)"
        guided = next((p for p in waiting.values() if p.settings), next(iter(waiting.values())))
        trial = Point.from_dict(guided.to_dict() | {"images": guided.batch, "steps": 2})
        device = self.workers.devices()[0]
        draw(trial, device)
        began = time.monotonic()
        draw(trial, device)
        seconds = evaluations * (time.monotonic() - began) / trial.evaluations
        return (
            f"{len(waiting)} points, {evaluations:,} network evaluations of single images: about {_duration(seconds)} "
            f"one after the other on {device} ({torch.get_num_threads()} threads)"
        )

    def _sweep_entries(self, done: Mapping[str, dict[str, Any]]) -> list[Entry]:
        entries = []
        for label in self.labels:
            name = self.class_names[label]
            for plan in self.experiment.methods:
                given = self.settings_of.get((name, METHOD_NAMES[plan.method]))
                if given is not None:
                    entries.append(self._entry("sweep", label, given))
                    continue
                tried = [(s, self._entry("search", label, s).point.key()) for s in plan.candidates()]
                measured = [(s, done[key]["by_class"][name]) for s, key in tried if key in done]
                found = plan.searched(best(measured, self.experiment.target_share)) if measured else {}
                entries += [self._entry("sweep", label, settings) for settings in plan.sweep(found)]
        return entries

    def _entry(self, role: str, label: int, settings: Any) -> Entry:
        images = self.experiment.search_images if role == "search" else self.experiment.images
        name = self.class_names[label]
        return Entry(role, name, label, self.experiment.point(self.weights, label, name, settings, images))

    def _complete(self, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
        """Draw and measure what is missing; key -> measures by class."""
        wanted: dict[str, tuple[Point, set[int]]] = {}
        for entry in entries:
            wanted.setdefault(entry.point.key(), (entry.point, set()))[1].add(entry.label)
        result, missing = {}, []
        for key, (point, labels) in wanted.items():
            known = self.cache.measures(point, self.measurer.measured_with)
            if (
                known is not None
                and self.cache.has(point)
                and {self.class_names[k] for k in labels} <= known["by_class"].keys()
            ):
                result[key] = known
            elif self.cache.has(point):
                result[key] = self._measure(point, labels)
            else:
                missing.append(point)
        total = sum(point.evaluations for point in missing)
        if len(missing) < len(wanted):
            print(f"{len(wanted) - len(missing)} of {len(wanted)} points are there already", file=self.out)
        with tqdm(total=total, unit="eval", unit_scale=True, desc="drawing", file=self.out, disable=not total) as bar:
            for point, drawn in draw_all(missing, self.workers):
                if isinstance(drawn, Exception):
                    self.errors.append(f"{point.method} on {self._name(point)}: {drawn}")
                    tqdm.write(self.errors[-1], file=self.out)
                else:
                    forbidden = self.measurer.classes(drawn.images).numpy() == point.forbidden
                    self.cache.store(point, keep_traces(drawn, forbidden))
                    result[point.key()] = self._measure(point, wanted[point.key()][1])
                bar.set_postfix_str(f"{point.method} on {self._name(point)}", refresh=False)
                bar.update(point.evaluations)
        return result

    def _measure(self, point: Point, labels: set[int]) -> dict[str, Any]:
        measures = self.measurer.measure(self.cache.load(point).images, sorted(labels))
        if known := self.cache.measures(point, self.measurer.measured_with):
            measures["by_class"] = known["by_class"] | measures["by_class"]
        self.cache.store_measures(point, self.measurer.measured_with, measures)
        return measures

    def _name(self, point: Point) -> str:
        return "all classes" if point.forbidden is None else self.class_names[point.forbidden]

    def _write_manifest(self, entries: Sequence[Entry]) -> None:
        content = {
            **self.about,
            "experiment": self.experiment.to_dict(),
            "class_names": list(self.class_names),
            "measured_with": self.measurer.measured_with,
            "points": [entry.to_dict() for entry in entries],
        }
        write_json(self.folder / MANIFEST, content)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
