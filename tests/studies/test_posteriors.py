"""What the picture book's posteriors know: on evidence whose answer is known, and on a random book by the command."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dng_core.calibration import EXACT, Calibration, Evidence
from dng_core.cli.main import main
from dng_core.files import read_json
from dng_core.shares import Share
from dng_core.studies.picture_book import posteriors
from dng_core.studies.picture_book.cases import CASES
from dng_core.studies.picture_book.methods import METHODS, unguided
from dng_core.studies.picture_book.opened import open_book
from dng_core.studies.samplers import NOISY, SAMPLERS

SIGMAS = (8.0, 4.0, 2.0, 1.0, 0.5)
NAMES = ("share alone", "exact", "calibrated", "ROC area, exact", "ROC area, calibrated")


def evidence(nats: list[float]) -> Evidence:
    """Of one image each: so many nats, in equal parts over the jumps."""
    increments = (torch.tensor(nats) / (len(SIGMAS) - 1)).expand(len(SIGMAS) - 1, -1)
    return Evidence(increments, torch.full_like(increments, 100.0), SIGMAS)


def test_scores_are_those_of_the_posterior_written_out():
    """Two of four images show the thing, so that the prior is 1/2; the calibration counts half of the evidence.

    By half of -3 nats p is e^(log 1/2 - 3/2), while images with the thing end at 1/2 + log 2 = 1, the most there is.
    """
    shown = torch.tensor([True, True, False, False])
    half = Calibration(0.5, ((8.0, 0.0), (0.5, 0.0)), 0.5, 0.5, 8, 8)
    found = posteriors._scores(evidence([0.6, 0.4, -3.0, -1.0]), shown, half)
    exact = [0.5 * math.exp(nats) for nats in (0.6, 0.4, -3.0, -1.0)]
    halved = [0.5 * math.exp(nats / 2) for nats in (0.6, 0.4, -3.0, -1.0)]
    for entropy, p in zip(found[1:3], (exact, halved), strict=True):
        wanted = -sum(map(math.log, [p[0], p[1], 1 - p[2], 1 - p[3]])) / 4
        assert entropy == pytest.approx(wanted, rel=1e-6)
    assert found[0] == pytest.approx(math.log(2)) and found[3:] == (1.0, 1.0)
    wrong = posteriors._scores(evidence([-3.0, -1.0, 0.6, 0.4]), shown, EXACT)
    assert wrong[1] > found[0] and wrong[3:] == (0.0, 0.0)


def test_each_setting_differs_from_the_calibrations_own_in_one_thing(weights, monkeypatch):
    """Every related case of one thing is asked; those that hardly tell anything are left out of the means."""
    asked = []

    def recorded(opened, case, *setting):
        asked.append((case.name, *setting))
        shown = torch.tensor([True, False]) if "night" in case.avoid else torch.tensor([False, False])
        return evidence([0.5, -2.0]), shown

    monkeypatch.setattr(posteriors, "_recorded", recorded)
    rows = list(posteriors.carry_over_figure(weights, 2, 0))
    base = dict(zip(("cfg", "sampler", "steps"), posteriors.BASE, strict=True))
    assert all(sum(row[name] != value for name, value in base.items()) <= 1 for row in rows)
    assert {row["sampler"] for row in rows} == set(SAMPLERS) and {row["cfg"] for row in rows} == set(posteriors.CFGS)
    assert len({tuple(row[name] for name in base) for row in rows}) == len(rows) == 9
    related = [case for case in CASES if case.kind == "related" and len(case.avoid) == 1]
    assert len(asked) == 9 * len(related)
    assert all(row["cases"] == sum("night" in case.avoid for case in related) == 2 for row in rows)
    monkeypatch.setattr(posteriors, "OPEN_SHARE", 0.9)
    assert all(row[name] is None for row in posteriors.carry_over_figure(weights, 2, 0) for name in NAMES)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_is_tracked_by_the_rule_for_its_noise(weights, sampler):
    opened, method = open_book(weights), METHODS["dng_joint"]
    rules = ["auto", "algorithm_2" if sampler in NOISY else "elbo"]
    methods = [replace(method, settings=method.settings.with_(rule=rule)) for rule in rules]
    found, named = (unguided(opened.book, opened.chain, CASES[0], m, 1.0, sampler, 4, 2, 0)[0] for m in methods)
    assert found.increments.shape == (3, 2) and bool(found.increments.isfinite().all())
    assert torch.equal(found.increments, named.increments)


@pytest.mark.parametrize(
    ("mean", "undecided", "word"), [(0.2, 0.1, "seen"), (0.01, 0.1, "not seen"), (0.4, 0.9, "cannot tell")]
)
def test_what_is_said_of_a_share(mean, undecided, word):
    assert Share(mean, 0.0, 1.0, 32, undecided).verdict == word


def test_the_commands_print_and_record(weights, tmp_path: Path, capsys):
    options = ["--weights", str(weights), "--output", str(tmp_path)]
    assert main(["figures", "shares", "--samples", "4", "--steps", "3", *options]) == 0
    rows = read_json(tmp_path / "shares.json")["rows"]
    assert [row["kind"] for row in rows] == ["related"] * 13 + ["unrelated"] * 12
    assert all(0 <= row["low"] <= row["share"] <= row["high"] <= 1 for row in rows)
    assert "| related | a park by day, avoid flower |" in capsys.readouterr().out
