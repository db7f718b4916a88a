"""The comparison of images without and with guidance: its numbers, its order, and its difference map."""

import math

import numpy as np
import pytest
import torch

from dng_core.guidance import Trace
from dng_core.plots.comparison import chosen_images, comparison_sheet, comparison_table, rms_changes
from dng_core.plots.drawing import THEMES


def grey(*levels: float, side: int = 8) -> np.ndarray:
    return np.stack([np.full((side, side, 3), level, dtype=np.float32) for level in levels])


def trace_of(images: int, concepts: int = 1) -> Trace:
    posterior = torch.linspace(0.1, 0.9, images).expand(5, concepts, images).clone()
    return Trace(torch.logspace(1, -1, 5), posterior, 2 * posterior)


def test_the_rms_change_is_that_of_the_definition():
    after = grey(0.5, 0.5)
    after[1, :4] = 0.9  # half of the pixels by 0.4
    assert rms_changes(grey(0.5, 0.5), after) == pytest.approx([0, math.sqrt(0.08)])


def test_the_most_changed_come_first_and_equals_keep_their_order():
    changes = np.array([0.1, 0.3, 0.0, 0.3])
    assert chosen_images(changes, "most changed first", 3) == [1, 3, 0]
    assert chosen_images(changes, "as drawn", 3) == [0, 1, 2]


def test_the_table_has_a_row_for_each_image_and_one_for_all():
    lines = comparison_table(np.array([0.3, 0.4]), trace_of(2)).splitlines()
    assert lines[2:] == [
        "| 1 | 0.3000 | 0.1 | 0.2 |",
        "| 2 | 0.4000 | 0.9 | 1.8 |",
        f"| all | {math.sqrt(0.125):.4f} | 0.9 | 1.8 |",
    ]
    assert comparison_table(np.array([0.3]), None).splitlines()[2] == "| 1 | 0.3000 |"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_difference_map_is_the_ramps_ends_where_nothing_and_most_changed(theme):
    before, after = grey(0.2), grey(0.2)
    after[0, :, 4:] = 0.7
    pixels = np.asarray(comparison_sheet(before, after, cell=128, theme=theme))
    for colour in (THEMES[theme].ramp[0], THEMES[theme].ramp[-1]):
        assert (pixels == colour).all(axis=2).sum() >= 128 * 64


def test_unchanged_images_show_no_difference():
    same = grey(0.2, 0.8)
    pixels = np.asarray(comparison_sheet(same, same, cell=128))
    assert (pixels == THEMES["light"].ramp[0]).all(axis=2).sum() >= 2 * 128 * 128


@pytest.mark.parametrize(("width", "height"), [(28, 28), (1200, 800), (40, 300), (1, 1)])
def test_images_of_any_size_keep_their_shape_and_fit_their_cell(width, height):
    before = np.zeros((1, height, width, 3), dtype=np.float32)
    after = np.ones_like(before)
    pixels = np.asarray(comparison_sheet(before, after, cell=100))
    white = np.argwhere((pixels == THEMES["light"].ramp[-1]).all(axis=2))
    shown_height, shown_width = white.max(axis=0) - white.min(axis=0) + 1
    assert max(shown_width, shown_height) <= max(100, pixels.shape[0])
    black = (pixels == 0).all(axis=2).sum()
    factor = 100 // max(width, height) or 100 / max(width, height)
    assert black == round(width * factor) * round(height * factor)


@pytest.mark.parametrize("images", [1, 5, 64])
@pytest.mark.parametrize("concepts", [0, 1, 2])
def test_any_batch_is_drawn_and_the_same_each_time(images, concepts):
    before = np.random.default_rng(0).random((images, 8, 8, 3), dtype=np.float32)
    trace = trace_of(images, concepts) if concepts else None
    sheets = [comparison_sheet(before, 1 - before, trace, cell=64, at_most=9) for _ in range(2)]
    assert sheets[0].tobytes() == sheets[1].tobytes()
    width, height = sheets[0].size
    assert 0.5 < width / height < 4
