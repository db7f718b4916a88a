"""What a run leaves on disk is whole, stays in its folder, and says how it was made."""

import json
import os
from pathlib import Path

import pytest

from dng_core.headless.client import RunResult
from dng_core.headless.record import safe_name, save_run
from dng_core.headless.server import Server
from dng_core.headless.workflow import Prompt

PROMPT: Prompt = {
    "1": {
        "class_type": "DNGKSampler",
        "inputs": {"seed": 5, "prior": 0.1, "model": ["2", 0]},
        "_meta": {"title": "Without 3"},
    },
    "2": {"class_type": "LoadModel", "inputs": {"name": "digits"}},
}
SERVER = Server("http://127.0.0.1:1", {"system": {"comfyui_version": "0.30.0"}, "devices": [{"name": "cpu"}]})


@pytest.fixture
def result() -> RunResult:
    image = {"filename": "x.png", "subfolder": "", "type": "output"}
    return RunResult(
        "id",
        ui={"1": {"images": [image, image], "text": ["| digit |", "| --- |"], "figures": [{"kl": 0.01}]}},
        files={"1": [("x.png", b"first"), ("../../x.png", b"second")]},
        node_info={"LoadModel": {"category": "loaders"}},
    )


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the disk be full when a file of this name is to be put in its place."""
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == name:
            raise OSError("disk full")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_a_run_is_saved_with_its_files_texts_and_record(tmp_path: Path, result: RunResult) -> None:
    folder = tmp_path / "deep" / "out"
    saved = save_run(folder, Path("w.json"), PROMPT, SERVER, result)
    assert [path.name for path in saved] == ["x.png", "x_2.png", "Without_3.md", "record.json"]
    assert (folder / "x.png").read_bytes() == b"first"
    assert (folder / "x_2.png").read_bytes() == b"second"
    assert (folder / "Without_3.md").read_text() == "| digit |\n| --- |\n"
    record = json.loads((folder / "record.json").read_text())
    assert record["settings"] == {"1": {"class_type": "DNGKSampler", "seed": 5, "prior": 0.1}}
    assert record["seeds"] == {"1": 5}
    assert record["figures"] == [{"kl": 0.01}]
    assert record["versions"]["comfyui"] == "0.30.0"
    assert record["prompt"] == PROMPT


def test_a_second_run_into_the_same_folder_replaces_the_first(tmp_path: Path, result: RunResult) -> None:
    save_run(tmp_path, Path("w.json"), PROMPT, SERVER, result)
    (tmp_path / "x_3.png").write_bytes(b"the user's")
    result.files["1"] = [("x.png", b"again")]
    save_run(tmp_path, Path("w.json"), PROMPT, SERVER, result)
    assert (tmp_path / "x.png").read_bytes() == b"again"
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", "x_3.png", "Without_3.md", "record.json"}


@pytest.mark.parametrize(
    "record", ["", "[]", '{"outputs": {"1": {"files": ["../precious", 3]}}}', '{"outputs": [{"files": ["precious"]}]}']
)
def test_a_damaged_or_planted_record_deletes_nothing(tmp_path: Path, result: RunResult, record: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for path in (tmp_path / "precious", folder / "precious"):
        path.write_text("the user's")
    (folder / "record.json").write_text(record)
    save_run(folder, Path("w.json"), PROMPT, SERVER, result)
    assert (tmp_path / "precious").is_file() and (folder / "precious").is_file()


def test_a_long_title_in_another_script_keeps_its_results(tmp_path: Path, result: RunResult) -> None:
    prompt = {**PROMPT, "1": {**PROMPT["1"], "_meta": {"title": "\u907f\u514d\u8fd9\u4e9b\u4e1c\u897f" * 40}}}
    saved = save_run(tmp_path, Path("w.json"), prompt, SERVER, result)
    assert saved[2].name.startswith("\u907f\u514d\u8fd9\u4e9b\u4e1c\u897f") and saved[2].suffix == ".md"
    assert all(path.is_file() for path in saved)


def test_a_result_is_not_written_through_a_link_that_lies_there(tmp_path: Path, result: RunResult) -> None:
    precious = tmp_path / "precious"
    precious.write_text("the user's")
    for name in ("x.png", "x_2.png.partial"):
        (tmp_path / name).symlink_to(precious)
    save_run(tmp_path, Path("w.json"), PROMPT, SERVER, result)
    assert precious.read_text() == "the user's"
    assert (tmp_path / "x.png").read_bytes() == b"first"


def test_a_save_that_fails_midway_leaves_no_record_and_no_part_of_a_file(
    tmp_path: Path, result: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path, Path("w.json"), PROMPT, SERVER, result)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        fail_at(patched, "x.png")
        save_run(tmp_path, Path("w.json"), PROMPT, SERVER, result)
    assert not (tmp_path / "record.json").exists()
    assert (tmp_path / "x.png").read_bytes() == b"first"
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", "x_2.png", "Without_3.md", "record.unfinished.json"}
    save_run(tmp_path, Path("w.json"), PROMPT, SERVER, result)
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", "x_2.png", "Without_3.md", "record.json"}


def test_what_a_killed_save_left_goes_with_the_next_run_and_the_users_files_stay(
    tmp_path: Path, result: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path, Path("w.json"), PROMPT, SERVER, result)
    for name in ("y_2.png", "y_9.png", "z.png.partial"):
        (tmp_path / name).write_bytes(b"the user's")
    other = RunResult("id", ui={"1": {}}, files={"1": [(f"y_{number}.png", b"new") for number in (1, 2, 3)]})
    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        fail_at(patched, "y_2.png")
        save_run(tmp_path, Path("w.json"), PROMPT, SERVER, other)
    (tmp_path / "y_3.png.partial").write_bytes(b"ne")  # as a killed process leaves it
    assert (tmp_path / "y_1.png").is_file()
    last = RunResult("id", ui={"1": {}}, files={"1": [("x.png", b"last")]})
    save_run(tmp_path, Path("w.json"), PROMPT, SERVER, last)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"x.png", "record.json", "y_2.png", "y_9.png", "z.png.partial"}
    assert (tmp_path / "y_2.png").read_bytes() == b"the user's"


def test_a_result_with_the_records_name_does_not_take_its_place(tmp_path: Path) -> None:
    made = RunResult(
        "id", ui={"1": {}}, files={"1": [("record.json", b"a node's"), ("record.unfinished.json", b"too")]}
    )
    for _ in range(2):
        saved = save_run(tmp_path, Path("w.json"), PROMPT, SERVER, made)
        assert [path.name for path in saved] == ["record_2.json", "record.unfinished_2.json", "record.json"]
        assert (tmp_path / "record_2.json").read_bytes() == b"a node's"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a.png", "a.png"),
        ("../../a.png", "a.png"),
        ("..\\a.png", "a.png"),
        ("..", "output"),
        ("a:b|c.png", "a_b_c.png"),
        ("a" * 300 + ".png", "a" * 200 + ".png"),
        ("\u907f" * 100 + ".png", "\u907f" * 66 + ".png"),
        ("\u907f" * 100 + "." + "\u514d" * 100, "\u907f" * 66),
    ],
)
def test_what_a_server_calls_a_file_never_leads_out_of_the_folder(name: str, safe: str) -> None:
    assert safe_name(name) == safe
