"""The evidence that images bring for their class, and how well posteriors foretell it: on numbers, and the network."""

import math

import pytest
import torch

from dng_core.studies.evidence_figures import evidence_figure, foretold, rules_figure, summed


def test_evidence_is_summed_by_noise_level_over_the_images_of_the_class_alone():
    increments = torch.tensor([[1.0, 9.0, 3.0], [0.5, 9.0, 0.5], [-1.0, 9.0, -3.0]])
    row = summed(increments, torch.tensor([True, False, True]), [10.0, 1.0, 0.1, 0.01])
    assert row == {
        "of the class": 2,
        "most there is": math.log(1.5),
        "sigma above 3": 2.0,
        "0.3 to 3": 0.5,
        "0 to 0.3": -2.0,
        "in all": 0.5,
    }


def test_without_an_image_of_the_class_there_is_no_evidence():
    row = summed(torch.ones(3, 2), torch.tensor([False, False]), [10.0, 1.0, 0.1, 0.01])
    assert row["of the class"] == 0 and row["most there is"] is None and math.isnan(row["in all"])


def test_the_shipped_network_draws_images_whose_evidence_can_be_measured():
    row = next(evidence_figure(images=16, steps=4, seed=0))
    assert row["class"] == "0" and row["images"] == 16
    assert 0 <= row["of the class"] < 16


def test_foretold_scores_each_class_and_step():
    truth = torch.tensor([[True, False, False], [False, True, True]])
    first = torch.full((2, 3), 0.5)
    last = torch.tensor([[0.9, 0.1, 0.1], [0.9, 0.1, 0.9]])
    scores = foretold(torch.stack([first, last]), truth)
    at_end = -(4 * math.log(0.9) + 2 * math.log(0.1)) / 6
    assert scores["end"] == scores["middle"] == pytest.approx(at_end)
    assert scores["cross entropy, mean"] == pytest.approx((at_end + math.log(2)) / 2)
    assert scores["ROC area, end"] == pytest.approx((1 + (0 + 0.5) / 2) / 2)


def test_every_rule_is_scored_on_the_same_images():
    rows = list(rules_figure(images=16, steps=10, seed=0))
    assert [row["rule"] for row in rows] == ["algorithm_2", "step_noise"]
    assert rows[0]["middle"] != rows[1]["middle"]
    assert all(0 < row["cross entropy, mean"] < 1 for row in rows)
