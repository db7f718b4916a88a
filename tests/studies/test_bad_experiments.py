"""What an experiment refuses, and what it keeps when a network, a process or the disk fails it."""

import json
from dataclasses import replace

import pytest

from dng_core.headless.lock import exclusive
from dng_core.models.networks import UNet
from dng_core.models.weight_files import DenoiserInfo, save_denoiser
from dng_core.studies import class_removal
from dng_core.studies.experiment import read_experiment
from dng_core.studies.report.results import read_results

from .small_experiment import NAMES, NETWORK, dng_experiment, experiment, random_denoiser, runs


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


def test_a_denoiser_that_the_classifier_does_not_fit_is_refused(files, capsys):
    random_denoiser(files / "denoiser.safetensors", names=("bee", "ant", "cow"))
    assert dng_experiment(files) == 1
    assert "(bee, ant, cow) are not those of the classifier" in capsys.readouterr().err
    random_denoiser(files / "denoiser.safetensors", replace(NETWORK, image_size=16))
    class_removal.network.cache_clear()
    assert dng_experiment(files) == 1
    assert "draws images of (1, 16, 16), the classifier" in capsys.readouterr().err
    assert not (files / "out").exists()


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


def test_two_experiments_do_not_share_a_folder(files, capsys):
    assert dng_experiment(files, "--methods", "NP") == 0
    before = {path: path.read_bytes() for path in (files / "out").iterdir() if path.is_file()}
    for name, other in (("denoiser", "other"), ("classifier", "judge")):
        (files / f"{other}.safetensors").write_bytes((files / f"{name}.safetensors").read_bytes())
    for old, new, options, message in (
        ('name = "try"', 'name = "other"', [], "name 'try', not 'other'"),
        ("denoiser.safetensors", "other.safetensors", [], "/other.safetensors'"),
        ("classifier.safetensors", "judge.safetensors", [], "/judge.safetensors'"),
        ('dataset = "folder"', 'dataset = "mnist"', [], "dataset 'folder', not 'mnist'"),
        ("steps = 3", 'steps = 3\nspacing = "karras"', [], "spacing 'ddpm', not 'karras'"),
        ("", "", ["--steps", 2], "steps 3, not 2"),
        ("", "", ["--seed", 1], "seed 0, not 1"),
    ):
        experiment(files, lambda text, old=old, new=new: text.replace(old, new))
        assert dng_experiment(files, "--methods", "NP", *options) == 1
        told = capsys.readouterr().err
        assert f"{files / 'out'} holds another experiment, with " in told and "name another --output" in told
        assert message in told
    assert {path: path.read_bytes() for path in (files / "out").iterdir() if path.is_file()} == before
    assert dng_experiment(files, "--methods", "NP", "--seed", 1, "--estimate") == 0  # which writes nothing


def test_what_is_tried_out_may_change_within_an_experiment(files):
    assert dng_experiment(files, "--methods", "NP") == 0
    drawn = runs(files)
    experiment(files, lambda text: text.replace("[0.0, 2.0]", "[1.0]"))
    changed = ["--methods", "NP,DNG", "--classes", "bee", "--images", 4, "--batch", 4, "--undesired-every", 2]
    assert dng_experiment(files, *changed, "--adaptive", "--data", files / "data") == 0
    assert drawn < runs(files)
    assert read_results(files / "out").removed == ["bee"]


def test_a_manifest_of_an_older_version_is_of_the_same_experiment(files):
    assert dng_experiment(files, "--methods", "NP") == 0
    path = files / "out" / "experiment.json"
    manifest = json.loads(path.read_text())
    for name in ("spacing", "variance", "class_only", "precision"):
        del manifest["experiment"][name]
    path.write_text(json.dumps(manifest))
    assert dng_experiment(files, "--methods", "NP") == 0


@pytest.mark.parametrize("left", ["results.json", "rows/0123.json"])
def test_a_folder_of_the_picture_book_is_not_taken(files, capsys, left):
    (files / "out" / "rows").mkdir(parents=True)
    (files / "out" / left).write_text("{}")
    assert dng_experiment(files, "--methods", "NP") == 1
    told = capsys.readouterr().err
    assert f"{files / 'out'} holds the experiment picture_book, not try: name another --output" in told
    assert not (files / "out" / "experiment.json").exists()


def test_a_folder_in_which_another_process_works_is_left_alone(files, capsys):
    with exclusive(files / "out" / ".lock"):
        assert dng_experiment(files, "--methods", "NP") == 1
    assert f"another process works in {files / 'out'}" in capsys.readouterr().err
    assert [path.name for path in (files / "out").iterdir()] == [".lock"]


def test_images_of_another_point_are_not_taken_for_a_points_own(files, capsys):
    assert dng_experiment(files, "--methods", "NP") == 0
    first, second = sorted((files / "out" / "runs").glob("*.npz"))[:2]
    first.write_bytes(second.read_bytes())
    first.with_suffix(".json").unlink()
    assert dng_experiment(files, "--methods", "NP") == 1
    assert f"{first.name} holds the images of {second.stem}" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["{}", "[]", '{"measures": {}}', "without", "["])
def test_a_damaged_record_is_measured_again(files, damage):
    pytest.importorskip("matplotlib")
    assert dng_experiment(files, "--methods", "NP") == 0
    path = next((files / "out" / "runs").glob("*.json"))
    whole = json.loads(path.read_text())
    if damage == "without":
        damage = json.dumps(whole | {"measures": {**whole["measures"], "by_class": {"ant": {}}}})
    path.write_text(damage)
    assert read_results(files / "out").missing == 1
    assert dng_experiment(files, "--methods", "NP") == 0
    assert json.loads(path.read_text()) == whole


@pytest.mark.parametrize("damage", ["{}", "[]", '{"points": [{}], "measured_with": ""}', "["])
def test_a_damaged_manifest_is_named(files, damage):
    (files / "out").mkdir()
    (files / "out" / "experiment.json").write_text(damage)
    with pytest.raises(ValueError, match=r"experiment\.json is damaged"):
        read_results(files / "out")


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
        (lambda t: t.replace("threshold", "treshold"), "no setting treshold"),
        (lambda t: t.replace("steps", "stepps"), "unknown: stepps"),
        (lambda t: t.replace("[0.0, 2.0]", "[-1.0]"), "guidance_scale must be at least 0"),
        (lambda t: t + "[methods.DNG.fixed]\nmax_scale = inf\n", "DNG: max_scale is infinite"),
        (lambda t: t.replace("steps = 3", "steps = 3.5"), "steps must be a whole number"),
        (lambda t: t.replace("steps = 3", "steps = 3\nseed = 1.5"), "seed must be a whole number"),
        (lambda t: t.replace("steps = 3", "steps = 3\nseed = 10000000000000"), "seed must be a whole number"),
        (lambda t: t.replace('name = "try"', "name = 3"), "name must be a text, not 3"),
        (lambda t: t.replace('["ant"]', '"ant"'), "classes must be a list of texts, not 'ant'"),
        (lambda t: t.replace("name =", "name"), "try.toml"),
        (lambda t: "a = " + "[" * 100_000 + t, "try.toml: it is nested too deeply"),
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


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--images", 0, "images must be a whole number of at least 4, not 0"),
        ("--steps", 0, "steps must be a whole number of at least 1 and at most 1000, not 0"),
        ("--classes", "", "class '' is not one of the data set's"),
        ("--methods", "", "--methods: there is no "),
        ("--jobs", -1, "--jobs must be 0 or more, not -1"),
    ],
)
def test_a_value_that_is_nothing_is_not_taken_for_the_default(files, capsys, option, value, message):
    assert dng_experiment(files, option, value) == 1
    assert message in capsys.readouterr().err


def test_data_of_other_classes_or_sizes_is_refused(files, capsys):
    (files / "data" / "ant").rename(files / "data" / "elk")
    assert dng_experiment(files, "--data", files / "data") == 1
    assert "are not those of the classifier" in capsys.readouterr().err


def test_an_unknown_experiment_names_the_known_ones():
    known = "cifar10, cifar10_calibrated, cifar10_conditional, mnist, mnist_calibrated, tiny"
    with pytest.raises(FileNotFoundError, match=known):
        read_experiment("imagenet")
