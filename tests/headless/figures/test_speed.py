"""The speed of the nodes against the stock sampler: what runs, in which order, and what the ratios are of."""

from types import SimpleNamespace
from typing import Any

import pytest

from dng_core.headless.figures import speed_figures


def test_every_way_runs_in_every_turn_and_is_compared_with_the_stock_sampler_at_its_cfg(monkeypatch):
    ran: list[dict[str, Any]] = []

    def run(server: Any, prompt: dict[str, Any]) -> SimpleNamespace:
        sampler = prompt["sampler"]["inputs"]
        ran.append(sampler)
        own = 2 if sampler["cfg"] == 1 else 4
        spent = {"off": 1.5, "auto": 1.25}.get(sampler.get("settings.economy"), 1.0) * own
        table = {"predictions": [{"evaluated": 30 if sampler.get("settings.economy") == "off" else 10, "spared": 0}]}
        return SimpleNamespace(node_seconds={"sampler": spent}, ui={"table": table})

    monkeypatch.setattr(speed_figures, "run_workflow", run)
    rows = list(speed_figures.speed_figure(None, images=2, steps=30, repeats=3, seed=7))
    assert len(ran) == 4 * len(speed_figures.WAYS)
    assert [row["predictions an image"] for row in rows] == [30, 60, 40, 60, 90, 70]
    assert [row["seconds an image (median)"] for row in rows] == [1.0, 1.5, 1.25, 2.0, 3.0, 2.5]
    assert [row["against stock (median)"][:6] for row in rows] == ["", "1.50 x", "1.25 x", "", "1.50 x", "1.25 x"]
    turns = [{sampler["seed"] for sampler in ran[i : i + 6]} for i in range(0, len(ran), 6)]
    assert turns == [{7}, {8}, {9}, {10}]


@pytest.mark.parametrize(("count", "low", "high"), [(3, 0, 2), (6, 0, 5), (9, 1, 7), (20, 5, 14)])
def test_the_interval_is_that_of_the_median_by_the_order(count, low, high):
    """The ranks of the sign test at 5 %, from tables; below six turns the whole range stands there."""
    text = speed_figures._interval([float(i) for i in range(count)])
    assert text.endswith(f"({low:.2f} .. {high:.2f})")
