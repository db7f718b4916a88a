"""The report: rows hold the measures, and its table and pictures hold the rows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dng_core.plots.class_pictures import COLOURS
from dng_core.plots.drawing import THEMES
from dng_core.studies.report.class_report import Report, bar_chart, contact_sheet, markdown_table, measure

NAMES = ("dark", "grey", "bright")


class ByBrightness(nn.Module):
    """A classifier that needs no training: dark, grey or bright."""

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean(dim=(1, 2, 3), keepdim=False)
        return -torch.stack([(level + 0.9).abs(), level.abs(), (level - 0.9).abs()], dim=1)


def flat(*levels: float) -> Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()


def two_rows() -> Report:
    baseline = flat(-0.9, -0.9, 0.0, 0.9)
    report = Report(NAMES, 0).with_row(*measure("none", baseline, ByBrightness(), NAMES, 0, baseline))
    return report.with_row(*measure("DNG", flat(-0.9, 0.0, 0.1, 0.9), ByBrightness(), NAMES, 0, baseline))


def test_row_by_hand():
    row = two_rows().rows[1]
    assert row.histogram == {"dark": 1, "grey": 2, "bright": 1}
    assert (row.images, row.forbidden_share, row.compared, row.kept) == (4, 0.25, 2, 1.0)
    assert math.isclose(row.kl, 0.5 * math.log(0.5 / 0.5) + 0.5 * math.log(0.5 / 0.25))
    assert math.isclose(row.rms_change or 0, math.sqrt(0.1**2 / 2), rel_tol=1e-6)


def test_without_a_baseline_nothing_is_said_of_change():
    row, _ = measure("DNG", flat(0.0), ByBrightness(), NAMES, 0)
    assert (row.kept, row.rms_change, row.compared) == (None, None, None)


def test_figures_are_json_even_if_every_image_is_forbidden():
    row, _ = measure("bad", flat(-0.9, -0.9), ByBrightness(), NAMES, 0, flat(-0.9, -0.9))
    assert (row.kl_renormalised, row.kept, row.rms_change) == (None, None, None)


def test_table_has_a_line_per_method():
    lines = markdown_table(two_rows()).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| none | 4 | 50.0%")
    assert lines[3].startswith("| DNG | 4 | 25.0%")
    assert len({line.count("|") for line in lines}) == 1


def test_sheet_frames_exactly_the_forbidden_images_in_red():
    report = two_rows()
    pixels = np.asarray(contact_sheet(report))
    per_frame = (56 + 6) ** 2 - 56**2
    assert (pixels == THEMES["light"].alarm).all(axis=2).sum() == per_frame * sum(
        sum(p.forbidden) for p in report.pictures
    )


def test_bars_stand_in_their_class_and_are_as_tall_as_its_share():
    picture = bar_chart(two_rows())
    for index, row in enumerate(two_rows().rows):
        columns = [0, 0, 0]
        for x in range(64, 940):
            columns[int((x - 64) / (940 - 64) * 3)] += sum(
                picture.getpixel((x, y)) == COLOURS[index] for y in range(84, 420)
            )
        shares = [n / sum(columns) for n in columns]
        assert shares == pytest.approx([n / row.images for n in row.histogram.values()], abs=0.02)


def test_a_chart_of_many_methods_has_a_bar_of_each_below_all_their_names():
    report = Report(NAMES, 0)
    for i in range(9):
        report = report.with_row(*measure(f"a method with a long name, {i}", flat(0.9), ByBrightness(), NAMES, 0))
    pixels = np.asarray(bar_chart(report))[:, 680:]  # the class that all images show
    coloured = (pixels[:, :, None] == np.array(COLOURS)).all(axis=3).any(axis=2)
    bars = np.flatnonzero(coloured[410])
    assert 1 + (np.diff(bars) > 1).sum() == 9
    top = np.flatnonzero(coloured[:, bars[len(bars) // 2]]).min()
    names = np.flatnonzero((pixels == THEMES["light"].ink).all(axis=2).any(axis=1))
    assert top > max(y for y in names if y < 300)
