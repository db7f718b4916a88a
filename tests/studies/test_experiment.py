"""Class removal end to end on tiny random networks: the whole path, resuming, tuned settings, and the report."""

import argparse
import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dng_core.calibration_files import load_calibration
from dng_core.cli import report
from dng_core.methods import STUDIED
from dng_core.models.networks import SmallClassifier, UNetConfig
from dng_core.models.weight_files import ClassifierInfo, calibration_of, save_classifier, shipped_denoisers
from dng_core.settings import CALIBRATED
from dng_core.settings import PRESETS as SETTINGS
from dng_core.studies import class_removal, runner, sweep
from dng_core.studies.class_removal import NONE, Point
from dng_core.studies.experiment import METHOD_OF, PRESETS, read_experiment
from dng_core.studies.report import pages
from dng_core.studies.report.results import Result, Results, read_results

from .small_experiment import NAMES, dng_experiment, experiment, random_denoiser, runs


def test_the_whole_path_draws_measures_and_reports(files, capsys):
    pytest.importorskip("matplotlib")
    assert dng_experiment(files, "--data", files / "data") == 0
    results = read_results(files / "out")
    assert {r.method for r in results.results} == {NONE, "NP", "SLD", "CCFG", "DNG"}
    assert [(r.role, r.method, r.scale) for r in results.of("ant", "sweep")] == [
        ("sweep", "NP", 0.0), ("sweep", "NP", 2.0), ("sweep", "SLD", 1.0), ("sweep", "CCFG", 1.0),
        ("sweep", "DNG", 1.0),
    ]  # fmt: skip
    off = results.of("ant", "sweep")[0]
    assert (off.change is not None and off.change.images == 0) or off.change.kept == 1.0
    assert all(r.value("frechet_without") is not None and r.value("recall") is not None for r in results.results)

    with (files / "out" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["role"] for row in rows} == {"baseline", "search", "sweep"}
    page = (files / "out" / "report.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page and 'src="plots' not in page
    assert "JPEG images" in page  # results on lossy data say so
    text = (files / "out" / "report.md").read_text()
    assert "| removed | left, none | left, NP | left, SLD | left, CCFG | left, DNG |" in text
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
    tuned = ["--output", files / "fewer", "--settings-of", files / "out", "--steps", 2]
    assert dng_experiment(files, *tuned, "--methods", "NP,SLD") == 0
    fewer = read_results(files / "fewer")
    assert [(r.method, r.point.steps) for r in fewer.of("ant", "sweep")] == [("NP", 2), ("SLD", 2)]
    assert fewer.best("ant")["SLD"].point.settings == chosen
    assert fewer.of("ant", "search") == []
    before, now = (read_results(files / name).best("ant")["SLD"].value("forbidden_share") for name in ("out", "fewer"))
    row = f"| ant | SLD | {before:.1%} | {now:.1%} | {100 * (now - before):+.1f} |"
    text = (files / "fewer" / "report.md").read_text()
    assert "| removed | method | left, 3 steps (tuned) | left, 2 steps | difference, points |" in text and row in text
    assert dng_experiment(files, *tuned, "--methods", "NP,DNG") == 1
    assert f"{files / 'out'} has no point of DNG on ant" in capsys.readouterr().err


def results_by_hand(*points: tuple[str, str, float, float, float]) -> Results:
    """(removed, method, left, KL, Fréchet) -> results."""
    made = []
    for removed, method, *values in points:
        names = ("forbidden_share", "kl_renormalised", "frechet_without")
        measured = {name: {"value": value} for name, value in zip(names, values, strict=True)}
        settings = STUDIED[METHOD_OF[method]]()
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
    assert "for 3 of 4 classes" in pages.verdict(results, "kl_renormalised", *kl)
    text = pages.verdict(results, "kl_renormalised", *both)
    assert "for 2 of 4 classes" in text and "does not get there for: d." in text
    only_np = results_by_hand(("a", "NP", 0.0, 0.2, 3.0))
    assert pages.verdict(only_np, "kl_renormalised", *kl).endswith("not yet measured.")


def test_a_report_is_made_again_from_the_runs_alone(files):
    assert dng_experiment(files, "--methods", "NP") == 0
    before = (files / "out" / "report.md").read_text()
    for path in (files / "out").glob("r*.*"):
        path.unlink()
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.run(parser.parse_args([str(files / "out")])) == 0
    assert (files / "out" / "report.md").read_text() == before


def test_every_class_has_pictures_of_its_own():
    names = ("a b", "a_b", "a-b", "a_20_b", "ant", "été")
    slugs = [pages._slug(name) for name in names]
    assert len(set(slugs)) == len(names) and slugs[4:] == ["ant", "été"]
    assert all(c.isalnum() or c == "_" for slug in slugs for c in slug)


def test_a_report_of_nothing_says_what_to_do(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    assert report.run(parser.parse_args([str(tmp_path)])) == 1
    assert "name the --output folder" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["label-conditional", "public pair"])
def test_the_cifar_10_path_runs_on_tiny_random_weights(files, monkeypatch, layout, public_unet, class_only_state):
    """A diffusers folder beside a class-only .pt file, or one label-conditional file; three channels."""
    network = UNetConfig(8, 3, 64, (1,), blocks_per_level=1, attention_levels=())
    torch.manual_seed(1)
    info = ClassifierInfo("try", 8, 3, 4, (-1.0, 1.0), NAMES)
    save_classifier(files / "classifier.safetensors", SmallClassifier(3, 3, 4).state_dict(), info)
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


def test_a_report_leaves_out_what_is_not_measured_for_a_class_yet(files):
    assert dng_experiment(files, "--methods", "NP", "--classes", "ant,bee") == 0
    baseline = read_results(files / "out").of("bee", "baseline")[0]
    path = files / "out" / "runs" / f"{baseline.point.key()}.json"
    record = json.loads(path.read_text())
    del record["measures"]["by_class"]["bee"]
    path.write_text(json.dumps(record))
    results = read_results(files / "out")
    assert not results.of("bee", "baseline") and results.of("ant", "baseline") and results.missing == 1
    assert pages.write_reports(files / "out")


@pytest.mark.parametrize("name", sorted(p.stem for p in PRESETS.glob("*.toml")))
def test_presets_are_valid_and_have_all_methods(name):
    assert {plan.method for plan in read_experiment(name).methods} == STUDIED.keys()


@pytest.mark.parametrize(("network", "scale"), [("mnist", CALIBRATED.guidance_scale), ("cifar10", 12.0)])
def test_the_calibrated_preset_takes_what_was_measured_of_its_network(network, scale):
    """On MNIST at the scale of the nodes' settings; on the weak network of CIFAR-10 at one that leaves 1 %."""
    plan = read_experiment(f"{network}_calibrated").methods[-1]
    measured = load_calibration(calibration_of(shipped_denoisers()[network])).calibration
    (settings,) = plan.sweep({})
    assert (settings.temperature, settings.drift) == (measured.temperature, measured.drift)
    assert settings.guidance_scale == scale and settings.prior == 0.1


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar10_conditional"])
def test_the_presets_set_dng_as_the_authors_did_on_cifar_10(name):
    """The scale is swept, ``max_scale`` follows the largest one, and a preset may name the rule."""
    published = SETTINGS["CIFAR-10"]
    plan = read_experiment(name).methods[-1]
    largest = max(plan.scales) * published.p_max / (1 - published.p_max)
    for settings in plan.sweep({}):
        assert settings.max_scale == pytest.approx(largest)
        changes = {name: getattr(settings, name) for name in ("guidance_scale", "max_scale", "rule")}
        assert settings == published.with_(**changes)


def test_an_estimate_draws_nothing_into_the_folder(files, capsys):
    assert dng_experiment(files, "--estimate") == 0
    assert "8 points" in capsys.readouterr().out
    assert not (files / "out").exists()
    assert sweep.Workers(jobs=3).count() == 3
