"""`dng figures`: what it refuses before anything is measured, and what it records."""

import argparse
import inspect
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from dng_core.cli import figures
from dng_core.headless.errors import HeadlessError
from dng_core.headless.figures import (
    comfyui_figures,
    cost_figures,
    economy_figure,
    exact_figures,
    help_pictures,
    sampler_matrix,
)
from dng_core.studies import calibrating, evidence_figures, network_figures, oracle_figures
from dng_core.studies.picture_book import figure as book_figure
from dng_core.studies.picture_book import posteriors


def dng_figures(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    figures.add_arguments(parser)
    return figures.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_figure_is_printed_and_recorded_with_its_default_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures.oracle_figures, "posterior_figure", lambda samples, seed: iter([{"error": 1 / 3}]))
    assert dng_figures("posterior", "--output", tmp_path) == 0
    assert capsys.readouterr().out.startswith("| error |\n| --- |\n| 0.3333 |\n")
    record = json.loads((tmp_path / "posterior.json").read_text())
    assert (record["samples"], record["seed"], record["rows"]) == (2000, 0, [{"error": 1 / 3}])
    assert (tmp_path / "posterior.md").read_text() == "| error |\n| --- |\n| 0.3333 |\n"


@pytest.mark.parametrize(
    ("figure", "options", "message"),
    [
        ("posterior", ["--samples", 0], "--samples must be at least 1, not 0"),
        ("start", ["--repeats", 0], "--repeats must be at least 1, not 0"),
        ("rules", ["--steps", 0], "--steps must be at least 1, not 0"),
        ("economy", ["--batches", 1, 0], "--batches must be at least 1, not 0"),
        ("rules", ["--steps", 20, 50], "takes one step count"),
        ("calibration", ["--samplers", "heun"], "the figure calibration has euler_ancestral, .*, not heun"),
    ],
)
def test_numbers_that_make_no_figure_are_refused(tmp_path: Path, figure, options, message):
    with pytest.raises(HeadlessError, match=message):
        dng_figures(figure, *options, "--output", tmp_path)


def test_what_cannot_be_measured_is_told_without_a_traceback(tmp_path):
    with pytest.raises(HeadlessError, match=r"dng figures networks: no weights at .*gone\.safetensors"):
        dng_figures("networks", "--denoisers", tmp_path / "gone.safetensors", "--output", tmp_path)


@pytest.mark.parametrize("figure", list(figures.FIGURES))
def test_every_figure_finds_the_function_that_measures_it(tmp_path, monkeypatch, figure):
    options = {"sampler_name": ["euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m"], "scheduler": ["karras"]}
    runner = argparse.Namespace(options=lambda: options)
    monkeypatch.setattr(figures, "oracle_runner", lambda args, further=(): nullcontext(runner))
    monkeypatch.setattr(figures, "server_with_pack", lambda args: nullcontext(("server", Path("pack"))))
    monkeypatch.setattr(figures, "comfyui_and_pack", lambda args: ("location", Path("pack")))
    monkeypatch.setattr(figures, "write_matrix", lambda args, table: [])
    local = (calibrating, evidence_figures, network_figures, oracle_figures, book_figure, posteriors)
    inside = (comfyui_figures, cost_figures, economy_figure, exact_figures, help_pictures, sampler_matrix)
    for module in (*inside, *local):
        for name, function in vars(module).items():
            if name.endswith("_figure"):
                monkeypatch.setattr(module, name, Measured(name, inspect.signature(function)))
    assert dng_figures(figure, "--output", tmp_path) == 0
    (row,) = json.loads((tmp_path / f"{figure}.json").read_text())["rows"]
    assert row["by"].removesuffix("_figure").replace("_", "-") in {figure, "oracle"}


class Measured:
    """Stands for a figure's function: it yields one row with its name, and takes what the function takes."""

    def __init__(self, name: str, signature: inspect.Signature) -> None:
        self.name, self.signature = name, signature

    def __call__(self, *given: object) -> Iterator[dict[str, str]]:
        self.signature.bind(*given)
        yield {"by": self.name}
