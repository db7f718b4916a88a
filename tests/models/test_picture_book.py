"""The picture book's scenes, captions and words, and the training of its model."""

import json
import re
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dng_core.models.mnist import to_model_range
from dng_core.models.picture_book import scenes
from dng_core.models.picture_book.drawing import DRAWN, draw
from dng_core.models.picture_book.judge import Judge, Verdict, judge_accuracy
from dng_core.models.picture_book.networks import CrossUNetConfig, PictureBook, fold, unfold
from dng_core.models.picture_book.pictures import page, pages
from dng_core.models.picture_book.scenes import (
    COLOURS,
    PLACES,
    THINGS,
    TIMES,
    Scene,
    Thing,
    caption,
    random_scene,
    share,
)
from dng_core.models.picture_book.training import TEXT, train_judge, train_picture_book
from dng_core.models.picture_book.weights import (
    JudgeInfo,
    PictureBookInfo,
    load_judge,
    load_picture_book,
    save_judge,
    save_picture_book,
)
from dng_core.models.picture_book.words import END, LENGTH, MOST_WORDS, START, WORDS, split, tokens
from dng_core.models.training_config import TrainingConfig

from .small_training import same
from .test_training import Stopped, stop_after

SMALL = CrossUNetConfig(model_channels=32, channel_mult=(1, 1), num_res_blocks=(0, 0), transformer_depth=(),
                        transformer_depth_output=(0, 0))  # fmt: skip
CONFIG = TrainingConfig(epochs=1.0, batch_size=4, checkpoint_every=2, warmup_steps=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [random_scene(np.random.default_rng((1, i))) for i in range(20_000)]


def test_a_number_names_a_page():
    first, again, other = page(3, 0), page(3, 0), page(3, 1)
    assert first[0] == again[0] and first[2] == again[2] and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])
    pictures, words, labels = pages([3], 0)
    assert np.array_equal(pictures[0].permute(1, 2, 0).numpy(), first[1])
    assert words[0].tolist() == tokens(split(first[2]))
    place, time, *there = labels[0].tolist()
    assert (PLACES[place], TIMES[time]) == (first[0].place, first[0].time)
    assert {name for name, is_there in zip(THINGS, there, strict=True) if is_there} == set(first[0].names)


def test_things_are_as_frequent_as_their_shares_say(many):
    """Within five standard errors, for every thing in every place at every time."""
    seen = Counter((scene.place, scene.time) for scene in many)
    shown = Counter((scene.place, scene.time, name) for scene in many for name in scene.names)
    for (place, time), count in seen.items():
        for name in THINGS:
            p = share(name, place, time)
            error = (p * (1 - p) / count) ** 0.5
            assert abs(shown[place, time, name] / count - p) <= 5 * error + 1e-9, (place, time, name)
    assert share("sun", "park", "night") == share("boat", "desert", "day") == 0


def test_at_most_three_things_share_sky_and_ground(many):
    for group in (scenes.SKY, scenes.GROUND):
        assert max(sum(name in group for name in scene.names) for scene in many) == 3


def test_captions_name_each_thing_as_often_as_said(many):
    generator = np.random.default_rng(0)
    there = named = coloured = could = empty = 0
    for scene in many:
        words = split(caption(scene, generator))
        empty += not words
        there += len(scene.things)
        named += sum(name in words for name in scene.names)
        for thing in scene.things:
            if thing.colour and thing.name in words:
                could += 1
                coloured += words[words.index(thing.name) - 1] == thing.colour
    mentioned = (1 - scenes.SAYS_NOTHING) * scenes.NAMES_THING
    assert named / there == pytest.approx(mentioned, abs=0.01)
    assert coloured / could == pytest.approx(scenes.NAMES_COLOUR, abs=0.02)
    assert scenes.SAYS_NOTHING < empty / len(many) < 0.1


def test_captions_say_nothing_that_is_not_there(many):
    generator = np.random.default_rng(1)
    for scene in many[:2000]:
        words = set(split(caption(scene, generator)))
        assert words & set(THINGS) <= set(scene.names)
        assert words & set(PLACES) <= {scene.place}
        assert words & set(TIMES) <= {scene.time}
        assert words & set(COLOURS) <= {thing.colour for thing in scene.things}


def test_the_longest_caption_fits():
    colours = [Thing(name, "red") for name in ("balloon", "house", "car", "tent")]
    scene = Scene("mountains", "evening", (*colours, Thing("sun"), Thing("bird"), Thing("rainbow")))
    said = [split(caption(scene, np.random.default_rng(i))) for i in range(3000)]
    assert max(map(len, said)) <= MOST_WORDS
    assert all(len(tokens(words)) == LENGTH for words in said)


def test_words_are_tokens_and_unknown_ones_are_named():
    assert split("A Park, by DAY: (red) ball!") == ["a", "park", "by", "day", "red", "ball"]
    found = tokens(["park", "tree"])
    assert found[0] == START and found[3] == END and len(set(WORDS)) == len(WORDS)
    with pytest.raises(ValueError, match=r"does not know 'dragon', 'purple'; it knows the words a, the.*park.*tent"):
        tokens(split("a dragon and a purple dragon in a park"))
    with pytest.raises(ValueError, match=f"has 31 words; the picture book reads at most {MOST_WORDS}"):
        tokens(["tree"] * 31)


@pytest.mark.parametrize("name", THINGS)
def test_every_thing_is_drawn_at_least_eight_pixels_wide_and_high(name):
    """The same scene with and without the thing, from the same generator: only the thing differs."""
    assert name == "rainbow" or name in DRAWN
    time = "night" if name == "moon" else "day"
    thing = Thing(name, "red" if name in scenes.COLOURED else "")
    with_it, without = (
        draw(Scene("park", time, things), np.random.default_rng(5)).astype(int) for things in ((thing,), ())
    )
    changed = np.abs(with_it - without).max(axis=2) > 40
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert np.ptp(rows) >= 8 and np.ptp(columns) >= 8


def test_folding_is_exact_and_undone():
    pictures = torch.randn(2, 3, 64, 64)
    assert fold(pictures).shape == (2, 48, 16, 16)
    assert torch.equal(unfold(fold(pictures)), pictures)


def test_a_resumed_training_has_the_weights_of_an_unbroken_one(tmp_path, monkeypatch):
    whole = train_picture_book(SMALL, CONFIG, tmp_path / "whole", CPU, epoch=24)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train_picture_book(SMALL, CONFIG, tmp_path / "broken", CPU, epoch=24)
    resumed = train_picture_book(SMALL, CONFIG, tmp_path / "broken", CPU, epoch=24)
    assert same(whole.state_dict, resumed.state_dict)
    assert (whole.loss, whole.steps) == (resumed.loss, 6)


def test_a_judge_learns_what_it_is_shown(tmp_path):
    """A few hundred scenes are enough to tell places better than by chance, and far better than before."""
    config = TrainingConfig(epochs=1.0, batch_size=16, learning_rate=5e-3, ema_decay=0.9, warmup_steps=5)
    result = train_judge(8, config, tmp_path / "judge", CPU, epoch=800)
    pictures, _, labels = pages(range(200), seed=7)
    accuracy = []
    for state in (Judge(8).state_dict(), result.state_dict):
        judge = Judge(8)
        judge.load_state_dict(state)
        accuracy.append(judge_accuracy(judge.eval(), to_model_range(pictures), labels))
    assert accuracy[1]["place"] > 0.6 > accuracy[0]["place"]
    assert accuracy[1].keys() == {"place", "time", *THINGS}


def test_a_verdict_is_asked_by_name():
    verdict = Verdict(torch.tensor([0, 2]), torch.tensor([2, 0]), torch.eye(2, len(THINGS)).bool())
    assert verdict.shows("sea").tolist() == [False, True]
    assert verdict.shows("night").tolist() == [True, False]
    assert verdict.shows(THINGS[1]).tolist() == [False, True]
    with pytest.raises(ValueError, match=r"'dragon' is none of park.*night.*tent"):
        verdict.shows("dragon")


def test_the_shipped_judge_is_right_on_scenes_that_it_never_saw():
    """On drawn scenes it errs on less than one picture in a hundred, for every label (0.2 % at most on 4,000)."""
    pictures, _, labels = pages(range(300), seed=99)
    accuracy = judge_accuracy(load_judge(), to_model_range(pictures), labels)
    assert min(accuracy.values()) > 0.99


def test_a_judge_of_other_things_is_refused(tmp_path):
    save_judge(tmp_path / "j.safetensors", Judge(4).state_dict(), JudgeInfo(4))
    assert same(
        load_judge(tmp_path / "j.safetensors").state_dict(), load_judge(tmp_path / "j.safetensors").state_dict()
    )
    save_judge(tmp_path / "j.safetensors", Judge(4).state_dict(), JudgeInfo(4, ("dragon",)))
    with pytest.raises(ValueError, match=r"tells other things than this version of DNG draws \(dragon\)"):
        load_judge(tmp_path / "j.safetensors")


def test_weights_come_back_as_they_were(tmp_path):
    model = PictureBook(TEXT, SMALL)
    save_picture_book(tmp_path / "w.safetensors", model.state_dict(), PictureBookInfo(TEXT, SMALL))
    loaded, info = load_picture_book(tmp_path / "w.safetensors")
    assert info == PictureBookInfo(TEXT, SMALL)
    assert same(loaded.state_dict(), model.state_dict())


def test_weights_with_other_words_are_refused(tmp_path):
    info = PictureBookInfo(TEXT, SMALL, words=("a", "dragon"))
    save_picture_book(tmp_path / "w.safetensors", PictureBook(TEXT, SMALL).state_dict(), info)
    with pytest.raises(ValueError, match=re.escape("other words than this version of DNG has (a, dragon)")):
        load_picture_book(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        ("text", {"heads": 3}, "width must be a multiple of heads, 3, not 128"),
        ("text", {"width": "a"}, "width must be a whole number from 1 to 4096, not 'a'"),
        ("text", {"layers": 10**9}, "layers must be a whole number from 1 to 64, not 1000000000"),
        ("text", {"words": 2}, f"words must be {len(WORDS) + 3}, not 2"),
        ("text", {"width": 64}, "context_dim must be 64, not 128"),
        ("unet", {"num_res_blocks": [10**9, 0]}, "num_res_blocks must be 2 whole numbers of at least 0 and together"),
        ("unet", {"num_res_blocks": [1, 0]}, r"transformer_depth must be 1 whole numbers .*not \(\)"),
        ("unet", {"transformer_depth_output": [0]}, r"transformer_depth_output must be 2 whole .*not \(0,\)"),
        ("unet", {"channel_mult": 3}, "channel_mult must be 1 to 16 whole numbers of at least 1 .*not 3"),
        ("unet", {"channel_mult": [1] * 17}, "channel_mult must be 1 to 16 whole numbers"),
        ("unet", {"transformer_depth_middle": 10**9}, "transformer_depth_middle must be .*, not 1000000000"),
        ("unet", {"model_channels": 33}, "model_channels must be a multiple of 32, not 33"),
        (
            "unet",
            {"num_head_channels": 48},
            r"num_head_channels must divide .* \(32\), not 48",
        ),
        ("unet", {"in_channels": 3}, "in_channels must be 48, not 3"),
        ("words", 3, "words must be a list of texts, not 3"),
        ("words", [1], r"words must be a list of texts, not \(1,\)"),
    ],
)
def test_a_picture_book_that_cannot_be_made_is_refused_by_file_and_value(tmp_path, part, change, told):
    info = json.loads(json.dumps(asdict(PictureBookInfo(TEXT, SMALL))))
    info[part] = info[part] | change if isinstance(change, dict) else change
    _described(tmp_path / "w.safetensors", "picture_book", info)
    with pytest.raises(ValueError, match=rf"w\.safetensors describes a network .*{told}"):
        load_picture_book(tmp_path / "w.safetensors")


def test_a_picture_book_as_large_as_a_file_may_describe_is_refused_without_memory_for_it(tmp_path):
    """Its first feed-forward layer alone would take terabytes."""
    unet = {"model_channels": 4096, "channel_mult": [64], "num_res_blocks": [1], "transformer_depth": [1]}
    info = json.loads(json.dumps(asdict(PictureBookInfo(TEXT, SMALL))))
    info["unet"] |= unet | {"transformer_depth_output": [1, 1]}
    _described(tmp_path / "w.safetensors", "picture_book", info)
    with pytest.raises(ValueError, match="don't fit their network"):
        load_picture_book(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": "a"}, "width must be a whole number from 1 to 1024, not 'a'"),
        ({"width": 10**9}, "width must be a whole number from 1 to 1024, not 1000000000"),
        ({"labels": [[]]}, r"labels must be a list of texts, not \(\[\],\)"),
    ],
)
def test_a_judge_that_cannot_be_made_is_refused_by_file_and_value(tmp_path, change, told):
    _described(tmp_path / "j.safetensors", "picture_book_judge", asdict(JudgeInfo(4)) | change)
    with pytest.raises(ValueError, match=rf"j\.safetensors describes a network .*{told}"):
        load_judge(tmp_path / "j.safetensors")


def _described(path, kind, info):
    """A weights file with this description, whose tensors are of no network."""
    save_file({"x": torch.zeros(1)}, path, metadata={"kind": kind, "info": json.dumps(info)})
