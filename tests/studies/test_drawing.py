"""Drawing a point: both ways to have two predictions, what a point is, and its batches over processes and machines."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from dng_core.baselines import NegativePrompting
from dng_core.headless.environment import LAUNCHER
from dng_core.kernels import ReverseKernel
from dng_core.models.checkpoints import open_denoiser
from dng_core.models.networks import UNet
from dng_core.models.predictors import LabelConditional, NetworkPair, denoised
from dng_core.sampling import ddpm_sample
from dng_core.settings import Settings
from dng_core.studies import class_removal, runner, sweep
from dng_core.studies.class_removal import Batch, Drawn, Point, draw, draw_batch, joined, weights_digest
from dng_core.studies.report.results import read_results
from dng_core.studies.runs_cache import RunsCache
from dng_core.studies.sweep import Workers, draw_all

from ..headless.conftest import all_end, wait_for
from .small_experiment import CHAIN, NETWORK, dng_experiment, experiment, point, random_denoiser, runs


def test_one_label_conditional_network_is_evaluated_once_for_both_predictions(tmp_path, monkeypatch):
    network, _ = open_denoiser(str(random_denoiser(tmp_path / "d.safetensors")))
    x, sigma = torch.randn(3, 1, 8, 8), 2.0
    batches: list[int] = []
    original = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *a: batches.append(len(x)) or original(self, x, *a))
    reference, (undesired,) = LabelConditional(network, CHAIN, 1)(x, sigma)
    assert batches == [6]
    alone = LabelConditional(network, CHAIN, None)(x, sigma)
    assert alone[1] == [] and batches == [6, 3]
    torch.testing.assert_close(reference, alone[0])
    assert not torch.allclose(reference, undesired)


def test_predictions_are_the_noise_equation_in_range(tmp_path):
    network, _ = open_denoiser(str(random_denoiser(tmp_path / "d.safetensors")))
    x, t = torch.randn(2, 1, 8, 8) * 3, 400
    sigma = float(CHAIN.sigmas[t])
    epsilon = network(x / (1 + sigma**2) ** 0.5, torch.tensor([t, t]), torch.tensor([2, 2]))
    pair = NetworkPair(network, network, CHAIN)(x, sigma)
    (undesired,) = LabelConditional(network, CHAIN, 2)(x, sigma)[1]
    torch.testing.assert_close(undesired, (x - sigma * epsilon).clamp(-1, 1))
    assert torch.equal(pair[0], pair[1][0])


@pytest.mark.parametrize("sigma", [0.05, 1.3, 40.0])
def test_epsilon_and_v_say_the_same_of_an_image(monkeypatch, sigma):
    """With x_t = alpha x_0 + s epsilon, perfect networks of either kind give x_0."""
    clean, noise = 2 * torch.rand(3, 1, 8, 8, dtype=torch.float64) - 1, torch.randn(3, 1, 8, 8, dtype=torch.float64)
    alpha, s = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
    targets = {"epsilon": noise, "v": alpha * noise - s * clean}
    for prediction, target in targets.items():
        network = UNet(replace(NETWORK, prediction=prediction))
        monkeypatch.setattr(UNet, "forward", lambda self, x, timestep, label, target=target: target)
        torch.testing.assert_close(denoised(network, CHAIN, clean + sigma * noise, sigma), clean)


def test_networks_of_different_images_make_no_pair(tmp_path):
    networks = [UNet(replace(NETWORK, num_classes=0, image_size=size)) for size in (8, 16)]
    with pytest.raises(ValueError, match="draw different images"):
        NetworkPair(*networks, CHAIN)
    with pytest.raises(ValueError, match="knows no labels"):
        LabelConditional(networks[0], CHAIN, 0)
    with pytest.raises(ValueError, match="label 3 is not one"):
        LabelConditional(UNet(NETWORK), CHAIN, 3)


def test_all_methods_start_from_the_same_noise(files):
    """Negative prompting at scale 0 draws the unguided images, other scales draw others; batches of any remainder."""
    off = NegativePrompting(guidance_scale=0)
    fine = {"steps": 8, "spacing": "karras"}
    unguided = draw(point(files, forbidden=None, settings=None, **fine))
    assert np.array_equal(draw(point(files, settings=off, **fine)).images, unguided.images)
    pushed = draw(point(files, settings=NegativePrompting(guidance_scale=3), **fine))
    assert not np.array_equal(pushed.images, unguided.images)
    assert unguided.images.shape == (6, 1, 8, 8) and unguided.posterior.size == 0
    assert pushed.posterior.size == 0


@pytest.mark.parametrize("levels", [[2.0, 1.0], [3.0, 2.0, 1.5, 1.0]], ids=["a step", "three steps"])
@pytest.mark.parametrize("variance", ["posterior", "forward"])
def test_guidance_is_told_how_much_noise_is_added(variance, levels):
    """With predictions of zero and many draws, the sampler's own variance is compared with what guidance is told."""
    generator = torch.Generator().manual_seed(0)
    seen = []

    def predict(x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen.append(x)
        return torch.zeros_like(x), [torch.zeros_like(x)]

    ddpm_sample(predict, torch.zeros(1, 100_000), levels, None, generator, variance)
    told = class_removal.noise_fraction(variance, levels, levels[0], levels[-1])
    assert float(seen[-1].var()) / ReverseKernel(levels[0], levels[-1]).variance == pytest.approx(told, rel=0.02)
    assert (told == 1) == (variance == "posterior")


@pytest.mark.parametrize("variance", ["posterior", "forward"])
def test_the_undesired_class_is_predicted_at_every_so_many_th_step(files, monkeypatch, variance):
    """The network is called as often as ``evaluations`` says; the trace holds every step."""
    some = point(files, undesired_every=3, steps=7, variance=variance, images=4)
    evaluated: list[int] = []
    original = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *a: evaluated.append(len(x)) or original(self, x, *a))
    drawn = draw(some)
    assert evaluated == [8, 4, 4, 8, 4, 4, 8] and sum(evaluated) == some.evaluations
    assert drawn.posterior.shape == (7, 4) and len(drawn.sigmas) == 7
    always = draw(replace(some, undesired_every=1))
    assert not np.array_equal(drawn.images, always.images) and always.sigmas.tolist() == drawn.sigmas.tolist()


def test_networks_compute_in_bfloat16_and_guidance_in_float32(files, monkeypatch):
    """The network gets bfloat16 states; the images stay close, and what is tracked has float32's digits."""
    plain, seen = point(files, steps=12), set()
    original = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda self, x, *a: seen.add(x.dtype) or original(self, x, *a))
    exact, lowered = draw(plain), draw(replace(plain, precision="bfloat16"))
    assert seen == {torch.float32, torch.bfloat16}
    difference = np.abs(lowered.images.astype(int) - exact.images.astype(int))
    assert 0 < difference.mean() < 3 and not np.array_equal(lowered.posterior, exact.posterior)
    posterior = torch.from_numpy(lowered.posterior)
    assert posterior.dtype == torch.float32 and not torch.equal(posterior, posterior.bfloat16().float())


def test_a_points_key_is_everything_that_decides_its_images(files):
    plain = point(files)
    changes = [
        {"forbidden": 1}, {"settings": Settings(prior=0.3)}, {"steps": 4}, {"images": 7}, {"batch": 3}, {"seed": 1},
        {"spacing": "karras"}, {"variance": "forward"}, {"weights": "other"}, {"class_only": "x"},
        {"undesired_every": 2}, {"precision": "bfloat16"},
    ]  # fmt: skip
    assert len({plain.key(), *(replace(plain, **c).key() for c in changes)}) == len(changes) + 1
    assert replace(plain, denoiser="moved.safetensors").key() == plain.key()
    assert Point.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    older = plain.to_dict()
    del older["undesired_every"]
    assert Point.from_dict(older) == plain
    other = str(random_denoiser(files / "other.safetensors", seed=1))
    assert weights_digest(other) != plain.weights


def test_points_over_two_processes_are_those_of_one(files):
    pytest.importorskip("joblib")
    points = [point(files), point(files, seed=1)]
    drawn = dict(draw_all([batch for p in points for batch in p.batches()], Workers(jobs=2, device="cpu")))
    for p in points:
        for batch in p.batches():
            assert not isinstance(drawn[batch], Exception), drawn[batch]
        found = joined([drawn[batch] for batch in p.batches()])
        assert np.abs(found.images.astype(int) - draw(p).images.astype(int)).max() <= 1


def test_a_run_stopped_within_a_point_goes_on_with_the_next_batch(files, monkeypatch):
    experiment(files, lambda text: text.replace("batch = 8", "batch = 3"))
    original, count = runner.draw_all, 5
    drawn: list[Batch] = []

    def stopped_after(batches: Sequence[Batch], workers: Workers) -> Iterator[tuple[Batch, Drawn | Exception]]:
        for batch, images in original(batches, workers):
            if len(drawn) == count:
                raise KeyboardInterrupt
            drawn.append(batch)
            yield batch, images

    monkeypatch.setattr(runner, "draw_all", stopped_after)
    with pytest.raises(KeyboardInterrupt):
        dng_experiment(files, "--methods", "NP")
    assert len(drawn) == count and len([name for name in runs(files) if name.count(".") == 2]) == 2
    count = 1000
    assert dng_experiment(files, "--methods", "NP") == 0
    assert len(drawn) == len(set(drawn))
    assert all(name.count(".") == 1 for name in runs(files))
    for result in read_results(files / "out").results:
        assert np.array_equal(read_results(files / "out").drawn(result).images, draw(result.point).images)


@pytest.mark.slow
def test_a_ray_worker_that_dies_midway_costs_nothing_but_time(files, monkeypatch):
    """A cluster of two workers on this machine; one is killed while it draws. Its point is drawn by another."""
    ray, psutil = pytest.importorskip("ray"), pytest.importorskip("psutil")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")  # a busy machine
    batches = [b for seed in range(3) for b in point(files, seed=seed, steps=300).batches()]
    killed: list[int] = []
    drawn = {}
    for batch, found in draw_all(batches, Workers("ray", jobs=2, device="cpu")):
        drawn[batch] = found
        if not killed:
            children = psutil.Process().children(recursive=True)
            busy = [child for child in children if "ray::draw_one" in " ".join(child.cmdline())]
            killed.append(busy[0].pid)
            os.kill(killed[0], 9)
    assert killed and not ray.is_initialized()
    assert set(drawn) == set(batches)
    for batch in batches:
        assert not isinstance(drawn[batch], Exception), drawn[batch]
        assert drawn[batch].images.shape == (batch.images, 1, 8, 8)


def test_ray_and_joblib_are_asked_for_where_they_are_missing(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    monkeypatch.setitem(__import__("sys").modules, "joblib", None)
    with pytest.raises(ValueError, match="pip install ray"):
        list(draw_all(point(files).batches(), Workers("ray", device="cpu")))
    with pytest.raises(ValueError, match="pip install joblib"):
        list(draw_all(point(files).batches(), Workers(jobs=2, device="cpu")))


def test_a_cluster_that_does_not_start_is_a_message(files, monkeypatch, capsys):
    class Silent:
        @staticmethod
        def is_initialized() -> bool:
            return False

        @staticmethod
        def init(**options: object) -> None:
            raise Exception("The current node timed out during startup.")

        @staticmethod
        def shutdown() -> None:
            pass

    monkeypatch.setitem(__import__("sys").modules, "ray", Silent)
    assert dng_experiment(files, "--engine", "ray") == 1
    assert "Ray could not be started on this machine (The current node timed out" in capsys.readouterr().err


def test_a_process_that_dies_ends_the_run_with_a_message(files, monkeypatch, capsys):
    pytest.importorskip("joblib")
    monkeypatch.setattr(sweep, "_draw_named", lambda *_: os._exit(1))
    assert dng_experiment(files, "--methods", "NP", "--jobs", 2) == 1
    message = capsys.readouterr().err
    assert "a worker process died" in message and "what was computed is kept" in message


def test_a_point_with_all_its_batches_and_no_whole_is_made_whole(files):
    experiment(files, lambda text: text.replace("batch = 8", "batch = 3"))
    assert dng_experiment(files, "--methods", "NP") == 0
    result = read_results(files / "out").of("ant", "sweep")[0]
    cache = RunsCache(files / "out")
    for batch in result.point.batches():
        cache.add(batch, draw_batch(batch))
    whole = cache.folder / f"{result.point.key()}.npz"
    whole.unlink()
    assert dng_experiment(files, "--methods", "NP") == 0
    assert whole.is_file() and all(name.count(".") == 1 for name in runs(files))


def test_a_killed_experiment_leaves_no_process(files):
    """Each worker has minutes of work left, and is not told of the end."""
    experiment(
        files, lambda text: text.replace("steps = 3", "steps = 100").replace("images = 8\n", "images = 2000\n", 1)
    )
    arguments = [files / "try.toml", "--output", files / "out", "--device", "cpu", "--jobs", 2, "--methods", "NP"]
    command = [sys.executable, "-P", str(LAUNCHER), "experiment", *map(str, arguments)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: list((files / "out" / "runs").glob("*.npz")) != [], 300)  # both workers have begun
        workers = [process.pid for process in psutil.Process(started.pid).children(recursive=True)]
        assert len(workers) >= 2
    finally:
        started.kill()
        started.wait()
    assert all_end(workers)
