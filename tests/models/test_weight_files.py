"""Weights files: what is written is read back; what can't be read says which file and what to do."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from dng_core.models.networks import ResidualClassifier, SmallClassifier, UNet, UNetConfig
from dng_core.models.weight_files import (
    SHIPPED,
    ClassifierInfo,
    DenoiserInfo,
    load_classifier,
    load_denoiser,
    save_classifier,
    save_denoiser,
    shipped_classifiers,
    shipped_denoisers,
)

NETWORK = UNetConfig(8, 1, 32, channel_multipliers=(1,), blocks_per_level=1, attention_levels=(), num_classes=2)
DENOISER = DenoiserInfo("tiny", NETWORK, "linear", (-1.0, 1.0), ("cat", "dog"))
CLASSIFIER = ClassifierInfo("tiny", 8, 1, 4, (-1.0, 1.0), ("cat", "dog"))


@pytest.fixture
def denoiser_file(tmp_path):
    torch.manual_seed(0)
    save_denoiser(tmp_path / "tiny_denoiser.safetensors", UNet(NETWORK).state_dict(), DENOISER)
    return tmp_path / "tiny_denoiser.safetensors"


def test_denoiser_comes_back_as_it_was(denoiser_file):
    torch.manual_seed(0)
    original = UNet(NETWORK).eval()
    model, info = load_denoiser(denoiser_file)
    assert info == DENOISER
    assert not model.training
    x, timestep = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(model(x, timestep), original(x, timestep))


@pytest.mark.parametrize("residual", [False, True])
def test_classifier_comes_back_as_it_was(tmp_path, residual):
    described = replace(CLASSIFIER, image_size=16, residual=residual)
    original = described.network().eval()
    assert isinstance(original, ResidualClassifier if residual else SmallClassifier)
    save_classifier(tmp_path / "file", original.state_dict(), described)
    model, info = load_classifier(tmp_path / "file")
    assert info == described
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(model(images), original(images))


def test_a_classifier_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="residual must be true or false, not 'yes'"):
        replace(CLASSIFIER, residual="yes")


def test_nothing_but_the_file_is_left_behind(denoiser_file):
    assert list(denoiser_file.parent.iterdir()) == [denoiser_file]


def test_missing_file_says_where_weights_come_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights at.*dng train"):
        load_denoiser(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 4000])
def test_cut_off_file_is_called_damaged(denoiser_file, keep):
    denoiser_file.write_bytes(denoiser_file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"damaged.*dng train"):
        load_denoiser(denoiser_file)


def test_a_flipped_byte_is_found_by_the_records_digest(denoiser_file):
    content = bytearray(denoiser_file.read_bytes())
    record = denoiser_file.with_suffix(".json")
    record.write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))
    load_denoiser(denoiser_file)
    content[-9] ^= 1
    denoiser_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged: its SHA-256 is not the one in tiny_denoiser\.json.*dng train"):
        load_denoiser(denoiser_file)
    for other in ("{}", "[", "3"):  # a record of an older release, or none
        record.write_text(other)
        load_denoiser(denoiser_file)


def test_pickle_is_not_read(tmp_path):
    torch.save(UNet(NETWORK).state_dict(), tmp_path / "file")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_denoiser(tmp_path / "file")


def test_a_classifier_is_no_denoiser(tmp_path):
    save_classifier(tmp_path / "file", SmallClassifier(1, 2, 4).state_dict(), CLASSIFIER)
    with pytest.raises(ValueError, match="holds classifier, not a denoiser"):
        load_denoiser(tmp_path / "file")


def test_foreign_safetensors_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "file")
    with pytest.raises(ValueError, match="did not write"):
        load_denoiser(tmp_path / "file")


def test_tensors_of_another_shape_are_refused(tmp_path):
    other = UNet(replace(NETWORK, base_channels=64))
    save_denoiser(tmp_path / "file", other.state_dict(), DENOISER)
    with pytest.raises(ValueError, match="don't fit their network"):
        load_denoiser(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        {"network": {"image_size": 8, "in_channels": 1, "novelty": 2}},
        {"network": {"image_size": 8, "in_channels": 1, "prediction": "x0"}},
        {"network": 3},
        {"data_range": [0, 1]},
        {"network": {"image_size": 10**9, "in_channels": 1}},
        {"network": {"image_size": 8, "in_channels": 1, "blocks_per_level": 10**9}},
        {"network": {"image_size": 8, "in_channels": 1, "channel_multipliers": [1] * 1000}},
        {"network": {"image_size": 8, "in_channels": 1.5}},
    ],
)
def test_a_network_that_this_version_does_not_know_is_refused(tmp_path, change):
    info = {"name": "x", "network": {"image_size": 8, "in_channels": 1}, "schedule": "linear", "class_names": []}
    info |= {"data_range": [-1, 1]} | change
    save_file({"x": torch.zeros(1)}, tmp_path / "file", metadata={"kind": "denoiser", "info": json.dumps(info)})
    with pytest.raises(ValueError, match=r"doesn't know.*update DNG"):
        load_denoiser(tmp_path / "file")


def test_a_network_far_larger_than_the_file_is_refused_without_memory_for_it(tmp_path):
    """The first convolution alone would take terabytes."""
    network = {"image_size": 8, "in_channels": 1, "base_channels": 4096, "channel_multipliers": [64]}
    info = {"name": "x", "network": network, "schedule": "linear", "class_names": [], "data_range": [-1, 1]}
    save_file({"x": torch.zeros(1)}, tmp_path / "file", metadata={"kind": "denoiser", "info": json.dumps(info)})
    with pytest.raises(ValueError, match="don't fit their network"):
        load_denoiser(tmp_path / "file")


def test_a_description_that_is_nested_too_deeply_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "file", metadata={"kind": "denoiser", "info": "[" * 100_000})
    with pytest.raises(ValueError, match=r"doesn't know.*nested too deeply"):
        load_denoiser(tmp_path / "file")


def test_a_file_that_names_no_prediction_means_epsilon(tmp_path):
    small = {"base_channels": 32, "channel_multipliers": [1], "blocks_per_level": 1, "attention_levels": []}
    info = {"name": "x", "network": {"image_size": 8, "in_channels": 1, **small}, "schedule": "linear"}
    info |= {"class_names": [], "data_range": [-1, 1]}
    state = UNet(replace(NETWORK, num_classes=0)).state_dict()
    save_file(state, tmp_path / "file", metadata={"kind": "denoiser", "info": json.dumps(info)})
    assert load_denoiser(tmp_path / "file")[1].network.prediction == "epsilon"


def test_what_a_network_predicts_is_kept(tmp_path):
    info = replace(DENOISER, network=replace(NETWORK, prediction="v"))
    save_denoiser(tmp_path / "file", UNet(NETWORK).state_dict(), info)
    model, read = load_denoiser(tmp_path / "file")
    assert (read, model.config.prediction) == (info, "v")


def test_float16_halves_the_file_and_is_loaded_as_float32(tmp_path):
    state = UNet(NETWORK).state_dict()
    save_denoiser(tmp_path / "whole", state, DENOISER)
    save_denoiser(tmp_path / "half", state, DENOISER, "float16")
    assert (tmp_path / "half").stat().st_size < 0.6 * (tmp_path / "whole").stat().st_size
    for key, value in load_denoiser(tmp_path / "half")[0].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, state[key], rtol=5e-4, atol=1e-7)


def test_weights_too_large_for_float16_are_not_written_as_such(tmp_path):
    state = UNet(NETWORK).state_dict() | {"conv_in.bias": torch.full((32,), 7e4)}
    with pytest.raises(ValueError, match=r"not written: conv_in\.bias hold numbers too large for float16"):
        save_denoiser(tmp_path / "file", state, DENOISER, "float16")
    assert list(tmp_path.iterdir()) == []


def test_shipped_weights_load_and_take_at_most_24_megabytes():
    files = [*shipped_denoisers().values(), *shipped_classifiers().values()]
    assert sum(file.stat().st_size for file in files) <= 24e6
    for file in shipped_denoisers().values():
        load_denoiser(file)
    for file in shipped_classifiers().values():
        load_classifier(file)


def test_shipped_weights_have_a_record_of_how_they_were_made():
    files = sorted(SHIPPED.glob("*.safetensors"))
    assert {*shipped_denoisers().values(), *shipped_classifiers().values()} < {*files}
    for file in files:
        record = json.loads(file.with_suffix(".json").read_text())
        assert record["command"].startswith("dng train ")
        assert record["loss"] > 0
        assert isinstance(record["seed"], int)
        assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    accuracy = json.loads(shipped_classifiers()["mnist"].with_suffix(".json").read_text())["test_accuracy"]
    assert accuracy >= 0.99
