"""The calibration of label-conditional networks: by the command, by the figure, and in an experiment's file."""

from pathlib import Path

import pytest

from dng_core.calibration_files import load_calibration
from dng_core.cli.main import main
from dng_core.models.weight_files import shipped_calibrations, shipped_denoisers
from dng_core.studies import calibrating
from dng_core.studies.experiment import read_experiment
from dng_core.studies.picture_book.sampling import LATENT

EXPERIMENT = """
name = "one"
denoiser = "{denoiser}"
classifier = "mnist"
[methods.DNG]
scales = [1.0]
calibrated = {calibrated}
[methods.DNG.fixed]
prior = 0.1
"""


def experiment(folder: Path, denoiser: str = "mnist", calibrated: str = "true") -> Path:
    path = folder / "one.toml"
    path.write_text(EXPERIMENT.format(denoiser=denoiser, calibrated=calibrated))
    return path


def test_every_shipped_denoiser_has_a_calibration_of_its_own():
    shapes = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "picture_book": LATENT}
    shipped = {name: load_calibration(path) for name, path in shipped_calibrations().items()}
    assert shipped.keys() == {*shipped_denoisers(), "picture_book"}
    for name, measured in shipped.items():
        assert measured.shape == shapes[name]
        assert 0.2 < measured.calibration.temperature < 1


def test_the_command_measures_writes_and_explains(tmp_path, capsys):
    output = tmp_path / "found.json"
    assert main(["calibrate", "mnist", "--output", str(output), "--images", "8", "--steps", "8"]) == 0
    measured = load_calibration(output)
    assert (measured.model, measured.calibration.images) == ("pixel model mnist, v", 8)
    assert "Measured on 8 images of 8 steps" in capsys.readouterr().out


def test_the_command_measures_the_picture_book_on_its_places(tmp_path):
    output = tmp_path / "found.json"
    assert main(["calibrate", "picture_book", "--output", str(output), "--images", "17", "--steps", "8"]) == 0
    measured = load_calibration(output)
    assert (measured.model, measured.shape, measured.calibration.images) == ("picture book", LATENT, 17)


def test_the_command_refuses_what_it_cannot_measure(tmp_path, capsys):
    output = tmp_path / "found.json"
    assert main(["calibrate", "nothing.safetensors", "--output", str(output)]) == 1
    assert main(["calibrate", "mnist", "--output", str(output), "--images", "2", "--steps", "8"]) == 1
    assert "at least 8 images, not 2" in capsys.readouterr().err
    assert not output.exists()


def test_the_figure_judges_three_calibrations(monkeypatch):
    monkeypatch.setattr(calibrating, "FITTED", 8)
    rows = list(calibrating.calibration_figure(images=8, steps=[8, 12], seed=0))
    assert [row["calibration"] for row in rows] == ["exact", "all", "left out"] * 2
    assert [row["steps"] for row in rows] == [8] * 3 + [12] * 3
    assert (rows[0]["temperature"], rows[0]["drift"]) == (1.0, 0.0)
    assert all(rows[i][name] == rows[i + 3][name] for i in range(3) for name in ("temperature", "drift"))
    assert rows[1]["cross entropy"] != rows[4]["cross entropy"]
    assert all(0 < row["cross entropy"] < 10 for row in rows)


def test_an_experiment_takes_over_what_was_measured(tmp_path):
    found = load_calibration(shipped_calibrations()["mnist"]).calibration
    (settings,) = read_experiment(str(experiment(tmp_path))).methods[0].sweep({})
    assert (settings.temperature, settings.drift, settings.prior) == (found.temperature, found.drift, 0.1)
    (settings,) = read_experiment(str(experiment(tmp_path, calibrated="false"))).methods[0].sweep({})
    assert (settings.temperature, settings.drift) == (1.0, ())


def test_an_experiment_without_a_calibration_says_how_to_make_one(tmp_path):
    with pytest.raises(ValueError, match=r"other\.calibration\.json: make it by `dng calibrate`"):
        read_experiment(str(experiment(tmp_path, denoiser=str(tmp_path / "other.safetensors"))))
    with pytest.raises(ValueError, match="calibrated must be true or false"):
        read_experiment(str(experiment(tmp_path, calibrated='"yes"')))
