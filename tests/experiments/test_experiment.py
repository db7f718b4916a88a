"""Class removal end to end on tiny random networks: both ways to have two predictions, cache, report, bad input."""

import argparse
import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dng_core.experiments import class_removal, experiment_command, report_command, runner, sweep
from dng_core.experiments.checkpoints import open_denoiser
from dng_core.experiments.class_removal import NONE, Batch, Drawn, Point, draw, draw_batch, joined, weights_digest
from dng_core.experiments.experiment import METHOD_OF, PRESETS, read_experiment
from dng_core.experiments.networks import Classifier, UNet, UNetConfig
from dng_core.experiments.predictors import LabelConditional, NetworkPair
from dng_core.experiments.report_data import Result, Results, read_results
from dng_core.experiments.runs_cache import RunsCache
from dng_core.experiments.selection import best, mean_measures, next_scale
from dng_core.experiments.sweep import Workers, draw_all
from dng_core.experiments.weights import ClassifierInfo, DenoiserInfo, save_classifier, save_denoiser
from dng_core.kernels import ReverseKernel
from dng_core.sampling import ddpm_sample
from dng_core.schedules import DDPMSchedule
from dng_core.settings import Settings

NAMES = ("ant", "bee", "cow")
NETWORK = UNetConfig(8, 1, 64, (1,), blocks_per_level=1, attention_levels=(), num_classes=3)
CHAIN = DDPMSchedule.named("linear")
EXPERIMENT = """
name = "try"
denoiser = "{denoiser}"
classifier = "{classifier}"
dataset = "folder"
classes = ["ant"]
images = 8
search_images = 4
steps = 3
batch = 8
[methods.NP]
scales = [0.0, 2.0]
[methods.SLD]
scales = [1.0]
search_scales = [5.0]
[methods.SLD.search]
sld_threshold = [0.04, 0.2]
[methods.DNG]
scales = [1.0]
"""


def random_denoiser(path: Path, network: UNetConfig = NETWORK, seed: int = 0, names: tuple[str, ...] = NAMES) -> Path:
    torch.manual_seed(seed)
    state = UNet(network).state_dict()
    # Labels make a difference, of more than a grey level, as a group of the normalisation has more than one channel.
    state["class_embedding.weight"] *= 20
    save_denoiser(path, state, DenoiserInfo("try", network, "linear", (-1.0, 1.0), names))
    return path


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere."""
    monkeypatch.setattr("dng_core.experiments.measuring.HISTOGRAM_RESAMPLES", 10)
    monkeypatch.setattr("dng_core.experiments.measuring.FEATURE_RESAMPLES", 3)
    class_removal.network.cache_clear()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a random denoiser, a random classifier, an experiment on them, and JPEG images to compare with."""
    random_denoiser(tmp_path / "denoiser.safetensors")
    torch.manual_seed(1)
    info = ClassifierInfo("try", 8, 1, 4, (-1.0, 1.0), NAMES)
    save_classifier(tmp_path / "classifier.safetensors", Classifier(1, 3, 4).state_dict(), info)
    generator = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            grey = Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8))
            grey.save(tmp_path / "data" / name / f"{i}.jpg")
    experiment(tmp_path)
    return tmp_path


def experiment(folder: Path, change: Callable[[str], str] = lambda text: text) -> None:
    text = EXPERIMENT.format(denoiser=folder / "denoiser.safetensors", classifier=folder / "classifier.safetensors")
    (folder / "try.toml").write_text(change(text))


def dng_experiment(folder: Path, *options: object) -> int:
    parser = argparse.ArgumentParser()
    experiment_command.add_arguments(parser)
    arguments = [folder / "try.toml", "--output", folder / "out", "--device", "cpu", "--jobs", 1, *options]
    return experiment_command.run(parser.parse_args([str(a) for a in arguments]))


def point(folder: Path, **changes: object) -> Point:
    source = str(folder / "denoiser.safetensors")
    plain = Point(source, "", weights_digest(source), 0, Settings(), steps=3, images=6, batch=4, seed=0)
    return replace(plain, **changes)  # type: ignore[arg-type]


def runs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "out" / "runs").iterdir()}


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
    off = Settings(method="negative_prompting", guidance_scale=0)
    fine = {"steps": 8, "spacing": "karras"}
    unguided = draw(point(files, forbidden=None, settings=None, **fine))
    assert np.array_equal(draw(point(files, settings=off, **fine)).images, unguided.images)
    pushed = draw(point(files, settings=off.with_(guidance_scale=3.0), **fine))
    assert not np.array_equal(pushed.images, unguided.images)
    assert unguided.images.shape == (6, 1, 8, 8) and unguided.posterior.size == 0
    assert pushed.posterior.shape == (8, 6) and (pushed.scale == 3).all()


@pytest.mark.parametrize("variance", ["posterior", "forward"])
def test_guidance_is_told_how_much_noise_a_step_adds(variance):
    """The step of the sampler itself, from one prediction with many draws of noise, against what guidance is told."""
    levels = [2.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    seen = []

    def predict(x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen.append(x)
        return torch.zeros_like(x), [torch.zeros_like(x)]

    ddpm_sample(predict, torch.zeros(1, 100_000), levels, None, generator, variance)
    told = class_removal.noise_fraction(variance, *levels)
    assert float(seen[1].var()) / ReverseKernel(*levels).variance == pytest.approx(told, rel=0.02)


def test_a_points_key_is_everything_that_decides_its_images(files):
    plain = point(files)
    changes = [
        {"forbidden": 1}, {"settings": Settings(prior=0.3)}, {"steps": 4}, {"images": 7}, {"batch": 3}, {"seed": 1},
        {"spacing": "karras"}, {"variance": "forward"}, {"weights": "other"}, {"class_only": "x"},
    ]  # fmt: skip
    assert len({plain.key(), *(replace(plain, **c).key() for c in changes)}) == len(changes) + 1
    assert replace(plain, denoiser="moved.safetensors").key() == plain.key()
    assert Point.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    other = str(random_denoiser(files / "other.safetensors", seed=1))
    assert weights_digest(other) != plain.weights


def test_the_whole_path_draws_measures_and_reports(files, capsys):
    pytest.importorskip("matplotlib")
    assert dng_experiment(files, "--data", files / "data") == 0
    results = read_results(files / "out")
    assert {r.method for r in results.results} == {NONE, "NP", "SLD", "DNG"}
    assert [(r.role, r.method, r.scale) for r in results.of("ant", "sweep")] == [
        ("sweep", "NP", 0.0), ("sweep", "NP", 2.0), ("sweep", "SLD", 1.0), ("sweep", "DNG", 1.0)
    ]  # fmt: skip
    off = results.of("ant", "sweep")[0]
    assert (off.change is not None and off.change.images == 0) or off.change.kept == 1.0
    assert all(r.value("frechet_without") is not None and r.value("recall") is not None for r in results.results)

    with (files / "out" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7 and {row["role"] for row in rows} == {"baseline", "search", "sweep"}
    page = (files / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page and 'src="plots' not in page
    assert "JPEG images" in page  # results on lossy data say so
    text = (files / "out" / "report.md").read_text()
    assert "| removed | left, none | left, NP | left, SLD | left, DNG |" in text
    assert all((files / "out" / line.split("(")[1][:-1]).is_file() for line in text.split("\n") if line[:2] == "![")
    assert {p.suffix for p in (files / "out" / "plots").iterdir()} == {".png", ".svg"}


def test_a_finished_experiment_draws_nothing_again_and_changed_settings_only_what_is_new(files, monkeypatch):
    assert dng_experiment(files, "--methods", "NP,SLD") == 0
    first = runs(files)
    drawn: list[Point] = []
    original = runner.draw_all
    monkeypatch.setattr(runner, "draw_all", lambda b, w: drawn.extend({x.point: 0 for x in b}) or original(b, w))
    assert dng_experiment(files, "--methods", "NP,SLD") == 0
    assert drawn == []
    experiment(files, lambda text: text.replace("[0.0, 2.0]", "[0.0, 4.0]"))
    assert dng_experiment(files, "--methods", "NP,SLD") == 0
    assert [p.settings.guidance_scale for p in drawn if p.settings] == [4.0]
    assert first < runs(files)
    assert [r.scale for r in read_results(files / "out").of("ant", "sweep") if r.method == "NP"] == [0.0, 4.0]


def test_new_weights_under_the_same_name_are_drawn_anew(files):
    assert dng_experiment(files, "--methods", "NP") == 0
    first = runs(files)
    random_denoiser(files / "denoiser.safetensors", seed=5)
    class_removal.network.cache_clear()
    assert dng_experiment(files, "--methods", "NP") == 0
    assert len(runs(files)) == 2 * len(first)


def test_settings_tuned_at_one_step_count_are_used_at_another(files, capsys):
    assert dng_experiment(files, "--methods", "NP,SLD") == 0
    chosen = read_results(files / "out").best("ant")["SLD"].point.settings
    tuned = ["--settings-of", files / "out", "--steps", 2, "--methods", "NP,SLD"]
    parser = argparse.ArgumentParser()
    experiment_command.add_arguments(parser)
    options = [files / "try.toml", "--output", files / "fewer", "--jobs", 1, "--device", "cpu", *tuned]
    assert experiment_command.run(parser.parse_args([str(o) for o in options])) == 0
    fewer = read_results(files / "fewer")
    assert [(r.method, r.point.steps) for r in fewer.of("ant", "sweep")] == [("NP", 2), ("SLD", 2)]
    assert fewer.best("ant")["SLD"].point.settings == chosen
    assert fewer.of("ant", "search") == []
    before, now = (read_results(files / name).best("ant")["SLD"].value("forbidden_share") for name in ("out", "fewer"))
    row = f"| ant | SLD | {before:.1%} | {now:.1%} | {100 * (now - before):+.1f} |"
    report = (files / "fewer" / "report.md").read_text()
    assert (
        "| removed | method | left, 3 steps (tuned) | left, 2 steps | difference, points |" in report and row in report
    )
    assert experiment_command.run(parser.parse_args([str(o) for o in [*options, "--methods", "NP,DNG"]])) == 1
    assert f"{files / 'out'} has no point of DNG on ant" in capsys.readouterr().err


def results_by_hand(*points: tuple[str, str, float, float, float]) -> Results:
    """(removed, method, left, KL, Fréchet) -> results."""
    made = []
    for removed, method, *values in points:
        names = ("forbidden_share", "kl_renormalised", "frechet_without")
        measured = {name: {"value": value} for name, value in zip(names, values, strict=True)}
        settings = Settings(method=METHOD_OF[method])
        drawn = Point("d", "", "", 0, settings, steps=1, images=4, batch=4, seed=0)
        made.append(Result("sweep", removed, 0, drawn, measured, (), None))
    return Results(Path(), {"experiment": {"target_share": 0.01}}, tuple(made), 0)


def test_the_verdict_counts_the_classes_at_which_dng_beats_every_safe_rival():
    results = results_by_hand(
        ("a", "DNG", 0.01, 0.1, 2.0), ("a", "NP", 0.0, 0.2, 3.0), ("a", "SLD", 0.0, 0.3, 4.0),  # better by both
        ("b", "DNG", 0.01, 0.1, 5.0), ("b", "NP", 0.0, 0.2, 3.0), ("b", "SLD", 0.0, 0.3, 4.0),  # by KL alone
        ("c", "DNG", 0.0, 0.4, 2.0), ("c", "NP", 0.02, 0.2, 1.0), ("c", "SLD", 0.0, 0.5, 4.0),  # NP is unsafe
        ("d", "DNG", 0.02, 0.0, 0.0), ("d", "NP", 0.0, 0.2, 3.0),  # unsafe itself
        ("e", "NP", 0.0, 0.2, 3.0),  # not measured
    )  # fmt: skip
    kl, both = ("kl_renormalised",), ("kl_renormalised", "frechet_without")
    assert "for 3 of 4 classes" in report_command.verdict(results, "kl_renormalised", *kl)
    text = report_command.verdict(results, "kl_renormalised", *both)
    assert "for 2 of 4 classes" in text and "does not get there for: d." in text
    only_np = results_by_hand(("a", "NP", 0.0, 0.2, 3.0))
    assert report_command.verdict(only_np, "kl_renormalised", *kl).endswith("not yet measured.")


def test_a_report_is_made_again_from_the_runs_alone(files):
    assert dng_experiment(files, "--methods", "NP") == 0
    before = (files / "out" / "report.md").read_text()
    for path in (files / "out").glob("r*.*"):
        path.unlink()
    parser = argparse.ArgumentParser()
    report_command.add_arguments(parser)
    assert report_command.run(parser.parse_args([str(files / "out")])) == 0
    assert (files / "out" / "report.md").read_text() == before


def test_a_report_of_nothing_says_what_to_do(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    report_command.add_arguments(parser)
    assert report_command.run(parser.parse_args([str(tmp_path)])) == 1
    assert "name the --output folder" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["label-conditional", "public pair"])
def test_the_cifar_10_path_runs_on_tiny_random_weights(files, monkeypatch, layout, public_unet, class_only_state):
    """A diffusers folder beside a class-only .pt file, or one label-conditional file; three channels."""
    network = UNetConfig(8, 3, 64, (1,), blocks_per_level=1, attention_levels=())
    torch.manual_seed(1)
    info = ClassifierInfo("try", 8, 3, 4, (-1.0, 1.0), NAMES)
    save_classifier(files / "classifier.safetensors", Classifier(3, 3, 4).state_dict(), info)
    if layout == "public pair":
        monkeypatch.setattr(class_removal, "CIFAR10_NETWORK", network)
        public_unet(network).save_pretrained(files / "public")
        torch.save({"net": class_only_state(public_unet(network, seed=1), network)}, files / "ants.pt")
        pair = f'[class_only]\nant = "{files / "ants.pt"}"\n[methods.NP]'
        experiment(files, lambda t: t.replace("denoiser.safetensors", "public").replace("[methods.NP]", pair))
    else:
        random_denoiser(files / "denoiser.safetensors", replace(network, num_classes=3))
    assert dng_experiment(files, "--methods", "NP,DNG") == 0
    results = read_results(files / "out")
    assert len(results.of("ant", "sweep")) == 3
    images = [results.drawn(r).images for r in results.of("ant", "sweep")]
    assert images[0].shape == (8, 3, 8, 8) and not np.array_equal(images[0], images[1])


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


def test_a_network_that_draws_nan_fails_its_points_with_a_message(files, capsys):
    network = UNet(NETWORK)
    state = network.state_dict()
    state["class_embedding.weight"][0] = float("nan")  # the class "ant" alone
    save_denoiser(files / "denoiser.safetensors", state, DenoiserInfo("t", NETWORK, "linear", (-1.0, 1.0), NAMES))
    assert dng_experiment(files, "--methods", "NP") == 1
    message = capsys.readouterr().err
    assert "not finite" in message and "check the weights" in message
    assert {r.role for r in read_results(files / "out").results} == {"baseline"}


def test_a_network_that_draws_infinity_fails_its_points_too(files, capsys):
    state = UNet(NETWORK).state_dict()
    state["conv_out.bias"][:] = float("inf")
    save_denoiser(files / "denoiser.safetensors", state, DenoiserInfo("t", NETWORK, "linear", (-1.0, 1.0), NAMES))
    assert dng_experiment(files, "--methods", "NP") == 1
    assert "not finite" in capsys.readouterr().err


def test_a_process_that_dies_ends_the_run_with_a_message(files, monkeypatch, capsys):
    pytest.importorskip("joblib")
    monkeypatch.setattr(sweep, "_draw_named", lambda *_: os._exit(1))
    assert dng_experiment(files, "--methods", "NP", "--jobs", 2) == 1
    message = capsys.readouterr().err
    assert "a worker process died" in message and "what was computed is kept" in message


def test_a_denoiser_that_the_classifier_does_not_fit_is_refused(files, capsys):
    random_denoiser(files / "denoiser.safetensors", names=("bee", "ant", "cow"))
    assert dng_experiment(files) == 1
    assert "(bee, ant, cow) are not those of the classifier" in capsys.readouterr().err
    random_denoiser(files / "denoiser.safetensors", replace(NETWORK, image_size=16))
    class_removal.network.cache_clear()
    assert dng_experiment(files) == 1
    assert "draws images of (1, 16, 16), the classifier" in capsys.readouterr().err
    assert not (files / "out").exists()


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


def test_a_report_leaves_out_what_is_not_measured_for_a_class_yet(files):
    assert dng_experiment(files, "--methods", "NP", "--classes", "ant,bee") == 0
    baseline = read_results(files / "out").of("bee", "baseline")[0]
    path = files / "out" / "runs" / f"{baseline.point.key()}.json"
    record = json.loads(path.read_text())
    del record["measures"]["by_class"]["bee"]
    path.write_text(json.dumps(record))
    results = read_results(files / "out")
    assert not results.of("bee", "baseline") and results.of("ant", "baseline") and results.missing == 1
    assert report_command.write_reports(files / "out")


def test_a_full_disk_keeps_what_was_done_and_leaves_no_half_files(files, disk_full_after, capsys):
    with disk_full_after(6):
        assert dng_experiment(files, "--methods", "NP") == 1
    assert "free some space" in capsys.readouterr().err
    kept = runs(files)
    assert kept and not any("partial" in name for name in kept)
    assert dng_experiment(files, "--methods", "NP") == 0
    assert kept < runs(files)


def test_a_damaged_run_is_named(files, capsys):
    assert dng_experiment(files, "--methods", "NP") == 0
    path = next((files / "out" / "runs").glob("*.npz"))
    path.write_bytes(path.read_bytes()[:100])
    assert dng_experiment(files, "--methods", "NP") == 1
    assert f"{path.name} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace('["ant"]', '["wasp"]'), "class 'wasp' is not one of the data set's: ant, bee, cow"),
        (lambda t: t.replace("steps", 'search_classes = ["bee"]\nsteps'), "search class 'bee' is not one of"),
        (
            lambda t: t.replace("steps = 3", "steps = 1001"),
            "steps must be a whole number of at least 1 and at most 1000",
        ),
        (lambda t: t.replace("images = 8\n", "images = 1\n", 1), "images must be a whole number of at least 4"),
        (lambda t: t.replace("[methods.DNG]", "[methods.Magic]"), "there is no method 'Magic'"),
        (lambda t: t.replace("sld_threshold", "sld_treshold"), "no setting sld_treshold"),
        (lambda t: t.replace("steps", "stepps"), "unknown: stepps"),
        (lambda t: t.replace("[0.0, 2.0]", "[-1.0]"), "guidance_scale must be at least 0"),
        (lambda t: t + "[methods.DNG.fixed]\nmax_scale = inf\n", "DNG: max_scale is infinite"),
        (lambda t: t.replace("steps = 3", "steps = 3.5"), "steps must be a whole number"),
        (lambda t: t.replace("name =", "name"), "try.toml"),
        (lambda t: t.replace('dataset = "folder"', 'dataset = "mnist"'), "no train-images-idx3-ubyte"),
        (lambda t: t.replace("denoiser.safetensors", "gone.safetensors"), "no weights at"),
        (
            lambda t: t.replace("[methods.NP]", '[class_only]\nbee = "b.pt"\n[methods.NP]'),
            "no class-only network for 'ant'",
        ),
    ],
)
def test_bad_experiments_are_refused_before_anything_is_drawn(files, capsys, change, message):
    experiment(files, change)
    assert dng_experiment(files, "--data", files / "data") == 1
    assert message in capsys.readouterr().err
    assert not (files / "out").exists()


def test_data_of_other_classes_or_sizes_is_refused(files, capsys):
    (files / "data" / "ant").rename(files / "data" / "elk")
    assert dng_experiment(files, "--data", files / "data") == 1
    assert "are not those of the classifier" in capsys.readouterr().err


def test_an_unknown_experiment_names_the_known_ones():
    with pytest.raises(FileNotFoundError, match="cifar10, cifar10_conditional, mnist, tiny"):
        read_experiment("imagenet")


@pytest.mark.parametrize("name", sorted(p.stem for p in PRESETS.glob("*.toml")))
def test_presets_are_valid_and_have_all_methods(name):
    preset = read_experiment(name)
    assert [plan.method for plan in preset.methods] == ["negative_prompting", "safe_latent_diffusion", "dng"]


def measures(share: float, kl: float | None) -> dict:
    return {"forbidden_share": {"value": share}, "kl_renormalised": {"value": kl}}


def test_the_best_is_the_least_imbalance_among_the_safe_else_the_safest():
    tried = [
        ("a", measures(0.0, 0.3)),
        ("b", measures(0.01, 0.1)),
        ("c", measures(0.2, 0.0)),
        ("d", measures(0.0, None)),
    ]
    assert best(tried, 0.01) == "b"
    assert best(tried, 0.005) == "a"
    assert best([tried[2], ("e", measures(0.1, 9.0))], 0.01) == "e"
    with pytest.raises(ValueError, match="nothing to choose"):
        best([], 0.01)


@pytest.mark.parametrize("smallest", range(8))
def test_an_adaptive_sweep_ends_at_the_smallest_safe_scale_whatever_the_search_says(smallest):
    """Full size decides: from wherever the search of few images points to, the sweep goes up until it is safe."""
    scales = [0.1 * i for i in range(7)]
    for pointed in range(smallest + 1):
        drawn: dict[str, dict[float, bool]] = {"search": {}, "sweep": {}}
        while step := next_scale(scales, drawn["search"], drawn["sweep"]):
            role, scale = step
            assert scale not in drawn[role]
            drawn[role][scale] = scales.index(scale) >= (pointed if role == "search" else smallest)
        assert len(drawn["search"]) <= 3
        assert list(drawn["sweep"]) == scales[min(pointed, 6) : smallest + 1]
    assert next_scale([2.0], {}, {}) == ("sweep", 2.0)


def test_an_adaptive_experiment_draws_few_points_and_shares_a_search(files, monkeypatch, capsys):
    """Of the scales 1 .. 4 those from 3 on are called safe; two classes, one search."""
    experiment(files, lambda t: t.replace('["ant"]', '["ant", "bee"]').replace("[0.0, 2.0]", "[4.0, 3.0, 2.0, 1.0]"))
    monkeypatch.setattr(runner, "safe", lambda measures, target: scale_of[id(measures)] >= 3)
    scale_of: dict[int, float] = {}
    original = runner.Runner._complete

    def complete(self, entries):
        done = original(self, entries)
        for entry in entries:
            if entry.point.settings and entry.point.key() in done:
                measures = done[entry.point.key()]["by_class"][entry.name]
                scale_of[id(measures)] = entry.point.settings.guidance_scale
        return done

    monkeypatch.setattr(runner.Runner, "_complete", complete)
    options = ["--methods", "NP,SLD", "--adaptive", "--search-classes", "ant"]
    assert dng_experiment(files, *options, "--estimate") == 0
    assert "more where a first full point is not safe" in capsys.readouterr().out
    assert dng_experiment(files, *options) == 0
    results = read_results(files / "out")
    for name in ("ant", "bee"):
        np_points = [(r.role, r.scale) for r in results.of(name, "search", "sweep") if r.method == "NP"]
        assert np_points == [("search", 2.0), ("search", 3.0), ("sweep", 3.0)]
    searched = [r.point.settings.sld_threshold for r in results.of("ant", "search") if r.method == "SLD"]
    assert searched == [0.04, 0.2] and not [r for r in results.of("bee", "search") if r.method == "SLD"]
    swept = [r for name in ("ant", "bee") for r in results.of(name, "sweep") if r.method == "SLD"]
    assert len(swept) == 2 and len({r.point.settings.sld_threshold for r in swept}) == 1


def test_an_adaptive_sweep_gives_up_a_point_that_cannot_be_drawn(files, monkeypatch, capsys):
    experiment(files, lambda t: t.replace("[0.0, 2.0]", "[1.0, 2.0, 3.0]"))
    monkeypatch.setattr(runner, "draw_all", lambda batches, _: ((b, RuntimeError("no")) for b in batches[:1]))
    assert dng_experiment(files, "--methods", "NP", "--adaptive") == 1
    message = capsys.readouterr().err
    assert "2 points failed" in message and "NP on ant: no" in message and "nothing of the experiment" in message


def test_a_shared_search_takes_the_mean_over_its_classes():
    assert mean_measures([measures(0.0, 0.25), measures(0.5, 0.75)]) == measures(0.25, 0.5)
    assert mean_measures([measures(0.0, 0.2), measures(0.5, None)]) == measures(0.25, None)


def test_an_estimate_draws_nothing_into_the_folder(files, capsys):
    assert dng_experiment(files, "--estimate") == 0
    assert "7 points" in capsys.readouterr().out
    assert not (files / "out").exists()
    assert sweep.Workers(jobs=3).count() == 3
