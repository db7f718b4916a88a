"""Plot Trace and Compare on runs of the oracle: what comes out of the wires, and what is refused."""

import importlib
from typing import Any

import pytest
import torch


@pytest.fixture
def nodes(bench: Any, pack: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The classes of plot.py and compare.py; their previews go to a folder of the test's own."""
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    plot, compare = (importlib.import_module(f"{pack.__name__}.nodes.{name}") for name in ("plot", "compare"))
    return plot.PlotTrace, compare.Compare


def images(count: int, height: int = 8, width: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(0))


def test_a_run_becomes_a_chart_that_the_node_shows(bench, nodes, tmp_path):
    plot, _ = nodes
    _, trace = bench.dng(bench.model(), latent=bench.latent(4))
    output = plot.execute(trace, "step", "auto", "light", 400, 300)
    (image,) = output.args
    assert image.shape == (1, 300, 400, 3)
    assert float(image.min()) < 0.3 and float(image.max()) == 1
    (shown,) = output.ui.as_dict()["images"]
    assert (tmp_path / shown["filename"]).is_file()


@pytest.mark.parametrize(
    ("changes", "name"), [({"theme": "sepia"}, "theme"), ({"height": -7}, "height"), ({"width": 9000}, "width")]
)
def test_a_chart_that_cannot_be_drawn_is_refused_by_its_input(nodes, changes, name):
    plot, _ = nodes
    given = {"axis": "step", "view": "auto", "theme": "dark", "width": 400, "height": 300}
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        plot.execute(None, **given | changes)


def test_a_run_with_guidance_off_becomes_a_chart_that_says_so(bench, nodes):
    plot, _ = nodes
    _, trace = bench.dng(bench.model(), bench.concept(guidance_scale=0.0))
    assert plot.execute(trace, "step", "auto", "dark", 400, 300).args[0].shape == (1, 300, 400, 3)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_any_batch_is_compared_with_and_without_a_trace(bench, nodes, count):
    _, compare = nodes
    _, trace = bench.dng(bench.model(), latent=bench.latent(count))
    before, after = images(count), images(count).flip(1)
    with_trace, table = compare.execute(before, after, "light", trace).args
    without_trace, _ = compare.execute(before, after, "light").args
    assert with_trace.numel() > without_trace.numel()
    assert len(table.splitlines()) == count + 3


def test_the_alpha_channel_does_not_count(nodes):
    _, compare = nodes
    before = images(1, channels=4)
    after = before.clone()
    after[..., 3] = 0
    assert compare.execute(before, after, "light").args[1].splitlines()[2] == "| 1 | 0.0000 |"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (images(2, 8, 16), images(2, 8, 8), r"`without` is 16x8 but `with_dng` 8x8"),
        (images(2), images(3), r"`without` holds 2 images but `with_dng` 3"),
    ],
)
def test_images_that_do_not_match_are_refused(nodes, before, after, message):
    _, compare = nodes
    with pytest.raises(ValueError, match=message):
        compare.execute(before, after, "light")


@pytest.mark.parametrize("which", ["without", "with_dng"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((2, 8, 8, 3), torch.nan), "holds NaN or infinite"),
        (torch.zeros(0, 8, 8, 3), "is empty"),
        (torch.zeros(2, 8, 8, 1), "not a batch of images in colour"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_its_name(nodes, which, bad, message):
    _, compare = nodes
    with pytest.raises(ValueError, match=rf"`{which}` .*{message}"):
        compare.execute(**{"without": images(2), "with_dng": images(2), "theme": "light"} | {which: bad})


def test_a_sheet_that_would_fill_the_memory_is_refused_before_it_is_drawn(nodes, monkeypatch):
    """The largest values of both inputs would ask for 50 GB."""
    _, compare = nodes
    drawn: list[Any] = []
    drawing = importlib.import_module(compare.__module__.replace("nodes.compare", "dng_core.plots.comparison"))
    monkeypatch.setattr(drawing, "Drawing", lambda *size: drawn.append(size))
    with pytest.raises(ValueError, match=r"256 images at `image_size` 2048 .*lower `image_size` or `at_most`"):
        compare.execute(images(256), images(256), "light", at_most=256, image_size=2048)
    assert not drawn


def test_the_trace_of_another_batch_is_refused(bench, nodes):
    _, compare = nodes
    _, trace = bench.dng(bench.model(), latent=bench.latent(2))
    with pytest.raises(ValueError, match=r"`trace` is that of 2 images but `with_dng` holds 3"):
        compare.execute(images(3), images(3), "light", trace)
