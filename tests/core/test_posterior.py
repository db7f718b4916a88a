"""The posterior's step along paths worked out by hand, and as a pure function along random ones."""

import dataclasses
import itertools
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dng_core.evidence import Call
from dng_core.guidance import NegativeGuidance
from dng_core.kernels import ReverseKernel
from dng_core.posterior import (
    STATES_KEPT,
    Chain,
    Path,
    PathPoint,
    offset_evidence,
    step,
)
from dng_core.settings import RULES, Settings

from .walks import OFFSET, WIDE, Script, Walk


def test_the_path_starts_at_the_prior_and_adds_every_jump():
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, b, c = script.point(), script.point(), script.point()
    assert walk.visit(a, 4.0).exp().tolist() == pytest.approx([0.3] * 3)
    at_b = math.log(0.3) + script.jump(a, b[0], 2.0, 4.0)
    torch.testing.assert_close(walk.visit(b, 2.0), at_b, rtol=1e-10, atol=0)
    torch.testing.assert_close(walk.visit(c, 1.0), at_b + script.jump(b, c[0], 1.0, 2.0), rtol=1e-10, atol=0)


def test_a_corrected_point_replaces_its_trial():
    """Heun: a trial at the next level, then the corrected state there; the path goes on from the corrected one."""
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, trial, corrected, c = (script.point() for _ in range(4))
    walk.visit(a, 4.0)
    walk.visit(trial, 2.0)
    at_corrected = math.log(0.3) + script.jump(a, corrected[0], 2.0, 4.0)
    torch.testing.assert_close(walk.visit(corrected, 2.0), at_corrected, rtol=1e-10, atol=0)
    assert walk.sigmas == [4.0, 2.0]
    expected = at_corrected + script.jump(corrected, c[0], 1.0, 2.0)
    torch.testing.assert_close(walk.visit(c, 1.0), expected, rtol=1e-10, atol=0)


def test_a_trial_point_without_noise_keeps_the_posterior_of_its_step():
    """dpm_2_ancestral: at every level a trial first, then the step itself, whose evidence counts."""
    script, walk = Script(), Walk([4.0, 2.0, 1.0], trial_points=True)
    a, trial, b, other_trial = (script.point() for _ in range(4))
    at_a = walk.visit(a, 4.0)
    assert torch.equal(walk.visit(trial, 2.0 * (1 + 3e-6)), at_a)
    at_b = walk.visit(b, 2.0)
    torch.testing.assert_close(at_b, at_a + script.jump(a, b[0], 2.0, 4.0), rtol=1e-10, atol=0)
    assert torch.equal(walk.visit(other_trial, 1.0), at_b)
    assert not torch.equal(walk.visit(script.point()[:1], 0.5), at_b)  # the run ends here, no trial


@pytest.mark.parametrize("rounding", [1 + 3e-6, 1 - 3e-6])
def test_a_trial_a_few_units_of_rounding_off_its_level_is_replaced_too(rounding):
    """dpmpp_2s_ancestral reaches the next level's sigma as its midpoint, by another formula."""
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, trial, b = (script.point() for _ in range(3))
    walk.visit(a, 4.0)
    walk.visit(trial, 2.0 * rounding)
    at_b = walk.visit(b, 2.0)
    torch.testing.assert_close(at_b, math.log(0.3) + script.jump(a, b[0], 2.0, 4.0), rtol=1e-10, atol=0)
    assert walk.sigmas == [4.0, 2.0]


def test_midpoints_get_a_posterior_but_no_jump_starts_there():
    script, walk = Script(), Walk([4.0, 2.0])
    a, middle, b = (script.point() for _ in range(3))
    walk.visit(a, 4.0)
    at_middle = walk.visit(middle, 3.0)
    torch.testing.assert_close(at_middle, math.log(0.3) + script.jump(a, middle[0], 3.0, 4.0), rtol=1e-10, atol=0)
    at_b = walk.visit(b, 2.0)
    torch.testing.assert_close(at_b, math.log(0.3) + script.jump(a, b[0], 2.0, 4.0), rtol=1e-10, atol=0)
    assert walk.sigmas == [4.0, 2.0]


def test_levels_match_the_schedule_through_float32_rounding_but_not_a_neighbour():
    script, walk = Script(), Walk([157.407, 14.6, 0.1])
    for sigma in (157.407, 14.6 * (1 + 3e-7), 0.1 * (1 + 1e-3)):
        walk.visit(script.point(), sigma)
    assert walk.sigmas == [157.407, 14.6 * (1 + 3e-7)]


def test_the_first_call_is_a_point_of_the_path_even_off_the_schedule():
    script, walk = Script(), Walk([4.0, 2.0])
    a, b = script.point(), script.point()
    walk.visit(a, 3.9)
    expected = math.log(0.3) + script.jump(a, b[0], 2.0, 3.9)
    torch.testing.assert_close(walk.visit(b, 2.0), expected, rtol=1e-10, atol=0)


def test_with_adaptive_samplers_every_call_is_a_point_and_a_rejected_step_is_forgotten():
    script, walk = Script(), Walk(None)
    a, too_far, b, c = (script.point() for _ in range(4))
    walk.visit(a, 4.0)
    walk.visit(too_far, 0.7)
    at_b = math.log(0.3) + script.jump(a, b[0], 2.3, 4.0)
    torch.testing.assert_close(walk.visit(b, 2.3), at_b, rtol=1e-10, atol=0)
    torch.testing.assert_close(walk.visit(c, 0.6), at_b + script.jump(b, c[0], 0.6, 2.3), rtol=1e-10, atol=0)
    assert walk.sigmas == [4.0, 2.3, 0.6]


def test_a_level_that_was_not_called_is_jumped_over():
    """No undesired prediction at 2.0: the next posterior comes from one kernel over both steps."""
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, _, c = (script.point() for _ in range(3))
    walk.visit(a, 4.0)
    expected = math.log(0.3) + script.jump(a, c[0], 1.0, 4.0)
    torch.testing.assert_close(walk.visit(c, 1.0), expected, rtol=1e-10, atol=0)


def test_a_jump_from_where_the_concept_does_not_apply_keeps_the_posterior():
    script, walk = Script(), Walk([4.0, 2.0, 1.0, 0.5], WIDE.with_(prior=1e-9, offset=1.0, offset_form="total"))
    a, b, c, d = (script.point() for _ in range(4))
    walk.visit(a, 4.0)
    at_b = walk.visit(b[:2], 2.0)
    assert torch.equal(walk.visit(c, 1.0), at_b)
    assert [point.applies for point in walk.path.points] == [True, False, True]
    expected = at_b + script.jump(c, d[0], 0.5, 1.0) + offset_evidence(walk.settings, ReverseKernel(1.0, 0.5), OFFSET)
    torch.testing.assert_close(walk.visit(d, 0.5), expected, rtol=1e-10, atol=0)


def test_calling_again_at_the_first_point_keeps_its_posterior_and_more_noise_starts_afresh():
    script = Script()
    for sigma, start in ((4.0, 0.7), (9.0, 0.3)):
        walk = Walk([4.0, 2.0, 1.0])
        a, b = script.point(), script.point()
        first = PathPoint(
            4.0, torch.full((3,), math.log(0.7)), torch.zeros(3), torch.zeros(3), True, Call(a[0], 4.0, *a[1:])
        )
        walk.path = Path((first,))
        walk.visit(b, 2.0)
        assert walk.visit(a, sigma).exp().tolist() == pytest.approx([start] * 3)
        assert walk.sigmas == [sigma]


def test_rising_noise_goes_back_to_the_last_point_above_it():
    script, walk = Script(), Walk([4.0, 2.0, 1.0])
    a, b, c, again = (script.point() for _ in range(4))
    for point, sigma in ((a, 4.0), (b, 2.0), (c, 1.0)):
        walk.visit(point, sigma)
    expected = math.log(0.3) + script.jump(a, again[0], 2.0, 4.0)
    torch.testing.assert_close(walk.visit(again, 2.0), expected, rtol=1e-10, atol=0)


def test_a_call_at_zero_noise_keeps_the_posterior_of_the_step_before():
    script = Script()
    for form in ("integrated", "per_step"):
        walk = Walk([4.0, 2.0], WIDE.with_(offset=1e-3, offset_form=form))
        walk.visit(script.point(), 4.0)
        before = walk.visit(script.point(), 2.0)
        torch.testing.assert_close(walk.visit(script.point(), 0.0), before)


def test_a_thousand_points_keep_few_states():
    script, levels = Script(), [float(1000 - i) for i in range(1000)]
    walk = Walk(levels)
    for sigma in levels:
        walk.visit(script.point(), sigma)
    assert walk.sigmas == levels
    assert [point.sigma for point in walk.path.points if point.call is not None] == levels[-STATES_KEPT:]
    assert all(point.log_p.shape == (3,) for point in walk.path.points)


def test_posteriors_are_clamped_and_recover():
    walk = Walk([4.0, 2.0, 1.0], WIDE.with_(p_min=0.01, p_max=0.6))
    far = torch.tensor([[1000.0], [-1000.0]])  # towards the undesired mean, and away from it
    said = torch.zeros(2, 1), torch.ones(2, 1)
    walk.visit((torch.zeros(2, 1), *said), 4.0)
    assert walk.visit((far, *said), 2.0).exp().tolist() == pytest.approx([0.6, 0.01])
    assert walk.visit((-far, *said), 1.0).exp().tolist() == pytest.approx([0.01, 0.6])


def test_the_tracked_offset_is_added_at_every_jump():
    settings = WIDE.with_(prior=1e-6, offset=5.0, offset_form="total")
    walk = Walk([4.0, 2.0, 1.0], settings)
    x, reference, _ = Script().point()
    total = math.log(1e-6)
    walk.visit((x, reference, reference), 4.0)
    for high, low in itertools.pairwise((4.0, 2.0, 1.0)):
        total += offset_evidence(settings, ReverseKernel(high, low), OFFSET)
        assert walk.visit((x, reference, reference), low).tolist() == pytest.approx([total] * 3)


def test_images_of_a_batch_do_not_touch_one_another():
    script = Script(seed=5)
    points = [script.point() for _ in range(4)]
    levels = [4.0, 2.0, 1.0, 0.5]
    together = Walk(levels)
    batch = [together.visit(point, sigma) for point, sigma in zip(points, levels, strict=True)]
    for i in range(3):
        alone = Walk(levels)
        for (x, reference, negative), sigma, expected in zip(points, levels, batch, strict=True):
            ours = alone.visit((x[i : i + 1], reference[i : i + 1], negative[i : i + 1]), sigma)
            torch.testing.assert_close(ours, expected[i : i + 1], rtol=1e-12, atol=0)


def test_start_values_can_be_given_per_image():
    start = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64).log()
    _, log_p = step(Path(log_prior=start), Call(Script().point()[0], 4.0), WIDE, Chain([4.0]))
    assert torch.equal(log_p, start)


def test_tracking_is_deterministic():
    runs = []
    for _ in range(2):
        script = Script(dtype=torch.float32, seed=3)
        guidance = NegativeGuidance([Settings()], Chain([4.0, 2.0, 1.0]))
        for sigma in (4.0, 2.0, 1.0):
            x, reference, negative = script.point()
            guidance(x, sigma, reference, reference, [negative])
        runs.append(guidance.trace())
    assert torch.equal(runs[0].posterior, runs[1].posterior)
    assert torch.equal(runs[0].scale, runs[1].scale)


def bits(value: Any) -> Any:
    """A value with every tensor inside it as its bytes, to be compared exactly."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if dataclasses.is_dataclass(value):
        return tuple(bits(getattr(value, field.name)) for field in dataclasses.fields(value))
    return tuple(bits(part) for part in value) if isinstance(value, tuple | list) else value


LEVELS = [4.0, 2.5, 2.0, 1.1, 1.0, 0.6]
CALLS = st.tuples(
    st.sampled_from([math.inf, 9.0, *LEVELS, *(level * (1 + 3e-6) for level in LEVELS), 3.0, 1.5, 0.8, 0.0]),
    st.sampled_from(["predictions", "gap", "gap", "reference", "nothing"]),
)


@pytest.mark.parametrize("rule", RULES)
@hypothesis.given(
    calls=st.lists(CALLS, min_size=1, max_size=12),
    falling=st.booleans(),
    adaptive=st.booleans(),
    trial_points=st.booleans(),
    fraction=st.sampled_from([0.8, 0.1, None]),
)
def test_step_answers_a_question_asked_twice_the_same_and_changes_nothing(
    rule, calls, falling, adaptive, trial_points, fraction
):
    """Midpoints, trials, steps back and fresh starts in any order: a path is a value, and there is no other state."""
    script, settings = Script(), Settings(rule=rule, offset=1.0, offset_form="total")
    noise_fraction = None if fraction is None else lambda *sigmas: fraction
    weight = torch.rand(1, 2, 4, generator=script.generator, dtype=torch.float64)
    chain = Chain(None if adaptive else LEVELS, OFFSET, weight, noise_fraction, trial_points)
    path = Path()
    for sigma, known in sorted(calls, reverse=True) if falling else calls:
        x, reference, negative = script.point()
        said = {"reference": (reference,), "nothing": ()}.get(known, (reference, negative))
        call = Call(x, sigma, *said, gap=torch.randn(3, generator=script.generator) if known == "gap" else None)
        before = bits((path, call, weight))
        went_on, log_p = step(path, call, settings, chain)
        assert bits((path, call, weight)) == before
        assert bits(step(path, call, settings, chain)) == bits((went_on, log_p))
        assert bool(log_p.isfinite().all())
        path = dataclasses.replace(went_on, guided=reference)
