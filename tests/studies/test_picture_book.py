"""The picture book's studies: samplers, exact shares and the figure of unguided pictures, on random weights."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from dng_core.models.picture_book.judge import Verdict
from dng_core.models.picture_book.networks import CrossUNetConfig, PictureBook
from dng_core.models.picture_book.scenes import PLACES, THINGS, TIMES, caption, random_scene
from dng_core.models.picture_book.shares import shares_given
from dng_core.models.picture_book.training import TEXT
from dng_core.models.picture_book.weights import PictureBookInfo, save_picture_book
from dng_core.models.picture_book.words import split
from dng_core.oracle import GaussianMixture
from dng_core.sampling import ddpm_sample
from dng_core.schedules import karras_sigmas
from dng_core.studies.picture_book.figure import label_rows, picture_book_figure
from dng_core.studies.picture_book.sampling import SAMPLERS, sample

SMALL = CrossUNetConfig(model_channels=32, channel_mult=(1, 1), num_res_blocks=(0, 0), transformer_depth=(),
                        transformer_depth_output=(0, 0))  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("book") / "book.safetensors"
    save_picture_book(path, PictureBook(TEXT, SMALL).state_dict(), PictureBookInfo(TEXT, SMALL))
    return path


def test_exact_shares_are_those_of_scenes_with_such_captions():
    """Over 3,000 captions, each thing that is not named is there as often as expected, within five errors."""
    expected, variance, there = Counter(), Counter(), Counter()
    for i in range(3000):
        generator = np.random.default_rng((3, i))
        scene = random_scene(generator)
        said = split(caption(scene, generator))
        for name, p in shares_given(said).items():
            if name not in said:
                expected[name] += p
                variance[name] += p * (1 - p)
                there[name] += name in (*scene.names, scene.place, scene.time)
    assert set(expected) == {*PLACES, *TIMES, *THINGS}
    for name, mean in expected.items():
        assert abs(there[name] - mean) <= 5 * math.sqrt(variance[name]), name


def test_what_is_said_is_certain_and_what_cannot_be_is_refused():
    shares = shares_given(["park", "by", "day", "tree"])
    assert shares["park"] == shares["day"] == shares["tree"] == 1
    assert shares["moon"] == shares["whale"] == shares["sea"] == 0
    with pytest.raises(ValueError, match="no scene has a caption with the words boat, desert"):
        shares_given(["boat", "desert"])


def test_euler_ancestral_is_the_ancestral_chain():
    mixture, sigmas = GaussianMixture.random(3, (4,)), karras_sigmas(8, 0.1, 20.0)
    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    found = sample(mixture.denoised, noise, sigmas, "euler_ancestral", ours)
    wanted = ddpm_sample(lambda x, sigma: (mixture.denoised(x, sigma), []), noise, sigmas, generator=theirs)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_reach_the_mixture_and_second_order_is_nearer(sampler):
    """Shares of the components; deterministic samplers approach the run with many steps."""
    mixture = GaussianMixture.random(3, (8,))
    noise = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))

    def run(steps):
        return sample(
            mixture.denoised, noise, karras_sigmas(steps, 0.02, 40.0), sampler, torch.Generator().manual_seed(1)
        )

    drawn = run(40)
    shares = torch.bincount(mixture.classify(drawn), minlength=3) / len(drawn)
    torch.testing.assert_close(shares.double(), mixture.weights.double(), atol=0.05, rtol=0)
    assert mixture.distance(drawn).median() < 4
    if sampler == "dpmpp_2m":
        euler = sample(
            mixture.denoised, noise, karras_sigmas(40, 0.02, 40.0), "euler", torch.Generator().manual_seed(1)
        )
        fine = run(400)
        assert (drawn - fine).square().mean() < 0.5 * (euler - fine).square().mean()


def test_rows_count_what_was_asked_and_the_rest():
    things = torch.zeros(2, len(THINGS), dtype=torch.bool)
    things[0, THINGS.index("tree")] = True
    verdict = Verdict(torch.tensor([PLACES.index("park"), PLACES.index("sea")]), torch.tensor([0, 2]), things)
    rows = {row["of"]: row for row in label_rows(["a park by day with a tree", "a park with a tree"], verdict)}
    assert list(rows) == ["place", "time", "things", *THINGS]
    assert (rows["place"]["asked"], rows["place"]["shown, %"]) == (2, 50)
    assert (rows["time"]["asked"], rows["time"]["shown, %"]) == (1, 100)
    assert (rows["tree"]["asked"], rows["tree"]["shown, %"], rows["tree"]["not asked"]) == (2, 50, 0)
    flower = rows["flower"]
    assert flower["asked"] == 0 and flower["shown, %"] is None and flower["drawn, %"] == 0
    each = [shares_given(split(said))["flower"] for said in ("a park by day with a tree", "a park with a tree")]
    assert flower["expected, %"] == pytest.approx(50 * sum(each))


def test_the_figure_draws_and_judges(weights, tmp_path):
    rows = list(picture_book_figure(weights, tmp_path / "sheet.png", images=3, steps=2, seed=0))
    assert {row["cfg"] for row in rows} == {1.0, 3.0} and len(rows) == 2 * (3 + len(THINGS))
    assert all(0 <= row["expected, %"] <= 100 for row in rows if row["expected, %"] is not None)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000
