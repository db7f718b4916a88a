"""What the cost figures compare: runs with the live chart and without it, and the import that ComfyUI's log tells."""

from typing import Any

from dng_core.experiments import cost_figures
from dng_core.headless.server import Server


def test_only_the_runs_with_the_chart_are_sent_one(comfyui_server: Server, monkeypatch: Any) -> None:
    monkeypatch.setattr(cost_figures, "STEPS", 4)
    without, with_chart = cost_figures.live_chart_figure(comfyui_server, 2, 1)
    assert without["charts sent"] == 0
    assert with_chart["charts sent"] >= 1
    assert min(row["seconds (median)"] for row in (without, with_chart)) > 0
    assert min(row["CPU seconds (fewest)"] for row in (without, with_chart)) > 0


def test_comfyuis_log_tells_how_long_the_pack_takes(comfyui_server: Server) -> None:
    assert any(map(cost_figures.IMPORT_SECONDS.search, comfyui_server.log_lines()))
