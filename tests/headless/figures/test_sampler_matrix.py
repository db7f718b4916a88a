"""The matrix of samplers: what it asks ComfyUI, what it does not ask twice, and what its table and picture say."""

import argparse
import json
from pathlib import Path

import pytest

from dng_core.headless.client import RunResult
from dng_core.headless.errors import HeadlessError
from dng_core.headless.figures import oracle_runs
from dng_core.headless.figures.exact_figures import (
    off_figure,
    predictions_figure,
    standard_errors,
    step_counts_figure,
    unrelated_figure,
)
from dng_core.headless.figures.matrix_picture import (
    BAD,
    CELL_HEIGHT,
    CELL_WIDTH,
    GAP,
    GOOD,
    HEAD_HEIGHT,
    LABEL_WIDTH,
    PANEL_WIDTH,
    PANELS,
    TITLE_HEIGHT,
    _colour,
    heat_map,
)
from dng_core.headless.figures.oracle_choice import chosen_by, node_inputs
from dng_core.headless.figures.oracle_runs import OracleRun, OracleRunner, Task, oracle_prompt
from dng_core.headless.figures.sampler_matrix import Choice, matrix_figure, matrix_table, nodes_agree
from dng_core.headless.server import Server
from dng_core.plots.drawing import THEMES

ROOT = Path(__file__).resolve().parents[3]


class FakeComfyUI:
    """Answers every prompt with reports made from its sampler's inputs, and refuses lcm."""

    def __init__(self):
        self.prompts = []

    def __call__(self, server, prompt):
        self.prompts.append(prompt)
        if any("lcm" in node["inputs"].values() for node in prompt.values()):
            raise HeadlessError("Node failed.\n  | ValueError: lcm cannot be tracked")
        ui = {}
        for name in prompt:
            if name.endswith(" report"):
                share = 0.125 if name.startswith("unguided") else 0.03
                figures = {"forbidden_share": share, "kl_renormalised": 0.01, "median_distance": 2.0, "finite": True,
                           "identical": True}  # fmt: skip
                ui[name] = {"figures": [figures]}
        names = {"sampler_name": [["euler", "lcm"]], "scheduler": ["COMBO", {"options": ["karras", "simple"]}]}
        return RunResult("1", ui=ui, node_info={"KSamplerDNG": {"input": {"required": names}}})


@pytest.fixture
def fake(monkeypatch):
    fake = FakeComfyUI()
    monkeypatch.setattr(oracle_runs, "run_workflow", fake)
    return fake


def matrix(tmp_path, **changes):
    options = {"samplers": ["euler", "lcm"], "schedulers": ["karras", "simple"], "steps": [8]} | changes
    runs = OracleRunner(Server("http://nowhere"), ROOT, tmp_path / "cache.json")
    return list(matrix_figure(runs, Choice(Task(samples=10), **options)))


def test_a_stopped_matrix_goes_on_where_it_was(fake, tmp_path):
    first = matrix(tmp_path, samplers=["euler"])
    assert len(fake.prompts) == 2 and len(first) == 6
    assert matrix(tmp_path, samplers=["euler"], steps=[8, 9])[:3] == first[:3]
    assert len(fake.prompts) == 4


def test_what_was_measured_with_other_code_is_measured_again(fake, tmp_path, monkeypatch):
    matrix(tmp_path, samplers=["euler"])
    monkeypatch.setattr(oracle_runs, "code_digest", lambda pack: "other")
    matrix(tmp_path, samplers=["euler"])
    assert len(fake.prompts) == 4


def test_a_refused_sampler_is_named_with_the_reason_and_the_others_go_on(fake, tmp_path):
    rows = matrix(tmp_path)
    refused = [row for row in rows if row["node"] == "all"]
    assert {row["sampler"] for row in refused} == {"lcm"}
    assert refused[0]["note"] == "ValueError: lcm cannot be tracked"
    assert len({tuple(row) for row in rows}) == 1  # all rows have the same columns
    assert "| lcm | refused | refused |" in matrix_table(rows, "ksampler")
    assert "| euler | 3.0 | 3.0 | 12.5 .. 12.5 | 0.010 | 1.00 .. 1.00 |" in matrix_table(rows, "ksampler")
    assert nodes_agree(rows) == 0


def test_a_dead_server_is_no_refusal(fake, tmp_path, monkeypatch):
    def dead(server):
        raise HeadlessError("ComfyUI ended")

    monkeypatch.setattr(Server, "check_alive", dead)
    with pytest.raises(HeadlessError, match="ended"):
        matrix(tmp_path)


def test_the_heat_map_has_a_cell_for_every_sampler_scheduler_and_measure(fake, tmp_path):
    rows = [row | {"left": 0.03 if row["scheduler"] == "karras" else 0.2} for row in matrix(tmp_path)]
    picture = heat_map([*rows[:3], *rows[3:6], *matrix(tmp_path, samplers=["lcm"])], "ksampler", "t")
    top = TITLE_HEIGHT + HEAD_HEIGHT

    def colour(panel: int, column: int, sampler: int) -> tuple[int, ...]:
        """The colour of a cell, in a corner that its text leaves free."""
        x = LABEL_WIDTH + panel * (PANEL_WIDTH + GAP) + column * CELL_WIDTH
        return picture.getpixel((x + 2, top + sampler * CELL_HEIGHT + 2))

    assert [colour(0, column, 0) for column in (0, 1)] == [_colour(PANELS[0], 0.03), BAD]
    assert [colour(1, column, 0) for column in (0, 1)] == [_colour(PANELS[1], 0.01)] * 2
    assert [colour(2, column, 0) for column in (0, 1)] == [GOOD] * 2  # as far from the mixture as unguided
    assert {colour(panel, column, 1) for panel in range(3) for column in (0, 1)} == {THEMES["light"].background}
    assert _colour(PANELS[0], 0.0) == GOOD and _colour(PANELS[0], 0.5) == BAD


def test_every_link_of_a_prompt_leads_to_a_node_and_the_chain_holds_every_concept():
    runs = {
        "unguided": OracleRun("stock"),
        "custom": OracleRun("stock guider"),
        "list": OracleRun("ksampler", negative=("0", "1", "2"), baseline="unguided"),
        "guider": OracleRun("guider", baseline="custom"),
        "chain": OracleRun("patch", negative=("0", "1")),
    }
    prompt = oracle_prompt(Task(forbidden="0,1,2"), runs)
    links = [v for node in prompt.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert all(link[0] in prompt for link in links)
    classes = [node["class_type"] for node in prompt.values()]
    assert classes.count("DynamicNegativeGuidance") == 2 and classes.count("DNGConcept") == 2
    assert prompt["list report"]["inputs"]["baseline"] == ["unguided", 0]
    assert json.dumps(prompt)


def test_arguments_choose_a_part_and_name_what_there_is(fake, tmp_path):
    runs = OracleRunner(Server("http://nowhere"), ROOT, tmp_path / "cache.json")
    given = argparse.Namespace(
        samples=10, samplers=None, schedulers=["simple"], steps=None, settings="cifar10", prediction="v", seed=3,
        set=["temperature=0.5"], nodes=["ksampler", "patch"],
    )  # fmt: skip
    defaults = (runs.options(), ("all",), ("all",), (30,))
    rows = list(matrix_figure(runs, chosen_by(given, *defaults)))
    assert [(row["sampler"], row["scheduler"], row["steps"]) for row in rows[::2]] == [
        ("euler", "simple", 30),
        ("lcm", "simple", 30),
    ]
    sampled = fake.prompts[-2]
    assert sampled["model"]["inputs"]["prediction"] == "v_prediction"
    assert (
        sampled["ksampler"]["inputs"].items()
        >= {"settings.temperature": 0.5, "settings.guidance_scale": 5, "seed": 3}.items()
    )
    given.samplers = ["eulr"]
    with pytest.raises(HeadlessError, match=r"eulr.*euler, lcm"):
        chosen_by(given, *defaults)
    with pytest.raises(HeadlessError, match="INPUT=VALUE"):
        node_inputs(["temperature"])


@pytest.mark.parametrize("figure", [predictions_figure, step_counts_figure, off_figure])
def test_a_figure_over_all_samplers_notes_a_refusal_and_goes_on(fake, tmp_path, figure):
    runs = OracleRunner(Server("http://nowhere"), ROOT, tmp_path / "cache.json")
    refused, measured = figure(runs, Choice(Task(samples=10), ["lcm", "euler"], ["karras"], [8]))
    assert refused["note"] == "ValueError: lcm cannot be tracked" and measured["note"] == ""
    assert list(refused) == list(measured)


def test_the_constant_prompt_is_the_weakest_that_removes_as_much():
    class Runs:
        def reports(self, task, runs):
            settings = runs["guided"].settings
            strength = settings.guidance_scale if settings.method == "negative_prompting" else 0.5
            report = {"forbidden_share": 0.1 - 0.1 * strength, "kl_renormalised": 0.0, "rms_change": strength}
            return {"guided": report | {"mean_scale": [[1.0, 0.02, 0.001, 0.0]]}}

    dng, constant = unrelated_figure(Runs(), Choice(Task(), ["euler"], ["karras"], [30]))
    assert constant["scale"] == 0.5 and constant["unrelated: RMS change"] == 0.5
    assert dng["mean scale falls below 0.01 at"] == "50% of the steps"


def test_standard_errors_are_those_of_a_difference_of_two_shares():
    assert standard_errors(0.5, 0.4, 100) == pytest.approx(0.1 / (2 * 0.45 * 0.55 / 100) ** 0.5)
    assert standard_errors(0.0, 0.0, 100) == 0.0
    assert standard_errors(None, 0.1, 100) is None


def test_a_real_comfyui_holds_samplers_against_the_exact_answer(comfyui_server: Server, tmp_path: Path) -> None:
    """The matrix in reduced form: one sampler that is tracked as it draws, one that is refused, through every node."""
    runs = OracleRunner(comfyui_server, ROOT, tmp_path / "cache.json")
    assert len(runs.options()["sampler_name"]) >= 40
    rows = list(matrix_figure(runs, Choice(Task(samples=500), ["euler_ancestral", "lcm"], ["normal"], [20])))
    tracked, refused = rows[:3], rows[3:]
    assert len({row["left"] for row in tracked}) == 1  # the nodes agree
    assert all(row["finite"] and row["left"] < row["unguided"] / 2 for row in tracked)
    assert all(row["KL of the rest"] < 0.05 and 0.9 < row["distance ratio"] < 1.1 for row in tracked)
    assert len(refused) == 1 and "lcm cannot be tracked" in refused[0]["note"]
