"""``dng experiment``: removes classes by every method, measures what is left, and reports."""

import argparse
import errno
import importlib.util
import itertools
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from .. import __version__
from ..files import read_json
from ..headless.lock import exclusive
from ..methods import MethodSettings
from ..models.datasets import Dataset, load_dataset
from ..models.devices import machine
from ..models.predictors import Precision
from ..models.weight_files import open_classifier
from ..studies.class_removal import METHOD_NAMES, network
from ..studies.experiment import METHOD_OF, Experiment, read_experiment
from ..studies.features import require_inception
from ..studies.measuring import Measurer, check_denoiser
from ..studies.picture_book.cases import CASES, KINDS
from ..studies.picture_book.methods import METHODS as BOOK_METHODS
from ..studies.picture_book.report import write_report
from ..studies.picture_book.study import RESULTS, ROWS, Plan, Study
from ..studies.report.pages import write_reports
from ..studies.report.results import read_results
from ..studies.runner import MANIFEST, Runner
from ..studies.samplers import SAMPLERS
from ..studies.sweep import ENGINES, Workers

LOCK = ".lock"  # the file in an experiment's folder that a process which works there holds
PICTURE_BOOK = "picture_book"
BOOK_OPTIONS = ("weights", "cfg", "samplers", "kinds", "scales", "own_scales", "sweep")
TunedSettings = dict[tuple[str, str], MethodSettings | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dng experiment``."""
    parser.description = (
        "Remove classes by no guidance, negative prompting, Safe Latent Diffusion, Contrastive CFG and DNG; measure "
        "safety, balance and quality. Points that are in the output folder already are not drawn again, so a stopped "
        "run goes on. The experiment picture_book compares ways to avoid a thing in a text-to-image model."
    )
    parser.add_argument(
        "experiment",
        help="mnist, mnist_calibrated, cifar10, cifar10_calibrated, cifar10_conditional, tiny, a TOML file (see "
        "docs/experiments.md), or picture_book",
    )
    parser.add_argument("--data", type=Path, help="folder of the data set that distances are measured to")
    parser.add_argument("--download", action="store_true", help="fetch MNIST or CIFAR-10 into --data")
    parser.add_argument("--output", type=Path, help="folder of the runs and the report (default: output/NAME)")
    parser.add_argument("--classes", help="classes to remove, separated by commas (default: the experiment's)")
    parser.add_argument(
        "--methods",
        help=f"some of {','.join(METHOD_OF)} (default: the experiment's); picture_book: of {','.join(BOOK_METHODS)}",
    )
    for name, text in (
        ("images", "images per point"),
        ("search-images", "images per point of the search for settings"),
        ("steps", "sampling steps, 1 .. 1000"),
        ("batch", "images drawn at once"),
        ("undesired-every", "predict the undesired class only once in so many steps, which is faster"),
        ("seed", "seed of the noise"),
    ):
        parser.add_argument(f"--{name}", type=int, help=f"{text} (default: the experiment's)")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="in which the networks compute; bfloat16 takes half as long on a processor with AMX (default: the "
        "experiment's, float32)",
    )
    parser.add_argument(
        "--settings-of",
        type=Path,
        metavar="FOLDER",
        help="take each method's best settings from this experiment's folder (it may have another number of steps)",
    )
    parser.add_argument(
        "--adaptive", action="store_true", help="draw all images only at the smallest scales that are safe"
    )
    parser.add_argument("--search-classes", help="search for settings on these classes alone, separated by commas")
    parser.add_argument(
        "--jobs", type=int, default=0, help="batches drawn side by side (default: 0, one per GPU or two cores)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="local processes, or Ray (default: local)")
    parser.add_argument("--ray-address", help="address of a running Ray cluster (default: start one here)")
    parser.add_argument("--fid", action="store_true", help="measure FID too, by torch-fidelity")
    parser.add_argument("--estimate", action="store_true", help="only say how long it would take")
    parser.add_argument("--weights", type=Path, help="picture_book: of its model (default: the shipped ones)")
    parser.add_argument("--cfg", type=float, nargs="+", help="picture_book: scales of the prompt (default: 3)")
    parser.add_argument(
        "--samplers", nargs="+", choices=SAMPLERS, help="picture_book: samplers (default: euler_ancestral)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="picture_book: kinds of cases (default: all)")
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        help="picture_book: guidance scales to choose among; a single one is taken as it is (default: "
        f"{' '.join(f'{scale:g}' for scale in Plan.scales)})",
    )
    parser.add_argument(
        "--own-scales", action="store_true", help="picture_book: choose the scale of each related case by itself"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="picture_book: draw every scale with all images, for the Pareto plots"
    )
    parser.set_defaults(defaults={action.dest: action.default for action in parser._actions})


def run(args: argparse.Namespace) -> int:
    """Run the experiment and write its report; returns 1 if anything failed. What was done is kept."""
    try:
        work = prepare_picture_book(args) if args.experiment == PICTURE_BOOK else prepare(args)
        if args.estimate and isinstance(work, Runner):
            print(work.estimate())
            return 0
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"dng experiment: {error}", file=sys.stderr)
        return 1
    try:
        with exclusive(work.folder / LOCK, wait=False):
            if isinstance(work, Runner):
                failed = work.run()
                if failed:
                    print(f"dng experiment: {failed} points failed:", *work.errors, sep="\n  ", file=sys.stderr)
                paths = write_reports(work.folder)
            else:
                failed = 0
                work.run(partial(print, flush=True), provenance())
                paths = write_report(work.folder)
            print(*paths, sep="\n")
    except BlockingIOError:
        print(
            f"dng experiment: another process works in {work.folder}: wait for its end, or name another --output",
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        remedy = "free some space and " * (error.errno == errno.ENOSPC) + "give the same command again"
        print(f"dng experiment: {error}; what was computed is kept: {remedy}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"dng experiment: {error}", file=sys.stderr)
        return 1
    return 1 if failed else 0


def refuse(args: argparse.Namespace, options: Iterable[str]) -> None:
    """Raise ValueError for an option that this experiment does not have."""
    for name in options:
        if getattr(args, name) != args.defaults[name]:
            raise ValueError(f"--{name.replace('_', '-')}: the experiment {args.experiment} has no such option")


def prepare_picture_book(args: argparse.Namespace) -> Study:
    """The study on the picture book that the command line asks for."""
    changeable = ("images", "search_images", "batch", "seed", "precision")
    ours = {*changeable, *BOOK_OPTIONS, "steps", "methods", "output", "experiment", "help"}
    refuse(args, args.defaults.keys() - ours)
    for name in ("matplotlib", "scipy"):
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"the study needs {name}: pip install {name}")
    changes: dict[str, Any] = {name: getattr(args, name) for name in changeable if getattr(args, name) is not None}
    if args.methods is not None:
        changes["methods"] = tuple(dict.fromkeys(args.methods.split(",")))
    if args.kinds is not None:
        changes["cases"] = tuple(case for case in CASES if case.kind in args.kinds)
    if args.scales is not None:
        changes["scales"] = tuple(args.scales)
    pairs = itertools.product(args.cfg or [3.0], args.samplers or [SAMPLERS[0]])
    steps = 30 if args.steps is None else args.steps
    plan = Plan(
        settings=tuple((cfg, sampler, steps) for cfg, sampler in pairs),
        sweep=args.sweep,
        own_scales=args.own_scales,
        **changes,
    )
    folder = args.output or Path("output", PICTURE_BOOK)
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds an experiment of class removal, not {PICTURE_BOOK}: name another --output")
    study = Study(plan, folder, args.weights)
    require_same(folder / RESULTS, "about", study.identity())
    return study


def provenance() -> dict[str, Any]:
    """By which command, versions and machine results are made."""
    return {
        "command": shlex.join(["dng", *sys.argv[1:]]),
        "versions": {"dng": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
    }


def prepare(args: argparse.Namespace) -> Runner:
    """Read everything that the experiment needs, so that errors are reported before anything is drawn."""
    refuse(args, BOOK_OPTIONS)
    experiment = changed(read_experiment(args.experiment), args)
    classifier, info = open_classifier(experiment.classifier)
    workers = Workers(args.engine, args.jobs, args.device, args.ray_address)
    classifier = classifier.to(workers.devices()[0])
    denoiser, drawn = network(experiment.denoiser, "cpu")
    classes = (drawn.class_names or None) if not experiment.class_only else None
    check_denoiser(experiment.denoiser, denoiser, classes, info)
    folder = args.output or Path("output", experiment.name)
    if not args.estimate:
        require_own(folder, experiment)
    real: Dataset | None = None
    note = "distances to real images: not yet measured (no --data)"
    if args.data is not None:
        if not experiment.dataset:
            raise ValueError(f"--data: the experiment {experiment.name} names no dataset")
        real = load_dataset(experiment.dataset, args.data, train=True, download=args.download, size=info.image_size)
        real = real.sample(experiment.reference_images)
        note = f"distances to {len(real.images)} training images of {real.name}" + (f": {real.note}" * bool(real.note))
    if args.fid:
        if real is None:
            raise ValueError("--fid compares with real images: give --data")
        require_inception()
    measurer = Measurer(classifier, info, real, folder / "fid" if args.fid else None)
    about: dict[str, Any] = provenance() | {"note": note}
    settings_of: TunedSettings = {}
    if args.settings_of is not None:
        settings_of, about["settings_of"] = tuned(args.settings_of, experiment, info.class_names)
    return Runner(experiment, measurer, folder, workers, about, settings_of)


def require_own(folder: Path, experiment: Experiment) -> None:
    """ValueError if the folder holds another experiment, whose report this one would take the place of."""
    if (folder / RESULTS).exists() or any((folder / ROWS).glob("*.json")):
        raise ValueError(f"{folder} holds the experiment {PICTURE_BOOK}, not {experiment.name}: name another --output")
    require_same(folder / MANIFEST, "experiment", experiment.identity())


def require_same(path: Path, part: str, identity: Mapping[str, Any]) -> None:
    """ValueError if the experiment that ``path`` describes in ``part`` is another one than that of ``identity``.

    What is not said there, as by an older version, does not count.
    """
    try:
        said: dict[str, Any] = dict(read_json(path)[part])
    except (OSError, ValueError, LookupError, TypeError):
        return
    differing = [
        f"{name} {said[name]!r}, not {value!r}"
        for name, value in identity.items()
        if said.get(name, "") not in ("", value)
    ]
    if differing:
        raise ValueError(
            f"{path.parent} holds another experiment, with {'; '.join(differing)}: name another --output, so that its "
            "report is kept"
        )


def changed(experiment: Experiment, args: argparse.Namespace) -> Experiment:
    """The experiment with the changes that the command line asks for."""
    changes: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("images", "search_images", "steps", "batch", "undesired_every", "seed", "precision")
        if getattr(args, name) is not None
    }
    for name in ("classes", "search_classes"):
        if getattr(args, name) is not None:
            changes[name] = tuple(getattr(args, name).split(","))
    if args.adaptive:
        changes["adaptive"] = True
    if args.methods is not None:
        names = args.methods.split(",")
        if unknown := set(names) - METHOD_OF.keys():
            raise ValueError(
                f"--methods: there is no {', '.join(sorted(unknown))}; choose from {', '.join(METHOD_OF)}"
            )
        planned = {METHOD_NAMES[plan.method]: plan for plan in experiment.methods}
        if absent := [name for name in names if name not in planned]:
            raise ValueError(f"--methods: the experiment {experiment.name} has no [methods.{absent[0]}]")
        changes["methods"] = tuple(plan for name, plan in planned.items() if name in names)
    return replace(experiment, **changes)


def tuned(folder: Path, experiment: Experiment, class_names: tuple[str, ...]) -> tuple[TunedSettings, dict[str, Any]]:
    """(class, method) -> the best settings in another experiment's folder; and what is left with them there.

    ValueError if the folder lacks a class or method of this experiment.
    """
    results = read_results(folder)
    settings: TunedSettings = {}
    left: dict[str, dict[str, float | None]] = {}
    for label in experiment.labels(class_names):
        name = class_names[label]
        best = results.best(name)
        for method in (METHOD_NAMES[plan.method] for plan in experiment.methods):
            if method not in best:
                raise ValueError(
                    f"--settings-of: {folder} has no point of {method} on {name}: complete it there first, or choose "
                    f"--classes and --methods that it has"
                )
            settings[name, method] = best[method].point.settings
            left.setdefault(name, {})[method] = best[method].value("forbidden_share")
    return settings, {"folder": str(folder), "steps": results.manifest["experiment"]["steps"], "left": left}
