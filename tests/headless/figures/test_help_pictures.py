"""`dng figures help`: pictures stay small, rows of images lie where they should, and ComfyUI takes every prompt."""

import asyncio
import importlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dng_core.headless.figures import help_pictures

WORKFLOWS = Path(__file__).resolve().parents[3] / "workflows" / "api"


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def colours(png: bytes) -> int:
    return len(Image.open(io.BytesIO(png)).convert("RGB").getcolors())


def test_a_picture_is_kept_with_as_many_colours_as_fit():
    assert colours(help_pictures.compressed(noise(40, 100))) == 128
    content = help_pictures.compressed(noise(250, 400))
    assert len(content) <= help_pictures.LARGEST
    assert colours(content) < 128
    with pytest.raises(ValueError, match="800 x 400 pixels has more than 80000 bytes"):
        help_pictures.compressed(noise(400, 800))


def test_rows_of_images_keep_their_pixels():
    small = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    images = {"a": small, "b": [Image.new("RGB", (30, 40), "lime")]}
    picture = help_pictures._rows("")(images)
    gap, head = help_pictures.GAP, help_pictures.HEAD
    assert picture.size == (2 * 20 + 3 * gap, 2 * head + 10 + 40 + 3 * gap)
    assert picture.getpixel((gap, head)) == (255, 0, 0)
    assert picture.getpixel((2 * gap + 20, head)) == (0, 0, 255)
    assert picture.getpixel((gap + 29, 2 * head + 10 + gap + 39)) == (0, 255, 0)


def test_comfyui_takes_every_prompt(pack, comfyui, monkeypatch):
    """It knows each node and its inputs, and finds every needed wire."""
    execution, nodes = importlib.import_module("execution"), importlib.import_module("nodes")
    monkeypatch.setattr(nodes, "NODE_CLASS_MAPPINGS", dict(nodes.NODE_CLASS_MAPPINGS))
    asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    for node in importlib.import_module(f"{pack.__name__}.nodes").NODES:
        nodes.NODE_CLASS_MAPPINGS[node.define_schema().node_id] = node
    names = []
    for pictures, prompt, draws in help_pictures._pictures(WORKFLOWS):
        assert len(pictures) == len(draws)
        names += pictures
        valid, error, _, node_errors = asyncio.run(execution.validate_prompt("0", prompt, None))
        assert (valid, error, node_errors) == (True, None, {}), pictures
    assert len(names) == len(set(names)) == 11
