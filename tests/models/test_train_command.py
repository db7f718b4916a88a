"""`dng train`: what it trains and records, and what it says of bad data, options, plans and disks."""

import argparse
import gzip
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from dng_core.cli import train as train_command
from dng_core.models import training
from dng_core.models.networks import UNet
from dng_core.models.picture_book.weights import load_judge, load_picture_book
from dng_core.models.training_plan import PLAN_FILES, read_plan
from dng_core.models.weight_files import DenoiserInfo, load_classifier, load_denoiser, save_denoiser

from .small_training import NETWORK, same


def dng_train(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    train_command.add_arguments(parser)
    return train_command.run(parser.parse_args([str(a) for a in arguments]))


def test_command_trains_a_denoiser_and_writes_a_record(mnist_like, tmp_path, capsys):
    output = tmp_path / "out"
    options = ("--epochs", 1, "--batch-size", 32, "--device", "cpu")
    assert dng_train("denoiser", "--data", mnist_like, "--output", output, *options) == 0
    model, info = load_denoiser(output / "mnist_denoiser.safetensors")
    assert info.class_names == tuple("0123456789")
    assert model(torch.zeros(1, 1, 28, 28), torch.tensor([5]), torch.tensor([10])).shape == (1, 1, 28, 28)
    printed = capsys.readouterr()
    assert "precision float32: this processor has neither" in printed.out or "precision bfloat16" in printed.out
    assert "/64 [" in printed.err and "image" in printed.err  # the progress in images
    record = json.loads((output / "mnist_denoiser.json").read_text())
    assert record["steps"] == 2
    assert record["sha256"] == hashlib.sha256((output / "mnist_denoiser.safetensors").read_bytes()).hexdigest()
    assert "dng train denoiser" in record["command"]
    assert "--epochs 1 --batch-size 32 --learning-rate 0.0008 --seed 0" in record["command"]


def test_the_record_of_a_training_by_minutes_names_them_and_no_epochs(mnist_like, tmp_path):
    options = ("--minutes", 0.001, "--batch-size", 32, "--device", "cpu")
    assert dng_train("denoiser", "--data", mnist_like, "--output", tmp_path, *options) == 0
    command = json.loads((tmp_path / "mnist_denoiser.json").read_text())["command"]
    assert "--minutes 0.001" in command
    assert "--epochs" not in command


def test_training_can_go_on_from_weights(mnist_like, tmp_path, monkeypatch):
    """With a learning rate too small to move them, the weights started from come out again; the record names them."""
    first, second = tmp_path / "first", tmp_path / "second"
    options = ("--data", mnist_like, "--epochs", 1, "--batch-size", 32, "--device", "cpu")
    assert dng_train("classifier", *options, "--output", first) == 0
    start = first / "mnist_classifier.safetensors"
    options = (*options, "--learning-rate", 1e-30, "--start-from", start)
    assert dng_train("classifier", *options, "--output", second) == 0
    before, _ = load_classifier(start)
    after, _ = load_classifier(second / "mnist_classifier.safetensors")
    weights = {k: v for k, v in before.state_dict().items() if "running" not in k and "num_batches" not in k}
    assert same(weights, {k: after.state_dict()[k] for k in weights})
    record = json.loads((second / "mnist_classifier.json").read_text())
    assert f"--start-from {start}" in record["command"]
    assert record["started_from"] == json.loads((first / "mnist_classifier.json").read_text())


def test_a_v_network_can_go_on_from_an_epsilon_one(mnist_like, tmp_path, capsys):
    options = ("denoiser", "--data", mnist_like, "--epochs", 1, "--batch-size", 64)
    assert dng_train(*options, "--prediction", "epsilon", "--output", tmp_path / "first") == 0
    start = tmp_path / "first" / "mnist_denoiser.safetensors"
    assert load_denoiser(start)[1].network.prediction == "epsilon"
    assert dng_train(*options, "--output", tmp_path / "second", "--start-from", start, "--numbers", "float16") == 0
    assert "predicts epsilon; from here on it is trained to predict v" in capsys.readouterr().out
    weights = tmp_path / "second" / "mnist_denoiser.safetensors"
    assert load_denoiser(weights)[1].network.prediction == "v"
    assert weights.stat().st_size < 0.6 * start.stat().st_size


def test_threads_are_recorded(mnist_like, tmp_path, capsys):
    before = torch.get_num_threads()
    options = ("classifier", "--data", mnist_like, "--epochs", 1, "--batch-size", 64, "--output", tmp_path / "out")
    try:
        assert dng_train(*options, "--threads", 0) == 1
        assert "--threads must be 1 or more, not 0" in capsys.readouterr().err
        assert dng_train(*options, "--threads", before + 1) == 0
    finally:
        torch.set_num_threads(before)
    record = json.loads((tmp_path / "out" / "mnist_classifier.json").read_text())
    assert record["threads"] == before + 1
    assert f"--threads {before + 1}" in record["command"]
    assert "--timesteps" not in record["command"]


def test_settings_of_a_denoiser_are_refused_for_a_classifier(mnist_like, tmp_path, capsys):
    options = ("--data", mnist_like, "--output", tmp_path / "out", "--timesteps", "uniform")
    assert dng_train("classifier", *options) == 1
    assert "timesteps: these are settings of a denoiser" in capsys.readouterr().err


def test_too_little_memory_is_a_message(mnist_like, tmp_path, capsys, monkeypatch):
    def none_left(*args: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(train_command, "train_classifier", none_left)
    assert dng_train("classifier", "--data", mnist_like, "--output", tmp_path / "out") == 1
    assert "give a smaller --batch-size" in capsys.readouterr().err


def test_a_full_disk_keeps_the_checkpoint_and_leaves_no_half_file(mnist_like, tmp_path, disk_full_after, capsys):
    """At first there is space for the checkpoint only. With more space, the same command goes on from there."""
    command = ("classifier", "--data", mnist_like, "--output", tmp_path / "out", "--epochs", 1, "--batch-size", 32)
    with disk_full_after(1):
        assert dng_train(*command) == 1
    assert "free some space and give the command again" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mnist_classifier.checkpoint"]
    assert dng_train(*command) == 0
    load_classifier(tmp_path / "out" / "mnist_classifier.safetensors")


def test_weights_of_another_network_are_no_start(mnist_like, tmp_path, capsys):
    info = DenoiserInfo("small", NETWORK, "linear", (-1.0, 1.0), ("a", "b", "c"))
    save_denoiser(tmp_path / "small.safetensors", UNet(NETWORK).state_dict(), info)
    options = ("--data", mnist_like, "--output", tmp_path / "out", "--start-from", tmp_path / "small.safetensors")
    assert dng_train("denoiser", *options) == 1
    assert "holds another network" in capsys.readouterr().err


def test_a_wider_network_takes_what_fits_and_draws_the_rest_from_the_seed(tmp_path, capsys):
    """With a learning rate too small to move anything, so that the weights are those of the start."""
    plan = tmp_path / "book.toml"
    text = 'model = "text_to_image"\ndataset = "scenes"\n[network]\nchannel_mult = {}\n[training]\nepochs = 0.00008\n'
    plan.write_text(text.format([1, 2]) + "batch_size = 4\nlearning_rate = 1e-30\n")
    assert dng_train(plan, "--output", tmp_path / "narrow") == 0
    plan.write_text(plan.read_text().replace("[1, 2]", "[2, 2]"))
    start = tmp_path / "narrow" / "book.safetensors"
    assert dng_train(plan, "--output", tmp_path / "wide", "--start-from", start) == 0
    assert "a network of another shape: 13 of 214 tensors" in capsys.readouterr().out
    assert dng_train(plan, "--output", tmp_path / "again", "--start-from", start) == 0
    narrow, wide, again = (
        load_picture_book(tmp_path / name / "book.safetensors")[0].state_dict() for name in ("narrow", "wide", "again")
    )
    assert same(wide, again)
    fitting = {name: value for name, value in narrow.items() if name in wide and value.shape == wide[name].shape}
    assert all(torch.allclose(value, wide[name], atol=1e-20) for name, value in fitting.items())
    assert wide["unet.out.2.weight"].shape[1] == 2 * narrow["unet.out.2.weight"].shape[1]


def test_a_deeper_network_takes_each_level_by_its_resolution(mnist_like, tmp_path, capsys):
    """The finest level's way up is block 1 of two and block 2 of three. The learning rate moves none of them."""
    plan = tmp_path / "deep.toml"
    text = (
        'model = "denoiser"\ndataset = "mnist"\n[network]\nbase_channels = 32\nblocks_per_level = 1\npatch_size = 2\n'
    )
    levels = "channel_multipliers = {}\nattention_levels = []\n[training]\nepochs = 1\nlearning_rate = 1e-30\n"
    options = ("--data", mnist_like, "--batch-size", 64)
    weights = {}
    for folder, multipliers, start in (("flat", [1, 1], ()), ("deep", [1, 1, 2], ("--start-from", "flat"))):
        plan.write_text(text + levels.format(multipliers))
        start = (start[0], tmp_path / start[1] / "deep.safetensors") if start else ()
        assert dng_train(plan, *options, "--output", tmp_path / folder, *start) == 0
        weights[folder] = load_denoiser(tmp_path / folder / "deep.safetensors")[0].state_dict()
    assert "of a network of another shape" in capsys.readouterr().out
    finest = [name for name in weights["flat"] if name.startswith(("down_blocks.0.", "up_blocks.1."))]
    assert len(finest) > 20
    for name in finest:
        there = name.replace("up_blocks.1.", "up_blocks.2.")
        assert torch.allclose(weights["flat"][name], weights["deep"][there], atol=1e-20), name


def test_command_trains_a_classifier_and_records_its_accuracy(mnist_like, tmp_path):
    output = tmp_path / "out"
    assert dng_train("classifier", "--data", mnist_like, "--output", output, "--epochs", 1, "--device", "cpu") == 1
    options = ("--epochs", 1, "--batch-size", 32, "--device", "cpu")
    assert dng_train("classifier", "--data", mnist_like, "--output", output, *options) == 0
    model, info = load_classifier(output / "mnist_classifier.safetensors")
    assert model(torch.zeros(2, info.in_channels, info.image_size, info.image_size)).shape == (2, 10)
    assert 0 <= json.loads((output / "mnist_classifier.json").read_text())["test_accuracy"] <= 1


def test_command_says_what_is_wrong_with_the_data(tmp_path, capsys):
    assert dng_train("denoiser", "--data", tmp_path, "--output", tmp_path / "out") == 1
    assert "IDX files" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_data_is_refused(mnist_like, tmp_path, capsys):
    (mnist_like / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    assert dng_train("denoiser", "--data", mnist_like, "--output", tmp_path / "out") == 1
    assert "not MNIST's" in capsys.readouterr().err


PLAN = """
model = "{model}"
dataset = "folder"
{more}
[network]
{network}
[training]
epochs = 1.0
batch_size = 4
"""
SMALL = "base_channels = 32\nchannel_multipliers = [1]\nblocks_per_level = 1\nattention_levels = []"


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Two classes of 8x8 images, training and test."""
    generator = torch.Generator().manual_seed(3)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = torch.randint(0, 256, (8, 8, 3), generator=generator).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def test_accuracy_is_that_of_the_test_split_where_there_is_one(image_folder, tmp_path, capsys):
    path = plan(tmp_path, "pets", "classifier", network="width = 4")
    for folder, measured in ((image_folder, "test"), (image_folder / "train", "training")):
        output = tmp_path / measured
        assert dng_train(path, "--data", folder, "--output", output, "--device", "cpu") == 0
        assert f"{measured}_accuracy" in json.loads((output / "pets.json").read_text())
    (image_folder / "test" / "bee").rename(image_folder / "test" / "wasp")
    assert dng_train(path, "--data", image_folder, "--output", tmp_path / "none", "--device", "cpu") == 1
    assert "the classes of train (ant, bee) are not those of test (ant, wasp)" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def plan(folder: Path, name: str, model: str, more: str = "", network: str = SMALL) -> Path:
    path = folder / f"{name}.toml"
    path.write_text(PLAN.format(model=model, more=more, network=network))
    return path


@pytest.mark.parametrize(
    ("more", "classes", "images"),
    [
        ("", ("ant", "bee"), 12),
        ('labels = "none"', (), 12),
        ('labels = "none"\nonly = "bee"', (), 6),
    ],
    ids=["label-conditional", "unconditional", "class-only"],
)
def test_a_plan_trains_every_kind_of_denoiser(image_folder, tmp_path, more, classes, images):
    path = plan(tmp_path, "try", "denoiser", more)
    output = tmp_path / "out"
    assert dng_train(path, "--data", image_folder, "--output", output, "--device", "cpu") == 0
    model, info = load_denoiser(output / "try.safetensors")
    assert info.class_names == classes and model.config.num_classes == len(classes)
    assert model(torch.zeros(1, 3, 8, 8), torch.tensor([5])).shape == (1, 3, 8, 8)
    assert json.loads((output / "try.json").read_text())["data"]["images"] == images


def test_a_plan_trains_a_classifier_in_mixed_precision(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_cpu_bfloat16", lambda: ["amx_bf16"])
    path = plan(tmp_path, "bugs_classifier", "classifier", network="width = 4")
    output = tmp_path / "out"
    options = ("--data", image_folder, "--output", output, "--device", "cpu", "--precision", "bfloat16")
    assert dng_train(path, *options) == 0
    model, info = load_classifier(output / "bugs_classifier.safetensors")
    assert (info.width, info.in_channels, info.image_size, info.class_names) == (4, 3, 8, ("ant", "bee"))
    assert all(v.dtype == torch.float32 for v in model.state_dict().values() if v.is_floating_point())
    assert "--precision bfloat16" in json.loads((output / "bugs_classifier.json").read_text())["command"]


def test_a_disk_that_fills_up_during_training_costs_no_more_than_since_the_last_checkpoint(
    image_folder, tmp_path, disk_full_after, capsys
):
    path = plan(tmp_path, "try", "denoiser")
    options = ["--data", image_folder, "--checkpoint-every", 1, "--device", "cpu"]
    with disk_full_after(2):
        assert dng_train(path, *options, "--output", tmp_path / "full") == 1
    assert "What the last checkpoint holds is kept" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["try.checkpoint"]
    for output in ("full", "whole"):
        assert dng_train(path, *options, "--output", tmp_path / output) == 0
    full, whole = (load_denoiser(tmp_path / output / "try.safetensors")[0] for output in ("full", "whole"))
    assert same(full.state_dict(), whole.state_dict())


def test_a_killed_training_goes_on_with_the_same_weights(image_folder, tmp_path):
    """The run writes a checkpoint at each step, and SIGKILL comes at any moment.

    In float32: in bfloat16, on a processor with AMX, the two differed by rounding in one of five runs.
    """
    path = plan(tmp_path, "try", "denoiser")
    options = ["--data", image_folder, "--epochs", 20, "--checkpoint-every", 1, "--threads", 1, "--device", "cpu"]
    options += ["--precision", "float32"]
    command = [sys.executable, "-m", "dng_core", "train", path, *options, "--output", tmp_path / "killed"]
    process = subprocess.Popen([str(a) for a in command], cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "try.checkpoint"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.exists() and not checkpoint.with_suffix(".safetensors").exists()
    threads = torch.get_num_threads()
    try:
        for output in ("killed", "whole"):
            assert dng_train(path, *options, "--output", tmp_path / output) == 0
    finally:
        torch.set_num_threads(threads)
    killed, whole = (load_denoiser(tmp_path / output / "try.safetensors")[0] for output in ("killed", "whole"))
    assert same(killed.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("model", "more", "network", "message"),
    [
        ("denoiser", 'labels = "none"\nonly = "wasp"', SMALL, "class 'wasp' is not one of the data set's: ant, bee"),
        ("denoiser", 'only = "ant"', SMALL, "is for a denoiser with labels"),
        ("painter", "", SMALL, "model must be one of denoiser, classifier"),
        ("denoiser", "epoch = 3", SMALL, "unknown: epoch"),
        ("denoiser", "", "channels = 3", "unknown channels"),
        ("denoiser", 'labels = "some"', SMALL, "labels must be one of"),
        ("denoiser", "name = 3", SMALL, "name must be a text"),
    ],
)
def test_bad_plans_are_refused(image_folder, tmp_path, capsys, model, more, network, message):
    path = plan(tmp_path, "try", model, more, network)
    assert dng_train(path, "--data", image_folder, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["seed = 1.5", "batch_size = 2.5", "warmup_steps = 0.5", "checkpoint_every = 1.5"])
def test_a_fraction_is_not_taken_for_a_whole_number(tmp_path, line):
    path = tmp_path / "try.toml"
    path.write_text(f'model = "classifier"\n[training]\n{line}\n')
    with pytest.raises(ValueError, match=rf"try\.toml: {line.split()[0]} must be a whole number"):
        read_plan(str(path))


SCENES_PLAN = """
model = "text_to_image"
dataset = "scenes"
[network]
model_channels = 32
channel_mult = [1]
num_res_blocks = [0]
transformer_depth = []
transformer_depth_output = [0]
[training]
epochs = 0.00008
batch_size = 4
"""


def test_a_picture_book_is_trained_without_data(tmp_path, capsys):
    path = tmp_path / "book.toml"
    path.write_text(SCENES_PLAN)
    options = ("--output", tmp_path / "out", "--numbers", "float16", "--null-label-share", 0.2)
    assert dng_train(path, *options) == 0
    _, info = load_picture_book(tmp_path / "out" / "book.safetensors")
    assert info.unet.model_channels == 32
    record = json.loads((tmp_path / "out" / "book.json").read_text())
    assert record["data"] == {"name": "scenes", "images": 8}
    assert "--data" not in record["command"] and "--null-label-share 0.2" in record["command"]
    assert dng_train(path, *options, "--data", tmp_path) == 1
    assert "draws its own scenes: leave out --data" in capsys.readouterr().err


def test_a_judge_is_trained_and_tested_on_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(train_command, "TEST_SCENES", 20)
    path = tmp_path / "judge.toml"
    path.write_text('model = "judge"\ndataset = "scenes"\n[network]\nwidth = 4\n[training]\nepochs = 0.00032')
    assert dng_train(path, "--batch-size", 16, "--output", tmp_path / "out") == 0
    assert load_judge(tmp_path / "out" / "judge.safetensors").width == 4
    record = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert record["data"] == {"name": "scenes", "images": 32}
    assert {"accuracy_place", "accuracy_time", "accuracy_cat"} <= record.keys()
    assert "--timesteps" not in record["command"]


def test_other_plans_need_data(tmp_path, capsys):
    assert dng_train("classifier", "--output", tmp_path / "out") == 1
    assert "trains on mnist: give its folder as --data" in capsys.readouterr().err


@pytest.mark.parametrize(("dataset", "model"), [("scenes", "denoiser"), ("mnist", "text_to_image")])
def test_scenes_are_for_text_to_image_models(tmp_path, capsys, dataset, model):
    path = tmp_path / "book.toml"
    path.write_text(f'model = "{model}"\ndataset = "{dataset}"')
    assert dng_train(path, "--output", tmp_path / "out") == 1
    assert "dataset must be one of" in capsys.readouterr().err


def test_an_unknown_plan_says_what_there_is(tmp_path, capsys):
    assert dng_train("painter", "--data", tmp_path, "--output", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "give one of denoiser, classifier, picture_book, picture_book_judge, cifar10_classifier, " in said
    assert "cifar10_denoiser, or a TOML file" in said


@pytest.mark.parametrize("name", sorted(path.stem for path in PLAN_FILES.glob("*.toml")))
def test_shipped_plans_are_valid(name):
    assert read_plan(name).name == name
