"""A ComfyUI with the nodes that only measuring needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dng_core.headless.locate import Location
from dng_core.headless.paths import BENCH_NODES
from dng_core.headless.server import Server, comfyui_server

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="package")
def bench_server(comfyui_location: Location) -> Iterator[Server]:
    """A real ComfyUI with the pack, and with the nodes of the benchmark."""
    with comfyui_server(comfyui_location, ROOT, further=[ROOT / BENCH_NODES]) as started:
        yield started
