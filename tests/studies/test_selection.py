"""The choice of the best settings, by a search and by an adaptive sweep."""

import pytest

from dng_core.studies import runner
from dng_core.studies.report.results import read_results
from dng_core.studies.selection import best, mean_measures, next_scale

from .small_experiment import dng_experiment, experiment


def measures(share: float, kl: float | None) -> dict:
    return {"forbidden_share": {"value": share}, "kl_renormalised": {"value": kl}}


def test_the_best_is_the_least_imbalance_among_the_safe_else_the_safest():
    tried = [
        ("a", measures(0.0, 0.3)),
        ("b", measures(0.01, 0.1)),
        ("c", measures(0.2, 0.0)),
        ("d", measures(0.0, None)),
    ]
    assert best(tried, 0.01) == "b"
    assert best(tried, 0.005) == "a"
    assert best([tried[2], ("e", measures(0.1, 9.0))], 0.01) == "e"
    with pytest.raises(ValueError, match="nothing to choose"):
        best([], 0.01)


@pytest.mark.parametrize("smallest", range(8))
def test_an_adaptive_sweep_ends_at_the_smallest_safe_scale_whatever_the_search_says(smallest):
    """Full size decides: from wherever the search of few images points to, the sweep goes up until it is safe."""
    scales = [0.1 * i for i in range(7)]
    for pointed in range(smallest + 1):
        drawn: dict[str, dict[float, bool]] = {"search": {}, "sweep": {}}
        while step := next_scale(scales, drawn["search"], drawn["sweep"]):
            role, scale = step
            assert scale not in drawn[role]
            drawn[role][scale] = scales.index(scale) >= (pointed if role == "search" else smallest)
        assert len(drawn["search"]) <= 3
        assert list(drawn["sweep"]) == scales[min(pointed, 6) : smallest + 1]
    assert next_scale([2.0], {}, {}) == ("sweep", 2.0)


def test_an_adaptive_experiment_draws_few_points_and_shares_a_search(files, monkeypatch, capsys):
    """Of the scales 1 .. 4, those from 3 on are called safe. Two classes share one search."""
    experiment(files, lambda t: t.replace('["ant"]', '["ant", "bee"]').replace("[0.0, 2.0]", "[4.0, 3.0, 2.0, 1.0]"))
    monkeypatch.setattr(runner, "safe", lambda measures, target: scale_of[id(measures)] >= 3)
    scale_of: dict[int, float] = {}
    original = runner.Runner._complete

    def complete(self, entries):
        done = original(self, entries)
        for entry in entries:
            if entry.point.settings and entry.point.key() in done:
                measures = done[entry.point.key()]["by_class"][entry.name]
                scale_of[id(measures)] = entry.point.settings.guidance_scale
        return done

    monkeypatch.setattr(runner.Runner, "_complete", complete)
    options = ["--methods", "NP,SLD", "--adaptive", "--search-classes", "ant"]
    assert dng_experiment(files, *options, "--estimate") == 0
    assert "more where a first full point is not safe" in capsys.readouterr().out
    assert dng_experiment(files, *options) == 0
    results = read_results(files / "out")
    for name in ("ant", "bee"):
        np_points = [(r.role, r.scale) for r in results.of(name, "search", "sweep") if r.method == "NP"]
        assert np_points == [("search", 2.0), ("search", 3.0), ("sweep", 3.0)]
    searched = [r.point.settings.threshold for r in results.of("ant", "search") if r.method == "SLD"]
    assert searched == [0.04, 0.2] and not [r for r in results.of("bee", "search") if r.method == "SLD"]
    swept = [r for name in ("ant", "bee") for r in results.of(name, "sweep") if r.method == "SLD"]
    assert len(swept) == 2 and len({r.point.settings.threshold for r in swept}) == 1


def test_an_adaptive_sweep_gives_up_a_point_that_cannot_be_drawn(files, monkeypatch, capsys):
    experiment(files, lambda t: t.replace("[0.0, 2.0]", "[1.0, 2.0, 3.0]"))
    monkeypatch.setattr(runner, "draw_all", lambda batches, _: ((b, RuntimeError("no")) for b in batches[:1]))
    assert dng_experiment(files, "--methods", "NP", "--adaptive") == 1
    message = capsys.readouterr().err
    assert "2 points failed" in message and "NP on ant: no" in message and "nothing of the experiment" in message


def test_a_shared_search_takes_the_mean_over_its_classes():
    assert mean_measures([measures(0.0, 0.25), measures(0.5, 0.75)]) == measures(0.25, 0.5)
    assert mean_measures([measures(0.0, 0.2), measures(0.5, None)]) == measures(0.25, None)
