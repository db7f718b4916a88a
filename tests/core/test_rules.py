"""Each rule of the posterior against what it claims to count."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dng_core.evidence import Call, divergence_evidence, gap_of_step, held_evidence, path_evidence
from dng_core.posterior import (
    EVIDENCE,
    LEAST_NOISE_FRACTION,
)
from dng_core.settings import RULES

from .walks import WIDE, Script, Walk


def walked(rule: str, levels: Sequence[float] = (4.0, 3.0, 2.4), **known: Any) -> tuple[list[Call], list[Tensor]]:
    """A run by a rule, which ends at the last level without predictions: its calls and posteriors."""
    script, walk = Script(), Walk(levels, WIDE.with_(rule=rule, prior=1e-30), **known)
    points = [script.point()[: 1 if sigma == levels[-1] else 3] for sigma in levels]
    gaps = torch.randn(len(levels), 3, generator=script.generator, dtype=script.dtype)
    logs = [walk.visit(*said) for said in zip(points, levels, gaps, strict=True)]
    return [point.call for point in walk.path.points], logs


def test_every_rule_is_tested_below():
    """The rule elbo in test_elbo.py, and the choice between two of them, auto, as well."""
    assert set(EVIDENCE) == set(RULES) - {"auto"} == {"algorithm_2", "elbo", "step_noise", "probe"}


@pytest.mark.parametrize("fraction", [None, 0.0, 0.5, 1.0])
def test_the_rule_algorithm_2_holds_the_predictions_before_a_jump_whatever_else_is_known(fraction):
    (a, b, end), logs = walked("algorithm_2", noise_fraction=None if fraction is None else lambda *sigmas: fraction)
    for start, there, log_start, log_there in ((a, b, *logs[:2]), (b, end, *logs[1:])):
        by_hand = Script.jump((start.x, start.reference, start.negative), there.x, there.sigma, start.sigma)
        torch.testing.assert_close(log_there, log_start + by_hand, rtol=1e-10, atol=0)


def test_the_rule_step_noise_takes_both_ends_and_the_gap_that_the_noise_of_the_steps_shows():
    (a, b, c, _), logs = walked("step_noise", (4.0, 3.0, 2.4, 1.0), noise_fraction=lambda *sigmas: 0.9)
    first, second = gap_of_step(a, b, a.reference, 0.9), gap_of_step(b, c, b.reference, 0.9)
    torch.testing.assert_close(logs[1], logs[0] + path_evidence(a, b, first), rtol=1e-10, atol=0)
    faded = (2.4 / 3.0) ** 4
    averaged = faded * first + (1 - faded) * second
    torch.testing.assert_close(logs[2], logs[1] + path_evidence(b, c, averaged), rtol=1e-10, atol=0)


def test_the_rule_step_noise_forgets_a_fifth_of_the_steps_before_however_short_the_step():
    (a, b, c, _), logs = walked("step_noise", (4.0, 3.0, 2.999, 1.0), noise_fraction=lambda *sigmas: 0.9)
    averaged = 0.8 * gap_of_step(a, b, a.reference, 0.9) + 0.2 * gap_of_step(b, c, b.reference, 0.9)
    torch.testing.assert_close(logs[2], logs[1] + path_evidence(b, c, averaged), rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("levels", "fraction"),
    [
        ((4.0, 3.0, 2.4), None),
        ((4.0, 3.0, 2.4), LEAST_NOISE_FRACTION - 1e-6),
        ((math.inf, 3.0), 1.0),
    ],
    ids=["unknown noise", "little noise", "from infinite noise"],
)
def test_where_a_steps_noise_says_nothing_step_noise_is_algorithm_2(levels, fraction):
    known = {} if fraction is None else {"noise_fraction": lambda *sigmas: fraction}
    plain, ours = (walked(rule, (*levels, 1.0), **known)[1] for rule in ("algorithm_2", "step_noise"))
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_at_a_midpoint_step_noise_is_algorithm_2():
    logs = []
    for rule in ("algorithm_2", "step_noise"):
        script, walk = Script(), Walk([4.0, 2.0], WIDE.with_(rule=rule), noise_fraction=lambda *sigmas: 1.0)
        logs.append([walk.visit(script.point(), sigma) for sigma in (4.0, 3.0)])
    torch.testing.assert_close(*logs, rtol=0, atol=0)


@pytest.mark.parametrize("fraction", [0.0, 0.6, 1.0, None])
def test_the_rule_probe_takes_both_ends_and_the_mean_of_the_probed_gaps(fraction):
    """At the end, it takes the last predictions, less the divergence's evidence times the missing share of noise."""
    (a, b, end), logs = walked("probe", noise_fraction=None if fraction is None else lambda *sigmas: fraction)
    torch.testing.assert_close(logs[1], logs[0] + path_evidence(a, b, (a.gap + b.gap) / 2), rtol=1e-10, atol=0)
    lacking = 0.0 if fraction is None else 1 - fraction
    expected = held_evidence(b, end, b) - lacking * divergence_evidence(b, end, b.gap)
    torch.testing.assert_close(logs[2], logs[1] + expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_by_no_rule_do_elements_of_weight_0_count(rule):
    weight, logs = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), []
    for nonsense in (0.0, 1e3):
        script = Script()
        walk = Walk(None, WIDE.with_(rule=rule, prior=1e-30), weight=weight, noise_fraction=lambda *sigmas: 0.9)
        for sigma in (4.0, 3.0, 2.4):
            point = [torch.where(weight > 0, x, i * nonsense / sigma) for i, x in enumerate(script.point(), start=1)]
            log_p = walk.visit(point, sigma, torch.ones(3))
        logs.append(log_p)
    torch.testing.assert_close(*logs, rtol=1e-12, atol=0)


def test_a_trial_counts_by_the_rules_that_need_no_noise_alone():
    for rule in RULES:
        script, walk = Script(), Walk([4.0, 2.0], WIDE.with_(rule=rule), trial_points=True)
        at_a = walk.visit(script.point(), 4.0, torch.ones(3))
        assert torch.equal(walk.visit(script.point(), 2.0, torch.ones(3)), at_a) == (rule not in ("probe", "elbo"))
