"""The figures on economy: that runs are split and paired as they say, and what a real ComfyUI answers."""

from pathlib import Path

import pytest

from dng_core.headless.errors import HeadlessError
from dng_core.headless.figures.economy_figure import (
    CASES,
    economy_figure,
    economy_mnist_figure,
    images_in_runs,
    in_batches,
    mnist_prompt,
    paired_difference,
)
from dng_core.headless.figures.oracle_runs import OracleRun, OracleRunner, Task, oracle_prompt
from dng_core.headless.figures.sampler_matrix import Choice
from dng_core.headless.server import Server

ROOT = Path(__file__).resolve().parents[3]


def test_every_batch_is_a_run_of_its_own_and_both_ways_take_the_same_seeds():
    runs = {"off": OracleRun("ksampler"), "auto": OracleRun("ksampler", baseline="off")}
    task = Task(samples=12, seed=7)
    prompt = in_batches(oracle_prompt(task, runs), runs, task, 4)
    assert prompt["latent"]["inputs"]["batch_size"] == 4
    assert prompt["seeds"]["inputs"] == {"first": 7, "runs": 3}
    assert prompt["off"]["inputs"]["seed"] == prompt["auto"]["inputs"]["seed"] == ["seeds", 0]
    assert prompt["auto report"]["inputs"]["samples"] == ["auto all", 0]
    assert prompt["auto report"]["inputs"]["baseline"] == ["off all", 0]
    assert prompt["auto all"]["inputs"]["batch_size"] == 12
    for of in (prompt, mnist_prompt("mnist", 12, 4, 7, 4)):
        links = [value for node in of.values() for value in node["inputs"].values() if isinstance(value, list)]
        assert all(link[0] in of for link in links)


def test_samples_fill_whole_batches_and_are_not_more_than_comfyui_puts_together():
    assert [images_in_runs(samples, 16) for samples in (1, 16, 17)] == [16, 16, 32]
    with pytest.raises(HeadlessError, match="4096 at most"):
        images_in_runs(4097, 1)


def test_the_interval_of_a_difference_is_that_of_pairs():
    """Of 100 pairs 7 differ, 5 in one direction: the variance is (7 / 100 - 0.03^2) / 100."""
    report = {"samples": 100, "forbidden_gained": 5, "forbidden_lost": 2}
    assert paired_difference(report) == f"+3.00 ± {196 * ((0.07 - 0.03**2) / 100) ** 0.5:.2f}"
    assert paired_difference({"samples": 9, "forbidden_gained": 0, "forbidden_lost": 0}) == "+0.00 ± 0.00"


def test_in_a_real_comfyui_images_sleep_in_a_batch_as_they_do_alone(bench_server: Server, tmp_path: Path) -> None:
    runs = OracleRunner(bench_server, ROOT, tmp_path / "cache.json")
    rows = list(economy_figure(runs, Choice(Task(samples=16), ["euler_ancestral"], ["karras"], [12]), [1, 16]))
    assert [(row["case"], row["batch"]) for row in rows] == [(case, batch) for case in CASES for batch in (1, 16)]
    assert {row["note"] for row in rows} == {""} and {row["samples"] for row in rows} == {16}
    alone, together = (float(row["evaluated"].removesuffix(" %")) for row in rows[:2])
    assert 8 < alone < 60 and 8 < together < 60  # one of twelve steps is looked at in any case
    assert (
        abs(alone - together) < 10
    )  # points: other noise; one image awake would keep 16 awake at twice as many steps
    assert all(row["distance off"] == pytest.approx(row["distance auto"], rel=0.5) for row in rows)


def test_a_real_comfyui_draws_digits_by_their_calibration(bench_server: Server, tmp_path: Path) -> None:
    runs = OracleRunner(bench_server, ROOT, tmp_path / "cache.json")
    (row,) = economy_mnist_figure(runs, "mnist", 3, 4, 0, [2])
    assert row["images"] == 4 and 25 <= float(row["evaluated"].removesuffix(" %")) <= 100
    assert row["left off, %"].endswith(")") and 0 <= float(row["kept auto, %"]) <= 100
