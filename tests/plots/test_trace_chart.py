"""The chart of a trace: its lines stand where the values are, and every size of trace is drawn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from dng_core.guidance import Trace
from dng_core.plots.drawing import THEMES, Colour, log_ticks, ticks
from dng_core.plots.trace_chart import AXES, MOST_LINES, VIEWS, horizontal_axis, trace_chart


def constant(p: float, steps: int = 40, concepts: int = 1, images: int = 1) -> Trace:
    posterior = torch.full((steps, concepts, images), p)
    return Trace(torch.logspace(1, -1, steps), posterior, posterior / (1 - posterior))


def random_trace(steps: int, concepts: int = 1, images: int = 1) -> Trace:
    generator = torch.Generator().manual_seed(0)
    posterior = torch.rand(steps, concepts, images, generator=generator) * 0.9
    return Trace(torch.logspace(1, -1, steps), posterior, posterior / (1 - posterior))


def rows_of(picture: Image.Image, colour: Colour, part: slice) -> np.ndarray:
    """The rows in which a colour is found in the middle column of a part of the picture."""
    pixels = np.asarray(picture)[part, picture.width // 2 + 3].astype(int)
    return np.flatnonzero((np.abs(pixels - colour) < 12).all(axis=1)) + (part.start or 0)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_line_stands_at_its_value(theme):
    """Measured in the upper panel: from p 0 to p 0.9 it climbs nine times as far as from 0 to 0.1."""
    colour = THEMES[theme].series[0]
    low, tenth, half, high = (
        rows_of(trace_chart(constant(p), theme=theme), colour, slice(0, 350)).mean() for p in (0.0, 0.1, 0.5, 0.9)
    )
    assert low > tenth > half > high
    assert (low - half) / (low - tenth) == pytest.approx(5, rel=0.05)
    assert (low - high) / (low - tenth) == pytest.approx(9, rel=0.05)


def test_the_lower_panel_fits_the_largest_scale():
    for p in (0.01, 0.5, 0.999):
        rows = rows_of(trace_chart(constant(p)), THEMES["light"].series[0], slice(360, 720))
        assert 370 < rows.min() < 420


def test_every_image_has_its_colour_and_every_concept_a_dash():
    picture = np.asarray(trace_chart(random_trace(5, images=MOST_LINES))).reshape(-1, 3).astype(int)
    for colour in THEMES["light"].series:
        assert (np.abs(picture - colour).max(axis=1) < 3).any()
    trace = constant(0.0, concepts=2, images=2)
    trace.posterior[:, :, 0] = torch.tensor([0.2, 0.8])
    pixels = np.asarray(trace_chart(trace, view="lines")).astype(int)
    drawn = (np.abs(pixels - THEMES["light"].series[0]).max(axis=2) < 12).sum(axis=1)
    dashed, solid = drawn[120:230].max(), drawn[230:340].max()  # the upper panel's halves: one concept's line in each
    assert 0.3 * solid < dashed < 0.8 * solid


def test_a_tick_below_both_panels_marks_each_step_at_which_nothing_was_evaluated():
    plain = constant(0.5, steps=6, concepts=2)
    looked = torch.tensor([[True, True], [False, False], [True, False], [False, False], [True, True], [False, True]])
    marked = np.asarray(trace_chart(replace(plain, looked=looked))).astype(int)
    changed = (np.abs(marked - np.asarray(trace_chart(plain))).max(axis=2) > 12)[60:]  # without the line that counts
    columns = np.flatnonzero(changed.any(axis=0))
    ticks = np.split(columns, np.flatnonzero(np.diff(columns) > 20) + 1)
    assert len(ticks) == 2  # steps 2 and 4: at the others one concept was looked at
    width = marked.shape[1]
    assert ticks[1].mean() - ticks[0].mean() == pytest.approx(2 / 5 * width, rel=0.15)
    rows = np.flatnonzero(changed.any(axis=1))
    assert (np.diff(rows) > 50).sum() == 1  # below each of the two panels
    everything = trace_chart(replace(plain, looked=torch.ones(6, 2, dtype=torch.bool)))
    assert everything.tobytes() == trace_chart(plain).tobytes()


def test_auto_draws_lines_up_to_eight_images_and_quantiles_above():
    few, many = random_trace(5, images=MOST_LINES), random_trace(5, images=MOST_LINES + 1)
    assert trace_chart(few).tobytes() == trace_chart(few, view="lines").tobytes()
    assert trace_chart(few).tobytes() != trace_chart(few, view="quantiles").tobytes()
    assert trace_chart(many).tobytes() == trace_chart(many, view="quantiles").tobytes()


def test_the_median_is_drawn_and_not_the_mean():
    trace = constant(0.1, images=11)
    trace.posterior[:, :, 0] = 0.99
    rows = rows_of(trace_chart(trace), THEMES["light"].series[0], slice(150, 350))
    alone = rows_of(trace_chart(constant(0.1, images=11)), THEMES["light"].series[0], slice(150, 350))
    assert rows.max() == alone.max()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("axis", AXES)
def test_every_view_of_every_trace_is_drawn_and_the_same_each_time(axis, view, theme):
    for steps, concepts, images in ((1, 1, 1), (1, 2, 12), (7, 3, 2), (300, 1, 9)):
        trace = random_trace(steps, concepts, images)
        pictures = [trace_chart(trace, axis, view, theme, 320, 240) for _ in range(2)]
        assert pictures[0].size == (320, 240)
        assert pictures[0].tobytes() == pictures[1].tobytes()
        assert pictures[0].getpixel((1, 238)) == THEMES[theme].background


def test_without_a_trace_the_chart_says_so():
    empty = Trace(torch.zeros(0), torch.zeros(0, 1, 0), torch.zeros(0, 1, 0))
    assert trace_chart(None).tobytes() == trace_chart(empty).tobytes()
    assert len(trace_chart(None).getcolors(1 << 20) or []) > 1


def test_nan_is_refused():
    trace = constant(0.5)
    trace.posterior[3] = math.nan
    with pytest.raises(ValueError, match="posterior holds NaN"):
        trace_chart(trace)


def test_the_axis_of_sigma_and_log_snr_grows_as_noise_falls():
    sigmas = [10.0, 1.0, 0.5, 0.01]
    for axis in ("sigma", "log-SNR"):
        places = horizontal_axis(sigmas, axis, 8).places
        assert places == pytest.approx(-np.log(sigmas))
    assert dict((text, place) for place, text in horizontal_axis(sigmas, "sigma", 8).marks)["1"] == 0
    assert {text: 2 * place for place, text in horizontal_axis(sigmas, "log-SNR", 8).marks}["4"] == pytest.approx(4)
    assert list(horizontal_axis(sigmas, "step", 8).places) == [1, 2, 3, 4]


def test_levels_of_infinity_and_zero_lie_beyond_their_neighbours():
    places = horizontal_axis([math.inf, 10.0, 1.0, 0.0], "sigma", 8).places
    assert np.isfinite(places).all()
    assert (np.diff(places) > 0).all()
    assert np.isfinite(horizontal_axis([math.inf], "sigma", 8).places).all()


@example(-879609.9999999999, 1e-06, 7)  # a tick that rounding puts below the range
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 12))
def test_ticks_are_within_the_range_and_not_too_many(low, span, at_most):
    found = ticks(low, low + span, at_most)
    assert len(found) <= at_most
    assert all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) + abs(low) * 1e-9 for t in found)


@example(30.0, 1.001, 3)  # a span just below at_most powers of ten
@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e8), st.integers(3, 12))
def test_logarithmic_ticks_are_within_the_range_and_not_too_many(low, ratio, at_most):
    found = log_ticks(low, low * ratio, at_most)
    assert len(found) <= at_most
    assert all(low * 0.998 <= t <= low * ratio * 1.002 for t in found)
