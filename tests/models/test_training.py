"""Training: a seed gives the same weights, stopped and resumed or not; bad checkpoints and options are refused."""

import argparse
import gzip
import hashlib
import json
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from dng_core.cli import train as train_command
from dng_core.models import mnist, training
from dng_core.models.networks import UNet, UNetConfig
from dng_core.models.predictors import denoised
from dng_core.models.training import TrainingConfig, chosen_precision, train_classifier, train_denoiser
from dng_core.models.training_plan import PLAN_FILES, read_plan
from dng_core.models.weight_files import DenoiserInfo, load_classifier, load_denoiser, save_denoiser
from dng_core.schedules import DDPMSchedule

CPU = torch.device("cpu")
NETWORK = UNetConfig(8, 1, 32, channel_multipliers=(1,), blocks_per_level=1, attention_levels=(), num_classes=3)
CONFIG = TrainingConfig(epochs=3.0, batch_size=4, checkpoint_every=2)  # 12 steps on 16 images
CONSTANT = replace(CONFIG, schedule="constant", warmup_steps=2, decay_share=0.5)  # falls from step 6 on


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(16) % 3


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Let training write so many checkpoints, then break off."""
    original, done = training._save_checkpoint, []

    def save(*args: object) -> None:
        original(*args)
        done.append(args)
        if len(done) == saves:
            raise Stopped

    monkeypatch.setattr(training, "_save_checkpoint", save)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resumed_denoiser_has_the_weights_of_an_unbroken_run(tmp_path, images, labels, monkeypatch):
    whole = train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "whole", CPU)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "broken", CPU)
    resumed = train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "broken", CPU)
    assert same(whole.state_dict, resumed.state_dict)
    assert (whole.loss, whole.steps) == (resumed.loss, 12)


def test_resumed_classifier_has_the_weights_of_an_unbroken_run(tmp_path, images, labels, monkeypatch):
    whole = train_classifier(images, labels, 3, CONFIG, tmp_path / "whole", CPU)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            train_classifier(images, labels, 3, CONFIG, tmp_path / "broken", CPU)
    assert same(whole.state_dict, train_classifier(images, labels, 3, CONFIG, tmp_path / "broken", CPU).state_dict)


def test_a_finished_checkpoint_only_gives_its_weights(tmp_path, images, labels, monkeypatch):
    first = train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "checkpoint", CPU)
    monkeypatch.setattr(training, "_save_checkpoint", lambda *args: pytest.fail("trained on"))
    again = train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "checkpoint", CPU)
    assert same(first.state_dict, again.state_dict)
    assert again.loss == first.loss
    assert again.seconds == pytest.approx(first.seconds, abs=0.1)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path, images, labels):
    train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "checkpoint", CPU)
    with pytest.raises(ValueError, match="other settings"):
        train_denoiser(images, labels, NETWORK, replace(CONFIG, seed=1), tmp_path / "checkpoint", CPU)


def test_a_checkpoint_of_other_data_is_refused(tmp_path, images, labels):
    train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "checkpoint", CPU)
    with pytest.raises(ValueError, match="other settings, data or network"):
        train_denoiser(255 - images, labels, NETWORK, CONFIG, tmp_path / "checkpoint", CPU)


def test_a_checkpoint_of_another_classifier_is_refused(tmp_path, images, labels):
    train_classifier(images, labels, 3, CONFIG, tmp_path / "checkpoint", CPU)
    with pytest.raises(ValueError, match="other settings, data or network"):
        train_classifier(images, labels, 3, CONFIG, tmp_path / "checkpoint", CPU, width=8)


def test_a_damaged_checkpoint_is_refused(tmp_path, images, labels):
    (tmp_path / "checkpoint").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"damaged.*remove"):
        train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "checkpoint", CPU)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("how", [{}, {"weighting": "min_snr", "timesteps": "log_normal"}], ids=["plain", "weighted"])
def test_a_network_of_either_kind_learns_to_denoise(tmp_path, prediction, how):
    """Trained on one image, the network predicts that image; before training it does not."""
    image = torch.full((16, 1, 8, 8), 64, dtype=torch.uint8)
    network = replace(NETWORK, prediction=prediction, num_classes=0)
    config = TrainingConfig(epochs=60.0, batch_size=16, warmup_steps=10, learning_rate=3e-3, ema_decay=0.9, **how)
    result = train_denoiser(image, torch.zeros(16, dtype=torch.long), network, config, tmp_path / "c", CPU)
    clean, chain = torch.full((16, 1, 8, 8), 64 / 127.5 - 1), DDPMSchedule.named("linear")
    noisy = clean + torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    for state in (UNet(network).state_dict(), result.state_dict):
        model = UNet(network).requires_grad_(False)
        model.load_state_dict(state)
        errors.append(float((denoised(model, chain, noisy, 1.0) - clean).square().mean()))
    assert errors[1] < 0.1 < errors[0]


def test_log_normal_timesteps_are_centred_where_they_are_meant_to_be():
    config = replace(CONFIG, timesteps="log_normal", log_sigma_mean=0.7, log_sigma_spread=1.2)
    chain = DDPMSchedule.named("linear")
    timesteps = training._timesteps(torch.tensor([0.1587, 0.5, 0.8413, 0.0, 1.0]), chain, config)
    sigmas = chain.sigmas[timesteps].log()
    torch.testing.assert_close(sigmas[:3], torch.tensor([-0.5, 0.7, 1.9]).double(), atol=0.01, rtol=0)
    assert timesteps[3] < 10 and timesteps[4] > 990


def test_a_constant_learning_rate_falls_to_0_at_the_end():
    rates = [CONSTANT.rate(step, 12) / CONSTANT.learning_rate for step in range(12)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert replace(CONSTANT, decay_share=0.0).rate(11, 12) == CONSTANT.learning_rate


def test_a_training_can_be_made_longer_while_its_learning_rate_is_constant(tmp_path, images, labels, monkeypatch):
    longer = replace(CONSTANT, epochs=5.0)
    whole = train_denoiser(images, labels, NETWORK, longer, tmp_path / "whole", CPU)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # at step 6
        with pytest.raises(Stopped):
            train_denoiser(images, labels, NETWORK, CONSTANT, tmp_path / "made longer", CPU)
    assert same(
        whole.state_dict, train_denoiser(images, labels, NETWORK, longer, tmp_path / "made longer", CPU).state_dict
    )


def test_a_training_whose_learning_rate_has_fallen_is_not_made_longer(tmp_path, images, labels):
    train_denoiser(images, labels, NETWORK, CONSTANT, tmp_path / "c", CPU)
    with pytest.raises(ValueError, match="begun to fall"):
        train_denoiser(images, labels, NETWORK, replace(CONSTANT, epochs=9.0), tmp_path / "c", CPU)


def test_checkpoints_are_written_by_time(tmp_path, images, labels, monkeypatch):
    config = replace(CONFIG, checkpoint_every=0, checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch:
        stop_after(patch, 12)  # one a step
        with pytest.raises(Stopped):
            train_denoiser(images, labels, NETWORK, config, tmp_path / "often", CPU)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)  # the last step's alone is written
        train_denoiser(images, labels, NETWORK, replace(config, checkpoint_minutes=60.0), tmp_path / "once", CPU)


def test_bfloat16_is_taken_where_the_processor_has_it_and_refused_where_not(monkeypatch):
    monkeypatch.setattr(training, "_cpu_bfloat16", lambda: ["amx_bf16"])
    assert chosen_precision("auto", CPU) == ("bfloat16", "this processor has amx_bf16")
    assert chosen_precision("bfloat16", CPU)[0] == "bfloat16"
    assert chosen_precision("float32", CPU)[0] == "float32"
    monkeypatch.setattr(training, "_cpu_bfloat16", lambda: [])
    assert chosen_precision("auto", CPU)[0] == "float32"
    with pytest.raises(ValueError, match=r"slower than float32 here.*neither AMX nor AVX-512.*use auto or float32"):
        chosen_precision("bfloat16", CPU)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("fpu avx2 fma", []),
        ("fpu avx512f avx512_bf16", ["avx512_bf16"]),
        ("amx_bf16 avx512_bf16", ["amx_bf16", "avx512_bf16"]),
    ],
)
def test_a_processors_bfloat16_is_read_from_its_flags(tmp_path, flags, found):
    (tmp_path / "cpuinfo").write_text(f"model name\t: a processor\nflags\t\t: {flags}\n")
    assert training._cpu_bfloat16(tmp_path / "cpuinfo") == found


def test_where_there_are_no_flags_torch_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)  # before torch 2.6
    assert training._cpu_bfloat16(tmp_path / "none") == ["avx512_bf16"]


@pytest.mark.parametrize(
    "change", [{"epochs": 0}, {"batch_size": -1}, {"learning_rate": float("nan")}, {"seed": -1}, {"decay_share": 2}]
)
def test_settings_out_of_range_are_named(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(CONFIG, **change)


@pytest.fixture
def mnist_like(tmp_path, monkeypatch) -> Path:
    """A folder of 64 + 64 random "digits" in MNIST's file format, accepted by their own checksums."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    for split in ("train", "t10k"):
        pixels = torch.randint(0, 256, (64, 28, 28), generator=generator).to(torch.uint8).numpy().tobytes()
        contents = {
            f"{split}-images-idx3-ubyte": struct.pack(">IIII", 2051, 64, 28, 28) + pixels,
            f"{split}-labels-idx1-ubyte": struct.pack(">II", 2049, 64) + bytes(i % 10 for i in range(64)),
        }
        for name, content in contents.items():
            monkeypatch.setitem(mnist.MNIST_MD5, name, hashlib.md5(content).hexdigest())
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


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
    assert "dng train denoiser" in record["command"]
    assert "--epochs 1 --batch-size 32 --learning-rate 0.0008 --seed 0" in record["command"]


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


def test_a_checkpoint_started_elsewhere_is_refused(tmp_path, images, labels):
    train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "c", CPU)
    zeros = {k: torch.zeros_like(v) for k, v in UNet(NETWORK).state_dict().items()}
    with pytest.raises(ValueError, match="other settings"):
        train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "c", CPU, zeros)


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
    """The run writes a checkpoint at each step, and SIGKILL comes at any moment."""
    path = plan(tmp_path, "try", "denoiser")
    options = ["--data", image_folder, "--epochs", 20, "--checkpoint-every", 1, "--threads", 1, "--device", "cpu"]
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
    ],
)
def test_bad_plans_are_refused(image_folder, tmp_path, capsys, model, more, network, message):
    path = plan(tmp_path, "try", model, more, network)
    assert dng_train(path, "--data", image_folder, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_plan_says_what_there_is(tmp_path, capsys):
    assert dng_train("painter", "--data", tmp_path, "--output", tmp_path / "out") == 1
    assert (
        "give one of denoiser, classifier, cifar10_classifier, cifar10_denoiser, or a TOML file"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in PLAN_FILES.glob("*.toml")))
def test_shipped_plans_are_valid(name):
    assert read_plan(name).name == name
