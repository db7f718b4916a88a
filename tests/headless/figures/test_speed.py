"""The speed of the nodes against a negative prompt: what runs and in which order, and what is left out."""

from types import SimpleNamespace
from typing import Any

import pytest

from dng_core.headless import memory
from dng_core.headless.errors import HeadlessError
from dng_core.headless.figures import speed_figures
from dng_core.headless.figures.speed_prompts import NEGATIVE_PROMPT, WAYS, Subject, subjects
from dng_core.headless.server import Server

NAMES = [way.name for way in WAYS]


class StandIn:
    """Answers prompts as ComfyUI would; ``broken`` names classes of nodes and what becomes of runs with them."""

    process = SimpleNamespace(pid=1)

    def __init__(self, **broken: str) -> None:
        self.broken, self.ran, self.resets = broken, list[dict[str, Any]](), 0

    def check_alive(self) -> None:
        """It lives."""

    def run(self, server: "StandIn", prompt: dict[str, Any]) -> SimpleNamespace:
        self.ran.append(prompt)
        used = {node["class_type"] for node in prompt.values()}
        fates = {self.broken[name] for name in used & self.broken.keys()}
        if "refused" in fates:
            raise HeadlessError("Node 3 failed.\n  | a traceback\nValueError: not this model", "a remedy")
        own = {"KSampler": 2.0, "KSamplerDNG": 3.0, "SamplerCustomAdvanced": 4.0}[prompt["sampler"]["class_type"]]
        effect = (prompt.get("nag") or prompt.get("guider") or {}).get("inputs", {})
        digest = "same" if "ignored" in fates else str(sorted(map(str, effect.items())))
        report = {"predictions": int(60 * own), "finite": "broken" not in fates, "digest": digest}
        return SimpleNamespace(node_seconds={"sampler": own}, ui={"report": {"bench": [report]}})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measure a case of the picture book with a stand-in for ComfyUI, two at once in three turns from seed 7."""

    def measure(server: StandIn) -> speed_figures.Speeds:
        monkeypatch.setattr(speed_figures, "run_workflow", server.run)
        monkeypatch.setattr(speed_figures, "begin_peak", lambda pid: server.ran.append({}))
        monkeypatch.setattr(speed_figures, "peak_bytes", lambda pid: len(server.ran) * 1_000_000)
        flower, _ = subjects("picture-book", 2)
        return speed_figures.measure_speeds(server, flower, images=2, steps=30, repeats=3, seed=7)  # type: ignore[arg-type]

    return measure


def test_every_way_runs_in_every_turn_and_is_compared_with_the_negative_prompt(measured):
    server = StandIn()
    speeds = measured(server)
    assert [row["node"] for row in speeds.rows] == NAMES and not speeds.left_out
    assert [row["predictions an image"] for row in speeds.rows] == [60, 90, 90, 60, 60, 90, 90, 120]
    assert [row["seconds an image (median)"] for row in speeds.rows] == [1.0, 1.5, 1.5, 1.0, 1.0, 1.5, 1.5, 2.0]
    ratios = [row["against a negative prompt (median)"][:6] for row in speeds.rows]
    assert ratios == ["1.00 x", "1.50 x", "1.50 x", "1.00 x", "", "1.50 x", "1.50 x", "2.00 x"]
    runs = [prompt for prompt in server.ran if prompt]
    assert len(server.ran) == 2 * len(runs)  # before every run the peak of the memory begins anew
    seeds = [{**prompt["sampler"]["inputs"], **prompt.get("noise", {}).get("inputs", {})} for prompt in runs]
    found = [options.get("seed", options.get("noise_seed")) for options in seeds]
    untimed = len(WAYS) + 2  # two ways run twice, to see whether they change anything
    assert found[:untimed] == [7] * untimed
    assert [set(found[i : i + 8]) for i in range(untimed, len(found), 8)] == [{8}, {9}, {10}]


def test_the_memory_is_the_median_of_the_peaks(measured):
    rows = measured(StandIn()).rows
    assert all(isinstance(row["peak memory, MB"], int) and 20 < row["peak memory, MB"] < 70 for row in rows)


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        ("refused", "Node 3 failed. ValueError: not this model"),
        ("ignored", "the model takes no notice of it"),
        ("broken", "it draws numbers that are not finite"),
    ],
)
def test_a_way_that_a_model_does_not_take_is_left_out_with_the_reason(measured, fate, reason):
    speeds = measured(StandIn(NAGuidance=fate))
    assert [row["node"] for row in speeds.rows] == [name for name in NAMES if not name.startswith("NAG")]
    assert speeds.left_out == [f"picture-book, avoid flower (related): NAG, then KSampler is left out: {reason}"]


def test_dng_and_the_stock_sampler_are_never_left_out(measured):
    with pytest.raises(HeadlessError, match="not this model"):
        measured(StandIn(KSamplerDNG="refused"))
    with pytest.raises(HeadlessError, match="KSampler, no negative draws numbers that are not finite"):
        measured(StandIn(KSampler="broken"))


@pytest.mark.parametrize(("count", "low", "high"), [(3, 0, 2), (6, 0, 5), (9, 1, 7), (20, 5, 14)])
def test_the_interval_is_that_of_the_median_by_the_order(count, low, high):
    """The ranks of the sign test at 5 %, from tables; below six turns the whole range stands there."""
    text = speed_figures._interval([float(i) for i in range(count)])
    assert text.endswith(f"({low:.2f} .. {high:.2f})")


def speeds(server: Server, subject: Subject) -> tuple[dict[tuple[str, float], float], speed_figures.Speeds]:
    """The predictions of each way in four steps, and all that was measured."""
    found = speed_figures.measure_speeds(server, subject, images=2, steps=4, repeats=2, seed=0)
    return {(row["node"], row["cfg"]): row["predictions an image"] for row in found.rows}, found


def test_comfyui_counts_the_predictions_of_every_way(bench_server):
    """One a step without a negative, two with one, three with Perp-Neg and with DNG beside guidance."""
    counts, found = speeds(bench_server, subjects("picture-book", 2)[0])
    assert found.left_out == []
    auto = {key: counts.pop(key) for key in list(counts) if "auto" in key[0]}
    assert list(counts.values()) == [4, 8, 8, 8, 12, 12]
    assert 4 < auto["KSampler (DNG), economy auto", 1.0] <= 8
    assert 8 < auto["KSampler (DNG), economy auto", NEGATIVE_PROMPT.cfg] <= 12
    assert all(row["seconds an image (median)"] > 0 for row in found.rows)
    assert all(row["peak memory, MB"] == "" or row["peak memory, MB"] > 100 for row in found.rows)


def test_the_digits_take_neither_nag_nor_perp_neg(bench_server):
    """Their network has none of ComfyUI's attention, and without a prompt Perp-Neg has no direction."""
    _, found = speeds(bench_server, subjects("mnist", 2)[0])
    assert [why.split(" is left out: ")[1] for why in found.left_out] == [
        "the model takes no notice of it",
        "there is no prompt, across whose direction it pushes",
    ]


def test_the_peak_of_the_memory_begins_anew(bench_server):
    if memory.peak_bytes(bench_server.process.pid) is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    (digits,) = subjects("mnist", 512)
    speed_figures._run(bench_server, speed_figures.speed_prompt(digits, WAYS[0], speed_figures.Sampling(1, 1)))
    large = memory.peak_bytes(bench_server.process.pid)
    memory.begin_peak(bench_server.process.pid)
    assert memory.peak_bytes(bench_server.process.pid) < large
    assert memory.peak_bytes(2**31 - 1) is None  # no such process
    memory.begin_peak(2**31 - 1)
