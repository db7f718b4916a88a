"""What the cost figures compare: runs with the live chart and without it, and the import that ComfyUI's log tells."""

import re
from typing import Any

import pytest

from dng_core.headless.figures import cost_figures
from dng_core.headless.server import Server


def test_only_the_runs_with_the_chart_are_sent_one(comfyui_server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(cost_figures, "STEPS", 4)
    without, with_chart = cost_figures.live_chart_figure(comfyui_server, 2, 1)
    assert without["in the chart"] == without["added, s"] == ""
    seconds, percent = map(float, re.fullmatch(r"([\d.]+) s \(([\d.]+) %\)", with_chart["in the chart"]).groups())
    assert 0 < seconds < with_chart["seconds (median)"]
    rounding = 0.5e-4  # both numbers are printed: seconds to four decimals, percent to two
    percent_of_run = 100 * seconds / with_chart["seconds (median)"]
    assert percent == pytest.approx(percent_of_run, abs=100 * rounding / with_chart["seconds (median)"] + 0.006)
    assert min(row["seconds (median)"] for row in (without, with_chart)) > 0


def test_comfyuis_log_tells_how_long_the_pack_takes(comfyui_server: Server) -> None:
    assert any(map(cost_figures.IMPORT_SECONDS.search, comfyui_server.log_lines()))


def test_what_is_added_is_the_mean_of_the_differences_with_students_interval() -> None:
    assert cost_figures._added([(11.0, 10.0), (13.0, 10.0), (12.0, 10.0)]) == "+2.000 ± 2.484 (+20.0 ± 24.8 %)"
