"""Runs an experiment: the search, then the sweep. Points that the cache holds are not drawn again."""

import itertools
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from ..files import write_json
from .class_removal import METHOD_NAMES, Point, draw, keep_traces, weights_digest
from .experiment import Experiment, MethodPlan
from .measuring import Measurer
from .runs_cache import RunsCache
from .selection import best, mean_measures, next_scale, safe
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
    settings_of: (class, method) -> settings chosen elsewhere, which are used instead of a search and a sweep.
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
        """Draw and measure what is not there yet; returns the number of points that failed.

        Raises
        ------
        OSError: if the folder cannot be written (a full disk). What was done stays.
        """
        entries = [*self._baselines(), *self._searched()]
        self._write_manifest(entries)
        done = self._complete(entries)
        found = {(k, p.method): self._found(k, p, done) for k in self.labels for p in self.experiment.methods}
        while True:
            following = [e for k in self.labels for p in self.experiment.methods
                         for e in self._following(k, p, found[k, p.method], entries, done)]  # fmt: skip
            wanted = [entry for entry in following if entry not in entries]  # what failed is not tried again
            if not wanted:
                return len(self.errors)
            entries += wanted
            self._write_manifest(entries)
            done |= self._complete(wanted)

    def estimate(self) -> str:
        """How long a run would take, from one timed batch: good for an order of magnitude."""
        entries = [*self._baselines(), *self._searched()]
        for label, plan in itertools.product(self.labels, self.experiment.methods):
            swept = plan.sweep({})
            if (self.class_names[label], METHOD_NAMES[plan.method]) in self.settings_of:
                swept = swept[:1]
            elif self.experiment.adaptive:
                halvings = math.ceil(math.log2(len(swept)))
                entries += [self._entry("search", label, settings) for settings in swept[:halvings]]
                swept = swept[:1]
            entries += [self._entry("sweep", label, settings) for settings in swept]
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
        rest = "; more where a first full point is not safe" if self.experiment.adaptive else ""
        return (
            f"{len(waiting)} points, {evaluations:,} network evaluations of single images: about {_duration(seconds)} "
            f"one after the other on {device} ({torch.get_num_threads()} threads){rest}"
        )

    def _baselines(self) -> list[Entry]:
        return [self._entry("baseline", label, None) for label in self.labels]

    def _searched(self) -> list[Entry]:
        """The search for settings, of methods and classes whose settings are not given."""
        return list(
            dict.fromkeys(
                self._entry("search", searched, settings)
                for label in self.labels
                for plan in self.experiment.methods
                if (self.class_names[label], METHOD_NAMES[plan.method]) not in self.settings_of
                for searched in self._searched_for(label)
                for settings in plan.candidates()
            )
        )

    def _searched_for(self, label: int) -> list[int]:
        """The classes whose search decides the settings of a class."""
        return [self.class_names.index(name) for name in self.experiment.search_classes] or [label]

    def _found(self, label: int, plan: MethodPlan, done: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The best settings of the search."""
        measured = []
        for settings in plan.candidates():
            tried = [self._entry("search", k, settings) for k in self._searched_for(label)]
            if all(entry.point.key() in done for entry in tried):
                measures = mean_measures([done[e.point.key()]["by_class"][e.name] for e in tried])
                measured.append((settings, measures))
        return plan.searched(best(measured, self.experiment.target_share)) if measured else {}

    def _following(
        self,
        label: int,
        plan: MethodPlan,
        found: Mapping[str, Any],
        entries: Sequence[Entry],
        done: Mapping[str, dict[str, Any]],
    ) -> list[Entry]:
        """What is to be drawn of a method's sweep, after ``entries``: all of it, or the next scale alone."""
        given = self.settings_of.get((self.class_names[label], METHOD_NAMES[plan.method]))
        if given is not None:
            return [self._entry("sweep", label, given)]
        swept = {settings.guidance_scale: settings for settings in plan.sweep(found)}
        if not self.experiment.adaptive:
            return [self._entry("sweep", label, settings) for settings in swept.values()]
        safe_at: dict[str, dict[float, bool]] = {"search": {}, "sweep": {}}
        for (role, known), (scale, settings) in itertools.product(safe_at.items(), swept.items()):
            entry = self._entry(role, label, settings)
            if entry in entries and entry.point.key() in done:
                measures = done[entry.point.key()]["by_class"][entry.name]
                known[scale] = safe(measures, self.experiment.target_share)
        following = next_scale(list(swept), safe_at["search"], safe_at["sweep"])
        return [] if following is None else [self._entry(following[0], label, swept[following[1]])]

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
        waiting = [batch for point in missing for batch in self.cache.missing(point)]
        total = sum(batch.evaluations for batch in waiting)
        if len(missing) < len(wanted):
            print(f"{len(wanted) - len(missing)} of {len(wanted)} points are there already", file=self.out)
        with tqdm(total=total, unit="eval", unit_scale=True, desc="drawing", file=self.out, disable=not total) as bar:
            for batch, drawn in draw_all(waiting, self.workers):
                point = batch.point
                if isinstance(drawn, Exception):
                    self.errors.append(f"{point.method} on {self._name(point)}: {drawn}")
                    tqdm.write(self.errors[-1], file=self.out)
                elif whole := self.cache.add(batch, drawn):
                    forbidden = self.measurer.classes(whole.images).numpy() == point.forbidden
                    self.cache.store(point, keep_traces(whole, forbidden))
                    result[point.key()] = self._measure(point, wanted[point.key()][1])
                bar.set_postfix_str(f"{point.method} on {self._name(point)}", refresh=False)
                bar.update(batch.evaluations)
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
