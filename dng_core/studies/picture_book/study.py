"""The study: every case by every method, measured; what was measured is kept, so that a stopped run goes on."""

import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...files import write_json, write_whole
from ...guidance import Trace
from ...methods import MethodSettings
from ...models.predictors import Precision
from ...schedules import ddpm_sigmas
from ..class_removal import starting_noise
from ..samplers import Sampler, sample
from .cases import CASES, Case
from .measures import Seen, measure
from .methods import METHODS, Method, OfPrompts, calibrated, guided
from .opened import open_book
from .sampling import LATENT, pictures_of

LEAST_SHOWN = 0.25  # the scale is chosen on related cases in which so many pictures show the thing without guidance,
MOST_SHOWN = 0.95  # and in which not all do: what the prompt makes certain no method removes
MOST_LEFT = 0.02  # "equal removal": the mean over these cases, at most
CALIBRATION_IMAGES = 64  # of the method "dng_calibrated"; like the rest, a choice
KEPT = 4096  # pictures without guidance that stay in memory, since they serve every method: 50 KB each
STRIP = 8  # pictures of a point that are kept in its folder, side by side, with their traces
RESULTS, ROWS = "results.json", "rows"  # in the study's folder
VERSION = 4  # part of every key: raise it with each change of what a row holds
OTHER_SEED, SEARCH_SEED, CALIBRATION_SEED = 1000, 2000, 3000  # added to the seed of the plan
Drawn = tuple[Seen, dict[str, Any], dict[str, np.ndarray] | None]
"""Pictures as the judge sees them, and what they cost. And of the first STRIP pictures, where something is tracked:
"posterior" and "scale" of the first thing, (steps, pictures), at "sigmas", (steps,)."""


@dataclass(frozen=True)
class Point:
    """One case by one method at one setting."""

    case: Case
    method: str
    scale: float
    cfg: float
    sampler: Sampler
    steps: int
    images: int
    seed: int

    def unguided(self, **changes: Any) -> "Point":
        """The same without guidance, from which changes are counted."""
        return replace(self, method="nothing", scale=0.0, **changes)


@dataclass(frozen=True)
class Plan:
    """What is drawn. The scale of each method is chosen with ``search_images`` of another seed, at the first setting.

    Parameters
    ----------
    settings: (cfg, sampler, steps) in turn; the first is the main one, the others show what depends on it.
    scales: among which each method's is chosen. A single one is taken as it is, without a search.
    own_scales: choose the scale of every related case by this case alone.
    sweep: draw every scale with all images too, at the first setting.
    precision: in which the model computes.
    """

    cases: tuple[Case, ...] = CASES
    methods: tuple[str, ...] = tuple(METHODS)
    settings: tuple[tuple[float, Sampler, int], ...] = ((3.0, "euler_ancestral", 30),)
    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    own_scales: bool = False
    sweep: bool = False
    images: int = 256
    search_images: int = 32
    seed: int = 0
    batch: int = 64
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"unknown methods {', '.join(unknown)}: choose from {', '.join(METHODS)}")
        if not self.cases or not self.methods or not self.scales:
            raise ValueError("a study needs at least one case, one method and one scale")
        if wrong := [scale for scale in self.scales if not 0 <= scale < math.inf]:
            raise ValueError(f"a scale must be at least 0 and finite, not {wrong[0]:g}")
        if len(set(self.scales)) > 1 and not any(case.kind == "related" for case in self.cases):
            raise ValueError("scales are chosen on related cases, and there are none: give a single scale")
        for name, least in (("images", 4), ("search_images", 4), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for cfg, _, steps in self.settings:
            if not 3 <= steps <= 1000 or not 0 <= cfg < math.inf:
                raise ValueError(f"a setting needs 3 to 1000 steps and a finite cfg from 0, not {steps} and {cfg:g}")


class Study:
    """Draws and measures points. Their rows, and strips of their first pictures, are kept in ``folder``.

    ``weights``: of another picture book than the shipped one. Its calibration is the file beside them, if any.
    """

    def __init__(self, plan: Plan, folder: Path, weights: Path | None = None) -> None:
        self.plan, self.folder = plan, folder
        self._named = "shipped" if weights is None else str(weights)
        opened = open_book(weights, plan.precision)
        self.book, self.chain, self.judge = opened.book, opened.chain, opened.judge
        self.calibration, self._digests = opened.calibration, opened.digests
        self._unguided: dict[Point, Drawn] = {}
        self._calibrated: dict[Point, Method] = {}
        (folder / ROWS).mkdir(parents=True, exist_ok=True)

    def run(self, tell: Callable[[str], None], about: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Choose every method's scale, measure every case at every setting, and return the rows.

        ``about``: what else results.json should say, as JSON.
        """
        scales = self.chosen_scales(tell)
        own = self.own_scales() if self.plan.own_scales else None
        points, rows = self.points(scales, own or {}), []
        for number, point in enumerate(points, start=1):
            rows.append(self.row(point))
            tell(f"[{number}/{len(points)}] {said(rows[-1])}")
        plan = {name: getattr(self.plan, name) for name in ("scales", "sweep", "images", "search_images")}
        told = plan | self.identity() | (about or {})
        write_json(self.folder / RESULTS, {"about": told, "scales": scales, "own_scales": own, "rows": rows})
        return rows

    def identity(self) -> dict[str, Any]:
        """What makes it another study, whose rows do not belong into the same report: network, steps and noise."""
        plan = self.plan
        return {"weights": self._named, "steps": plan.settings[0][2], "seed": plan.seed, "precision": plan.precision}

    def points(self, scales: dict[str, float], own: dict[str, dict[str, float]]) -> list[Point]:
        """The points to measure: every case by every method at its scale and at every setting, and the sweep's.

        ``own``: the scales of a method by the names of cases, where they are others than ``scales``.
        """
        plan, points = self.plan, []
        for i, (cfg, sampler, steps) in enumerate(plan.settings):
            for case in plan.cases:
                for method in plan.methods:
                    swept = plan.scales if plan.sweep and i == 0 and METHODS[method].settings else ()
                    chosen = own.get(method, {}).get(case.name, scales[method])
                    for scale in sorted({chosen, *swept}):
                        points.append(Point(case, method, scale, cfg, sampler, steps, plan.images, plan.seed))
        return points

    def chosen_scales(self, tell: Callable[[str], None]) -> dict[str, float]:
        """The smallest scale of each method that leaves at most 2 % of the thing; else the one that leaves least.

        It is one scale for all cases, since a user does not know the case: the mean over the related cases counts.
        """
        scales, guided_by = self.plan.scales, self._methods_with_scales()
        chosen = {method: smallest(scales, partial(self._left_in_mean, method, tell)) for method in guided_by}
        return {method: chosen.get(method, 0.0) for method in self.plan.methods}

    def own_scales(self) -> dict[str, dict[str, float]]:
        """Of each method with a scale, and of each related case by its name, the scale that this case needs."""
        return {
            method: {
                case.name: smallest(self.plan.scales, partial(self._left, method, case)) for case in self.related()
            }
            for method in self._methods_with_scales()
        }

    def _methods_with_scales(self) -> list[str]:
        return [method for method in self.plan.methods if METHODS[method].settings is not None]

    def _left(self, method: str, case: Case, scale: float) -> float:
        return float(self.searched(case, method, scale)["left"])

    def _left_in_mean(self, method: str, tell: Callable[[str], None], scale: float) -> float:
        rows = [self.searched(case, method, scale) for case in self.related()]
        counted = [row["left"] for row in rows if LEAST_SHOWN <= row["was"] <= MOST_SHOWN]
        left = mean(counted or [row["left"] for row in rows])
        tell(f"search: {method} at {scale:g} leaves {100 * left:.1f} %")
        return left

    def related(self) -> list[Case]:
        """The related cases of the plan."""
        return [case for case in self.plan.cases if case.kind == "related"]

    def searched(self, case: Case, method: str, scale: float) -> dict[str, Any]:
        """The row of the search for a scale."""
        (cfg, sampler, steps), plan = self.plan.settings[0], self.plan
        seed = plan.seed + SEARCH_SEED
        return self.row(Point(case, method, scale, cfg, sampler, steps, plan.search_images, seed))

    def row(self, point: Point) -> dict[str, Any]:
        """A point and its measures, from the folder if it was measured before."""
        path = self.folder / ROWS / f"{self._key(point)}.json"
        if path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        without, *_ = self.seen(point.unguided())
        other, *_ = self.seen(point.unguided(seed=point.seed + OTHER_SEED))
        seen, costs, traced = self.seen(point)
        write_whole(path.with_suffix(".png"), strip(seen.pictures[:STRIP]))
        if traced is not None:
            shows = [s.shows_any(point.case.avoid)[:STRIP].numpy() for s in (seen, without)]
            write_whole(path.with_suffix(".npz"), packed(traced | {"shown": shows[0], "was": shows[1]}))
        row = asdict(point) | {"key": path.stem, "case": point.case.name, "kind": point.case.kind}
        row["prompt"] = point.case.prompt
        row |= measure(point.case, seen, without, other) | costs
        write_json(path, row)
        return row

    def seen(self, point: Point) -> Drawn:
        """A point's pictures as the judge sees them, what they cost, and the traces of the first."""
        if point.method != "nothing":
            return self._drawn(point)
        if point not in self._unguided:
            while self._unguided and sum(kept.images for kept in self._unguided) + point.images > KEPT:
                self._unguided.pop(next(iter(self._unguided)))
            self._unguided[point] = self._drawn(point)
        return self._unguided[point]

    def _drawn(self, point: Point) -> Drawn:
        method = METHODS[point.method].at(point.scale)
        if method.calibrated:
            method = self._calibrated_for(point).at(point.scale)
        levels, began = ddpm_sigmas(self.chain, point.steps), time.monotonic()
        parts: list[Tensor] = []
        traces: list[Trace] = []
        evaluations = 0
        name = f"{point.case.name}; {point.method}"
        with tqdm(total=point.images, unit="picture", desc=name, leave=False) as bar:
            for start in range(0, point.images, self.plan.batch):
                count = min(self.plan.batch, point.images - start)
                noise, generator = starting_noise(start, count, point.seed, LATENT)
                run = guided(self.book, self.chain, point.case, method, point.cfg, levels, point.sampler)
                parts.append(pictures_of(sample(run, noise, levels, point.sampler, generator)))
                if not bool(parts[-1].isfinite().all()):
                    raise ValueError(f"{name} at scale {point.scale:g}: pictures are not finite: check the weights")
                evaluations += count * run.evaluations
                if (trace := run.trace()) is not None:
                    traces.append(trace)
                bar.update(count)
        scales = torch.cat([trace.scale for trace in traces], dim=2) if traces else None
        costs = {
            "late_scale": None if scales is None else float(scales[point.steps // 2 :].mean()),
            "settings": described(method.settings),
            "evaluations": evaluations / point.images,
            "seconds": (time.monotonic() - began) / point.images,
        }
        traced = None
        if scales is not None:
            posterior = torch.cat([trace.posterior for trace in traces], dim=2)
            first = {"posterior": posterior[:, 0, :STRIP], "scale": scales[:, 0, :STRIP], "sigmas": traces[0].sigmas}
            traced = {key: values.numpy() for key, values in first.items()}
        return Seen.by(self.judge, torch.cat(parts)), costs, traced

    def _calibrated_for(self, point: Point) -> Method:
        """The calibrated method of a point, at no scale: what is measured is the same at all scales."""
        at_none = replace(point, scale=0.0)
        if at_none not in self._calibrated:
            images, seed = min(CALIBRATION_IMAGES, point.images), point.seed + CALIBRATION_SEED
            told = (point.case, METHODS[point.method].at(0.0), point.cfg, point.steps, images, seed)
            self._calibrated[at_none] = calibrated(self.book, self.chain, *told, self.calibration, point.sampler)
        return self._calibrated[at_none]

    def _key(self, point: Point) -> str:
        how = [self._digests, self.plan.precision]
        told = json.dumps([VERSION, asdict(point), asdict(METHODS[point.method]), *how], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:24]


def smallest(scales: Sequence[float], left: Callable[[float], float]) -> float:
    """The smallest scale that leaves at most 2 %, or else the smallest of those that leave least.

    A single scale is taken as it is. ``left`` is not asked beyond the first scale that leaves so little.
    """
    if len(set(scales)) == 1:
        return scales[0]
    found: dict[float, float] = {}
    for scale in sorted(set(scales)):
        found[scale] = left(scale)
        if found[scale] <= MOST_LEFT:
            return scale
    return min(found, key=lambda scale: found[scale])


def packed(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as an NPZ file."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def strip(pictures: Tensor) -> bytes:
    """Pictures, (n, 3, 64, 64) in -1 .. 1, side by side as a PNG file."""
    row = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(2, 0, 3, 1).flatten(1, 2)
    file = io.BytesIO()
    Image.fromarray(row.contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


def described(settings: MethodSettings | OfPrompts | None) -> dict[str, Any] | None:
    """The settings as JSON."""
    return None if settings is None else dict(json.loads(json.dumps(asdict(settings))))  # lists, as in a file


def said(row: dict[str, Any]) -> str:
    """A row in one line."""
    rms = "" if row["rms"] is None else f", change of the others {row['rms']:.4f}"
    return f"{row['case']}; {row['method']}: {100 * row['left']:.1f} % left of {100 * row['was']:.1f}{rms}"
