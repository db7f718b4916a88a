"""The picture book's study: what is drawn, which scale is chosen, its report and its command, on random weights."""

import argparse
import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dng_core.cli import experiment
from dng_core.headless.lock import exclusive
from dng_core.studies.picture_book import study
from dng_core.studies.picture_book.cases import CASES
from dng_core.studies.picture_book.methods import METHODS
from dng_core.studies.picture_book.report import comparison, write_report
from dng_core.studies.picture_book.study import Plan, Study
from dng_core.studies.runner import MANIFEST

pytestmark = pytest.mark.usefixtures("quick_distances")
SHORT = Plan(
    cases=(CASES[0], CASES[-1]), methods=("nothing", "negative_prompt", "dng_joint"), settings=((3.0, "euler", 3),),
    scales=(1.0, 2.0), images=4, search_images=4, batch=3,
)  # fmt: skip


def test_a_study_is_measured_reported_and_goes_on_where_it_stopped(weights, tmp_path, monkeypatch):
    told = []
    rows = Study(SHORT, tmp_path, weights).run(told.append)
    assert [(row["case"], row["method"]) for row in rows] == [
        (case.name, method) for case in SHORT.cases for method in SHORT.methods
    ]
    for row in rows:
        assert 0 <= row["left_low"] <= row["left"] <= row["left_high"] <= 1
        # three steps of two predictions, or of three
        assert row["evaluations"] == {"nothing": 6, "negative_prompt": 6, "dng_joint": 9}[row["method"]]
        assert (row["rms"] == 0) == (row["method"] == "nothing")
        assert (row["late_scale"] is None) == (row["method"] != "dng_joint")
    markdown_file, page_file = write_report(tmp_path)
    text, page = markdown_file.read_text(encoding="utf-8"), page_file.read_text(encoding="utf-8")
    assert text.count("## ") == 6 and all(case.name in text for case in SHORT.cases)
    plots = [line.split("(")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert plots == [
        f"plots/{name}-cfg3-euler-3.png" for name in ("pareto-related", "pareto-absurd", "traces-dng_joint")
    ]
    for path in plots:
        with Image.open(tmp_path / path) as plot:
            assert plot.width > 400
    assert page.count("<img") == len(rows) + len(plots) and "Related cases in the mean" in page
    monkeypatch.setattr(study, "sample", None)  # nothing is drawn again
    assert Study(SHORT, tmp_path, weights).run(told.append) == rows


def test_traces_of_the_first_pictures_are_kept(weights, tmp_path):
    plan = replace(SHORT, cases=CASES[:1], methods=("dng",), scales=(2.0,))
    row, *_ = Study(plan, tmp_path, weights).run(lambda line: None)
    with np.load(tmp_path / "rows" / f"{row['key']}.npz") as arrays:
        assert arrays["posterior"].shape == arrays["scale"].shape == (3, 4) and arrays["sigmas"].shape == (3,)
        assert arrays["posterior"][0] == pytest.approx([0.2] * 4)
        uncapped = 2 * arrays["posterior"] / (1 - arrays["posterior"])
        np.testing.assert_allclose(arrays["scale"], uncapped.clip(max=METHODS["dng"].settings.max_scale), rtol=1e-4)
        assert arrays["was"].mean() == row["was"] and arrays["shown"].mean() == row["left"]


def test_a_sweep_draws_every_scale_and_the_tables_show_the_chosen_one(weights, tmp_path):
    plan = replace(SHORT, cases=CASES[:1], methods=("nothing", "constant_push"), sweep=True,
                   settings=((3.0, "euler", 3), (1.0, "euler", 3)))  # fmt: skip
    study_ = Study(plan, tmp_path, weights)
    found = [(p.method, p.scale, p.cfg) for p in study_.points({"nothing": 0.0, "constant_push": 2.0}, {})]
    assert found == [
        ("nothing", 0.0, 3.0), ("constant_push", 1.0, 3.0), ("constant_push", 2.0, 3.0),
        ("nothing", 0.0, 1.0), ("constant_push", 2.0, 1.0),
    ]  # fmt: skip
    study_.run(lambda line: None)
    markdown_file, _ = write_report(tmp_path)
    assert markdown_file.read_text(encoding="utf-8").count("| constant_push |") == 4  # two settings, mean and case


def test_a_single_scale_is_taken_without_a_search(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(Study, "row", None)
    plan = replace(SHORT, cases=(CASES[14],), scales=(3.0,))
    assert CASES[14].kind == "unrelated"
    chosen = Study(plan, tmp_path, weights).chosen_scales(print)
    assert chosen == {"nothing": 0.0, "negative_prompt": 0.0, "dng_joint": 3.0}


def test_a_stopped_study_goes_on(weights, tmp_path, monkeypatch):
    """What was measured before Ctrl-C is not drawn again; nothing half-written is left."""
    plan = replace(SHORT, cases=CASES[:1], methods=("nothing", "negative_prompt"))
    drawn, original = [], study.sample

    def stops(run, *rest):
        drawn.append(run.method)
        if len(drawn) == 5:  # of the negative prompt; before it come two seeds without guidance, in two batches each
            raise KeyboardInterrupt
        return original(run, *rest)

    monkeypatch.setattr(study, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        Study(plan, tmp_path, weights).run(lambda line: None)
    kept = sorted(path.name for path in (tmp_path / "rows").iterdir())
    assert [name.partition(".")[2] for name in kept] == ["json", "png"]
    before = (tmp_path / "rows" / kept[0]).read_bytes()
    told = []
    Study(plan, tmp_path, weights).run(told.append)
    assert [line[:5] for line in told] == ["[1/2]", "[2/2]"]
    assert (tmp_path / "rows" / kept[0]).read_bytes() == before


def test_the_scale_is_the_smallest_that_leaves_little(weights, tmp_path, monkeypatch):
    left = {1.0: 0.3, 2.0: 0.01, 4.0: 0.0}
    plan = replace(SHORT, methods=("nothing", "dng"), scales=(4.0, 1.0, 2.0))
    monkeypatch.setattr(Study, "row", lambda self, point: {"left": left[point.scale], "was": 0.5})
    assert Study(plan, tmp_path, weights).chosen_scales(lambda line: None) == {"nothing": 0.0, "dng": 2.0}
    left |= {2.0: 0.1, 4.0: 0.2}
    assert Study(plan, tmp_path, weights).chosen_scales(lambda line: None)["dng"] == 2.0


def test_a_thing_that_the_prompt_makes_certain_does_not_choose_the_scale(weights, tmp_path, monkeypatch):
    certain, open_case = CASES[0].name, CASES[1].name
    was = {certain: 1.0, open_case: 0.5}
    plan = replace(SHORT, cases=CASES[:2], methods=("dng",))

    def row(self, point):
        left = was[point.case.name] if point.case.name == certain else 0.01
        return {"left": left, "was": was[point.case.name]}

    monkeypatch.setattr(Study, "row", row)
    assert Study(plan, tmp_path, weights).chosen_scales(lambda line: None) == {"dng": 1.0}


def test_every_related_case_can_have_a_scale_of_its_own(weights, tmp_path, monkeypatch):
    needs = {CASES[0].name: 2.0, CASES[1].name: 1.0}
    plan = replace(SHORT, cases=(*CASES[:2], CASES[14]), methods=("nothing", "dng"), own_scales=True)
    searched = []

    def row(self, point):
        searched.append((point.case.name, point.scale, point.seed, point.images))
        return {"left": 0.5 * (point.scale < needs[point.case.name]), "was": 0.5}

    monkeypatch.setattr(Study, "row", row)
    own = Study(plan, tmp_path, weights).own_scales()
    assert own == {"dng": needs}
    assert searched == [(CASES[0].name, 1.0, 2000, 4), (CASES[0].name, 2.0, 2000, 4), (CASES[1].name, 1.0, 2000, 4)]
    points = Study(plan, tmp_path, weights).points({"nothing": 0.0, "dng": 4.0}, own)
    assert [p.scale for p in points if p.method == "dng"] == [2.0, 1.0, 4.0]
    assert {p.scale for p in points if p.method == "nothing"} == {0.0}


def test_a_report_names_scales_of_cases_and_counts_where_a_method_is_better(weights, tmp_path):
    plan = replace(SHORT, cases=(*CASES[:2], CASES[14]), own_scales=True)
    Study(plan, tmp_path, weights).run(lambda line: None)
    text = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "A related case has a scale of its own" in text
    assert "pareto" not in text

    measured = {"kind": "related", "kept": 0.9, "relabelled": 0.1, "distance": 5.0, "late_scale": 0.0, "key": ""}
    stock = [measured | {"case": case, "method": "negative_prompt", "rms": 0.2, "left": 0.1} for case in "abc"]
    ours = [
        measured | {"case": case, "method": "dng", "rms": rms, "left": 0.1}
        for case, rms in zip("abc", (0.1, 0.11, None), strict=True)
    ]
    head, (line,) = comparison(stock + ours)
    assert dict(zip(head, line, strict=True)) == {
        "method": "dng",
        "left: at most as much": "3 of 3",
        "rms: at most half": "1 of 2",
        "relabelled: at most half": "0 of 3",
        "kept: at least as much": "3 of 3",
        "distance: lower": "0 of 3",
    }
    assert comparison(ours) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("dng", "magic")}, "unknown methods magic: choose from nothing, negative_prompt"),
        ({"images": 2}, "images must be at least 4, not 2"),
        ({"batch": 0}, "batch must be at least 1, not 0"),
        ({"cases": ()}, "a study needs at least one case, one method and one scale"),
        ({"scales": (1.0, -1.0)}, "a scale must be at least 0 and finite, not -1"),
        ({"cases": CASES[14:16]}, "scales are chosen on related cases, and there are none: give a single scale"),
        ({"settings": ((3.0, "euler", 2),)}, "needs 3 to 1000 steps and a finite cfg from 0, not 2 and 3"),
        ({"settings": ((math.inf, "euler", 3),)}, "needs 3 to 1000 steps and a finite cfg from 0, not 3 and inf"),
    ],
)
def test_a_plan_that_cannot_be_drawn_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan(**changes)


def dng_experiment(*arguments):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser)
    return experiment.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_runs_the_study(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Plan, "__init__", functools.partialmethod(Plan.__init__, cases=CASES[:1]))
    options = [
        "--methods",
        "nothing,negative_prompt",
        "--images",
        4,
        "--steps",
        3,
        "--samplers",
        "euler",
        "--cfg",
        1,
        3,
    ]
    assert dng_experiment("picture_book", "--weights", weights, "--output", tmp_path, *options) == 0
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [(row["cfg"], row["method"]) for row in rows] == [
        (cfg, method) for cfg in (1.0, 3.0) for method in ("nothing", "negative_prompt")
    ]
    assert rows[1]["rms"] == 0 < rows[3]["rms"]  # a stock negative prompt does nothing at cfg 1
    assert "Made by `dng" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "report.html")
    report = (tmp_path / "report.md").read_bytes()
    for changed, told in (
        (["--seed", 1], "seed 0, not 1"),
        (["--steps", 4], "steps 3, not 4"),
        (["--precision", "bfloat16"], "precision 'float32', not 'bfloat16'"),
    ):
        again = ["--weights", weights, "--output", tmp_path, *options, *changed]
        assert dng_experiment("picture_book", *again) == 1
        assert f"{tmp_path} holds another experiment, with {told}: name another --output" in capsys.readouterr().err
    assert dng_experiment("picture_book", "--output", tmp_path, *options) == 1
    assert f"with weights {str(weights)!r}, not 'shipped'" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_bytes() == report
    others = ["--weights", weights, "--output", tmp_path, *options, "--cfg", 1, "--methods", "nothing"]
    assert dng_experiment("picture_book", *others) == 0  # other points of the same study


def test_the_command_takes_kinds_scales_and_a_sweep(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr(experiment, "Study", lambda plan, folder, weights: plans.append(plan) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dng_experiment(
            "picture_book", "--kinds", "unrelated", "absurd", "--scales", 2, "--sweep", "--output", tmp_path
        )
    (plan,) = plans
    assert [case.kind for case in plan.cases] == ["unrelated"] * 12 + ["absurd"] * 6
    assert plan.scales == (2.0,) and plan.sweep


def test_a_folder_takes_one_study_and_one_process(tmp_path, capsys):
    (tmp_path / "removal").mkdir()
    (tmp_path / "removal" / MANIFEST).write_text("{}")
    assert dng_experiment("picture_book", "--output", tmp_path / "removal") == 1
    assert "holds an experiment of class removal, not picture_book: name another --output" in capsys.readouterr().err
    with exclusive(tmp_path / "book" / experiment.LOCK):
        assert dng_experiment("picture_book", "--output", tmp_path / "book") == 1
    assert "another process works in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["picture_book", "--classes", "3"], "--classes: the experiment picture_book has no such option"),
        (["picture_book", "--methods", "magic"], "unknown methods magic"),
        (["picture_book", "--weights", "gone.safetensors"], "no weights at gone.safetensors"),
        (["tiny", "--cfg", "3"], "--cfg: the experiment tiny has no such option"),
        (["tiny", "--kinds", "absurd"], "--kinds: the experiment tiny has no such option"),
        (["picture_book", "--kinds", "absurd"], "scales are chosen on related cases"),
    ],
)
def test_bad_options_are_answered(options, message, tmp_path, capsys):
    assert dng_experiment(*options, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
