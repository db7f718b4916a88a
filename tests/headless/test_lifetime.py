"""Whatever happens to the runner or to ComfyUI, the user gets a clear message and no process is left behind."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from dng_core.headless import client
from dng_core.headless import server as servers
from dng_core.headless.client import run_workflow
from dng_core.headless.errors import HeadlessError
from dng_core.headless.locate import MANAGED, Location
from dng_core.headless.process import start, stop
from dng_core.headless.server import comfyui_server, free_port, running_server

from .conftest import FAKE, all_end, wait_for

CPU = ["--cpu"]  # spares the search for a GPU, which imports torch


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the fake ComfyUI notes its own process id and its child's."""
    file = tmp_path / "pids"
    monkeypatch.setenv("FAKE_PIDS", str(file))
    return file


@pytest.fixture
def hanging_run(
    dng: Callable[..., subprocess.Popen[str]], workflow_file: Callable[..., Path], pids: Path, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A `dng run` in the middle of a workflow, and the processes that it started."""
    log = tmp_path / "out" / "comfyui.log"
    options = ["--comfyui", str(FAKE), "--cpu", "--output", str(tmp_path / "out")]
    # A killed run cannot delete its temporary folder: have it where pytest will.
    runner = dng(["run", str(workflow_file("Hang")), *options], {**os.environ, "TMPDIR": str(tmp_path)})
    assert wait_for(lambda: log.is_file() and pids.is_file() and len(pids.read_text().split()) == 2)
    yield runner, [int(pid) for pid in pids.read_text().split()]
    runner.kill()
    runner.communicate()


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_stopped_run_leaves_no_process(
    hanging_run: tuple[subprocess.Popen[str], list[int]], name: str, status: int, tmp_path: Path
) -> None:
    runner, started = hanging_run
    log = tmp_path / "out" / "comfyui.log"
    assert wait_for(lambda: "got prompt" in log.read_text())
    runner.send_signal(getattr(signal, name))
    _, messages = runner.communicate(timeout=30)
    assert runner.returncode == status
    assert "dng: stopped" in messages
    assert "Traceback" not in messages
    assert all_end(started)
    assert not (tmp_path / "out" / "record.json").exists()


def test_an_output_folder_that_cannot_be_written_is_named_before_anything_starts(
    dng: Callable[..., subprocess.Popen[str]], workflow_file: Callable[..., Path], tmp_path: Path, pids: Path
) -> None:
    (tmp_path / "file").touch()
    options = ["--comfyui", str(FAKE), "--cpu", "--output", str(tmp_path / "file" / "out")]
    run = dng(["run", str(workflow_file("Done")), *options], os.environ)
    _, messages = run.communicate(timeout=60)
    assert run.returncode == 1
    assert f"{tmp_path / 'file' / 'out'} cannot be written" in messages
    assert "--output" in messages
    assert not pids.exists()


def test_a_killed_run_leaves_no_process(hanging_run: tuple[subprocess.Popen[str], list[int]]) -> None:
    runner, started = hanging_run
    runner.kill()
    assert all_end(started)


def test_a_run_stopped_while_comfyui_starts_leaves_no_process(
    hanging_run: tuple[subprocess.Popen[str], list[int]],
) -> None:
    runner, started = hanging_run
    runner.send_signal(signal.SIGINT)
    runner.communicate(timeout=30)
    assert runner.returncode == 130
    assert all_end(started)


def test_a_run_after_a_stopped_one_is_unaffected(
    hanging_run: tuple[subprocess.Popen[str], list[int]],
    dng: Callable[..., subprocess.Popen[str]],
    workflow_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    runner, _ = hanging_run
    runner.kill()
    runner.communicate()
    options = ["--comfyui", str(FAKE), "--cpu", "--output", str(tmp_path / "out")]
    again = dng(["run", str(workflow_file("Done")), *options], os.environ)
    _, messages = again.communicate(timeout=60)
    assert again.returncode == 0, messages
    assert (tmp_path / "out" / "record.json").is_file()


def test_a_comfyui_that_ignores_requests_to_stop_is_killed(
    fake: Location, pids: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_START", "stubborn")
    with (tmp_path / "log").open("wb") as log:
        process = start(fake.python, [fake.path / "main.py", "--port", str(free_port())], log)
    assert wait_for(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
    stop(process, grace_seconds=0.5)
    assert all_end(int(pid) for pid in pids.read_text().split())


def test_an_error_in_the_callers_code_stops_comfyui(fake: Location, pids: Path) -> None:
    with pytest.raises(ZeroDivisionError), comfyui_server(fake, options=CPU):
        _ = 1 / 0
    assert all_end(int(pid) for pid in pids.read_text().split())


def test_a_server_that_dies_midway_is_reported_with_the_end_of_its_log(fake: Location) -> None:
    prompt = {"1": {"class_type": "Die", "inputs": {}}}
    with comfyui_server(fake, options=CPU) as server, pytest.raises(HeadlessError) as caught:
        run_workflow(server, prompt)
    assert "ended unexpectedly (exit status 9)" in str(caught.value)
    assert "out of memory, says the fake ComfyUI" in str(caught.value)


def test_a_server_that_dies_of_a_full_disk_is_reported_without_its_log(
    fake: Location, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0 if folder == tmp_path else 1 << 30))
    options = {"options": CPU, "log": tmp_path / "comfyui.log"}
    with comfyui_server(fake, **options) as server, pytest.raises(HeadlessError) as caught:
        run_workflow(server, {"1": {"class_type": "Die", "inputs": {}}})
    assert caught.value.problem == f"ComfyUI ended because the disk of {tmp_path} is full."
    assert "--output" in caught.value.remedy


def test_a_server_that_does_not_start_is_reported_with_the_end_of_its_log(
    fake: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_START", "die")
    with pytest.raises(HeadlessError, match=r"exit status 3.*\n.*has a bad day"), comfyui_server(fake, options=CPU):
        pass


@pytest.mark.parametrize(
    ("origin", "remedy"), [(MANAGED, "Repair it with `dng install --reinstall`"), ("the tests", "--comfyui-python")]
)
def test_a_package_that_comfyui_lacks_is_named_with_the_remedy(
    fake: Location, monkeypatch: pytest.MonkeyPatch, origin: str, remedy: str
) -> None:
    monkeypatch.setenv("FAKE_START", "lack")
    with pytest.raises(HeadlessError) as caught, comfyui_server(replace(fake, origin=origin), options=CPU):
        pass
    assert "ModuleNotFoundError: No module named 'a_package_that_is_missing'" in caught.value.problem.splitlines()[0]
    assert remedy in caught.value.remedy and "memory" not in str(caught.value)


def test_a_wished_for_port_that_is_in_use_is_named(fake: Location) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(HeadlessError, match=rf"Port {port} is in use[\s\S]*Leave out --port"),
            comfyui_server(fake, options=CPU, port=port),
        ):
            pass


def test_losing_the_port_to_another_program_tries_another(
    fake: Location, pids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_START", "taken")
    with comfyui_server(fake, options=CPU) as server:
        assert server.stats["system"]["comfyui_version"] == "fake"


def test_another_comfyui_on_the_same_port_is_not_taken_for_ours(
    fake: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    with comfyui_server(fake, options=CPU) as other:
        monkeypatch.setattr(servers, "START_SECONDS", 1.0)
        with pytest.raises(HeadlessError, match="did not answer"):
            servers.wait_until_ready(servers.Server(other.url), ["--user-directory", "ours"])


def test_why_a_pack_did_not_load_is_found_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    noise = ["noise"] * 100
    traceback = ["Traceback (most recent call last):", "ImportError: no module named tidy"]
    log.write_text("\n".join([*noise, *traceback, "\x1b[33mCannot import x module for custom nodes: no", *noise]))
    told = servers.Server("http://127.0.0.1:1", log=log).loading_errors()
    assert "ImportError: no module named tidy\n  | Cannot import x" in told
    assert told.count("noise") < 30
    log.write_text("\n".join(noise))
    assert servers.Server("http://127.0.0.1:1", log=log).loading_errors() == ""


def test_a_server_url_that_nobody_answers_at_is_named() -> None:
    with pytest.raises(HeadlessError, match=r"No ComfyUI answers at http://127\.0\.0\.1:\d+[\s\S]*--server"):
        running_server(f"127.0.0.1:{free_port()}")


def test_giving_up_on_a_running_server_cancels_our_prompt_alone(fake: Location) -> None:
    with comfyui_server(fake, options=CPU) as ours:
        remote = running_server(ours.url)
        with pytest.raises(HeadlessError, match=r"did not end in 1\.0 s"):
            run_workflow(remote, {"1": {"class_type": "Hang", "inputs": {}}}, timeout=1.0)
        cancelled = running_server(ours.url).stats["system"]["cancelled"]
    assert len(cancelled) == 1


def test_an_interruption_by_another_user_of_the_server_is_told(fake: Location) -> None:
    with comfyui_server(fake, options=CPU) as server, pytest.raises(HeadlessError, match="interrupted at"):
        run_workflow(server, {"1": {"class_type": "Interrupted", "inputs": {}}})


@pytest.mark.parametrize(
    ("behaviour", "node", "told"),
    [("nested", "Done", "answers 200 with something other"), ("", "Nest", "reports something other")],
)
def test_json_that_is_nested_too_deeply_is_no_answer(
    fake: Location, monkeypatch: pytest.MonkeyPatch, behaviour: str, node: str, told: str
) -> None:
    monkeypatch.setenv("FAKE_START", behaviour)
    with comfyui_server(fake, options=CPU) as server, pytest.raises(HeadlessError, match=told):
        run_workflow(server, {"1": {"class_type": node, "inputs": {}}})


def test_a_server_that_vanishes_is_reported(fake: Location, monkeypatch: pytest.MonkeyPatch, pids: Path) -> None:
    monkeypatch.setattr("dng_core.headless.client.LISTEN_SECONDS", 0.2)
    with comfyui_server(fake, options=CPU) as ours:
        remote = running_server(ours.url)  # as if it ran elsewhere: nothing but the connection tells of its end
        with pytest.raises(HeadlessError, match="no longer answers"):
            run_workflow(remote, {"1": {"class_type": "Die", "inputs": {}}})


@pytest.mark.parametrize("ours", [True, False])
def test_a_server_that_hangs_is_reported_with_what_it_did_last(
    fake: Location, monkeypatch: pytest.MonkeyPatch, ours: bool
) -> None:
    assert client.HISTORY_SECONDS + client.HUNG_SECONDS <= 180
    for name in ("LISTEN_SECONDS", "HISTORY_SECONDS", "HUNG_SECONDS"):
        monkeypatch.setattr(client, name, 0.5)
    monkeypatch.setattr(client, "CANCEL_SECONDS", 0.5)
    with comfyui_server(fake, options=CPU) as started:
        server = started if ours else running_server(started.url)
        with pytest.raises(HeadlessError, match=r"has not answered for [\s\S]*try again") as caught:
            run_workflow(server, {"1": {"class_type": "Freeze", "inputs": {}}})
    assert ("deep in thought, says the fake ComfyUI" in str(caught.value)) == ours


def test_a_request_without_an_answer_is_not_taken_for_the_end_of_the_users_time(
    fake: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(client, "CANCEL_SECONDS", 0.2)
    monkeypatch.setenv("FAKE_START", "slow")
    with comfyui_server(fake, options=CPU) as server, pytest.raises(HeadlessError, match="has not answered for 0 s"):
        run_workflow(server, {"1": {"class_type": "Done", "inputs": {}}}, timeout=60)


def test_a_log_is_not_written_through_a_link_that_lies_there(fake: Location, tmp_path: Path) -> None:
    precious, log = tmp_path / "precious", tmp_path / "comfyui.log"
    precious.write_text("the user's")
    log.symlink_to(precious)
    with comfyui_server(fake, options=CPU, log=log):
        pass
    assert precious.read_text() == "the user's"
    assert not log.is_symlink()


def test_the_packs_root_is_kept_from_comfyuis_path(fake: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root}{os.pathsep}/elsewhere")
    with comfyui_server(fake, options=CPU) as server:
        path = server.stats["system"]["path"]
    assert path[0] == str(FAKE)
    assert str(root) not in path
    assert "/elsewhere" in path


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_stopped_install_leaves_no_process_and_is_not_taken_for_whole(
    dng: Callable[..., subprocess.Popen[str]], tmp_path: Path, name: str
) -> None:
    environment = {**os.environ, "DNG_CACHE": str(tmp_path)}
    install = dng(["install"], environment)
    assert wait_for(lambda: len(psutil.Process(install.pid).children(recursive=True)) >= 2)
    started = psutil.Process(install.pid).children(recursive=True)
    install.send_signal(getattr(signal, name))
    install.communicate(timeout=30)
    assert all_end(process.pid for process in started)
    assert list(tmp_path.rglob("installed.json")) == []
