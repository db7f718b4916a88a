"""Training: a seed gives the same weights, stopped and resumed or not; bad checkpoints and settings are refused."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dng_core.models import training
from dng_core.models.networks import UNet
from dng_core.models.predictors import denoised
from dng_core.models.training import TrainingResult, chosen_precision, train_classifier, train_denoiser
from dng_core.models.training_config import TrainingConfig
from dng_core.models.weight_files import ClassifierInfo
from dng_core.schedules import DDPMSchedule

from .small_training import NETWORK, same

CPU = torch.device("cpu")
CONFIG = TrainingConfig(epochs=3.0, batch_size=4, checkpoint_every=2)  # 12 steps on 16 images
CLASSIFIER = ClassifierInfo("small", 8, 1, 4, (-1.0, 1.0), ("a", "b", "c"))
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


def stopped_and_resumed(
    monkeypatch: pytest.MonkeyPatch, saves: int, train: Callable[[], TrainingResult]
) -> TrainingResult:
    """What a training gives that broke off after so many checkpoints, and then went on."""
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        with pytest.raises(Stopped):
            train()
    return train()


def test_resumed_denoiser_has_the_weights_of_an_unbroken_run(tmp_path, images, labels, monkeypatch):
    whole = train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "whole", CPU)
    resumed = stopped_and_resumed(
        monkeypatch, 3, lambda: train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "broken", CPU)
    )
    assert same(whole.state_dict, resumed.state_dict)
    assert (whole.loss, whole.steps) == (resumed.loss, 12)


def test_resumed_classifier_has_the_weights_of_an_unbroken_run(tmp_path, images, labels, monkeypatch):
    whole = train_classifier(images, labels, CLASSIFIER, CONFIG, tmp_path / "whole", CPU)
    resumed = stopped_and_resumed(
        monkeypatch, 2, lambda: train_classifier(images, labels, CLASSIFIER, CONFIG, tmp_path / "broken", CPU)
    )
    assert same(whole.state_dict, resumed.state_dict)


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
    train_classifier(images, labels, CLASSIFIER, CONFIG, tmp_path / "checkpoint", CPU)
    with pytest.raises(ValueError, match="other settings, data or network"):
        train_classifier(images, labels, replace(CLASSIFIER, width=8), CONFIG, tmp_path / "checkpoint", CPU)


@pytest.mark.parametrize("shifts", ["batch", "image"])
def test_a_residual_classifier_resumes_with_the_weights_of_an_unbroken_run(tmp_path, labels, monkeypatch, shifts):
    images = torch.randint(0, 256, (16, 3, 16, 16), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    info = ClassifierInfo("small", 16, 3, 4, (-1.0, 1.0), ("a", "b", "c"), residual=True)
    config = replace(CONFIG, optimiser="sgd", shifts=shifts, learning_rate=0.1)
    whole = train_classifier(images, labels, info, config, tmp_path / "whole", CPU)
    resumed = stopped_and_resumed(
        monkeypatch, 2, lambda: train_classifier(images, labels, info, config, tmp_path / "broken", CPU)
    )
    assert same(whole.state_dict, resumed.state_dict)


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_either_optimiser_teaches_a_residual_classifier(tmp_path, optimiser):
    """Two kinds of images: dark and bright ones, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    images = (torch.rand(64, 3, 16, 16, generator=generator) * 100 + 100 * labels[:, None, None, None]).to(torch.uint8)
    info = ClassifierInfo("small", 16, 3, 4, (-1.0, 1.0), ("dark", "bright"), residual=True)
    rate = {"adamw": 5e-3, "sgd": 0.4}[optimiser]
    config = TrainingConfig(
        epochs=20.0, batch_size=16, warmup_steps=4, learning_rate=rate, ema_decay=0.5, optimiser=optimiser
    )
    result = train_classifier(images, labels, info, config, tmp_path / "c", CPU)
    model = info.network()
    model.load_state_dict(result.state_dict)
    assert training.classifier_accuracy(model.eval(), images, labels) == 1.0


def test_images_are_shifted_as_rolling_does_each_by_its_own():
    images = torch.randint(0, 256, (3, 2, 8, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    dy, dx = torch.tensor([1, 0, -2]), torch.tensor([0, 2, -1])
    moved = training._shifted(images, dy, dx)
    for i in range(3):
        assert torch.equal(moved[i], torch.roll(images[i], (int(dy[i]), int(dx[i])), dims=(1, 2)))
    together = training._shifted(images, dy[:1], dx[:1])
    assert torch.equal(together, torch.roll(images, (1, 0), dims=(2, 3)))


def test_images_are_mirrored_in_the_share_asked_for_and_left_to_right(images):
    generator = torch.Generator().manual_seed(0)
    mirrored = training._mirrored(images.repeat(100, 1, 1, 1), 0.5, generator).unflatten(0, (100, 16))
    as_they_are, flipped = ((mirrored == kind).flatten(2).all(dim=2) for kind in (images, images.flip(3)))
    assert bool((as_they_are | flipped).all())
    assert 0.45 < float(flipped.float().mean()) < 0.55
    assert torch.equal(training._mirrored(images, 0.0, generator), images)


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


def test_the_learning_rate_of_a_training_by_minutes_falls_by_the_time_that_has_passed():
    config = replace(CONSTANT, minutes=1.0, decay_share=0.5, warmup_steps=4)
    rates = [config.rate_after(9, seconds) / config.learning_rate for seconds in (0, 30, 45, 60, 70)]
    assert rates == [1, 1, 0.5, 0, 0]
    assert config.rate_after(0, 45) == config.learning_rate / 8  # the warm-up is by steps
    cosine = replace(config, schedule="cosine")
    assert cosine.rate_after(9, 30) == pytest.approx(config.learning_rate / 2)


def test_a_training_by_minutes_ends_after_them_and_goes_on_where_it_was_stopped(tmp_path, images, labels, monkeypatch):
    """By a clock that advances by a second whenever it is asked; the epochs of the plan do not count."""
    config = replace(CONSTANT, minutes=1.0, epochs=1e9, checkpoint_every=4, checkpoint_minutes=0.0)
    seconds = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    whole = train_denoiser(images, labels, NETWORK, config, tmp_path / "whole", CPU)
    assert 60 <= whole.seconds < 70
    assert 20 <= whole.steps <= 30  # each asks twice, and once more for a checkpoint
    resumed = stopped_and_resumed(
        monkeypatch, 2, lambda: train_denoiser(images, labels, NETWORK, config, tmp_path / "broken", CPU)
    )
    assert 60 <= resumed.seconds < 70


def test_a_cpu_takes_no_notice_of_compile(tmp_path, images, labels):
    plain, compiled = (
        train_denoiser(images, labels, NETWORK, replace(CONFIG, compile=how), tmp_path / how, CPU)
        for how in ("off", "on")
    )
    assert same(plain.state_dict, compiled.state_dict)


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


def test_a_checkpoint_started_elsewhere_is_refused(tmp_path, images, labels):
    train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "c", CPU)
    zeros = {k: torch.zeros_like(v) for k, v in UNet(NETWORK).state_dict().items()}
    with pytest.raises(ValueError, match="other settings"):
        train_denoiser(images, labels, NETWORK, CONFIG, tmp_path / "c", CPU, zeros)
