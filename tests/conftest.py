"""What all tests share: dng_core by its own name, ComfyUI in this process, the pack as ComfyUI loads it, and a server.

The checkout's folder never gets onto sys.path: its nodes/ would hide ComfyUI's module `nodes`. dng_core and the pack
are loaded by their paths instead.
"""

import contextlib
import errno
import gzip
import hashlib
import importlib
import importlib.util
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

# A machine that pauses must not fail a property: none of them is about time.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]


def load_package(folder: Path, name: str) -> ModuleType:
    """Load the package in `folder` as the module `name`, without touching sys.path."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    return package


load_package(ROOT / "dng_core", "dng_core")

from dng_core.headless import server as headless_server  # noqa: E402
from dng_core.headless.install import managed  # noqa: E402
from dng_core.headless.locate import Location, comfyui_folder  # noqa: E402


@pytest.fixture(scope="session")
def comfyui_location() -> Location:
    """The ComfyUI that the tests use, run by the Python that runs the tests: DNG_COMFYUI, else the installed one."""
    named = os.environ.get("DNG_COMFYUI")
    if not named and not managed().is_whole():
        pytest.fail("There is no ComfyUI to test with: run `python -m dng_core test`, or set DNG_COMFYUI.")
    folder = comfyui_folder(Path(named), "DNG_COMFYUI") if named else managed().comfyui
    return Location(folder, Path(sys.executable), "the tests")


@pytest.fixture(scope="session")
def comfyui(comfyui_location: Location) -> ModuleType:
    """ComfyUI in this process, ready for real models and samplers; returns its package `comfy`."""
    import torch

    sys.path.insert(0, str(comfyui_location.path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    import comfy.model_management
    import comfy.sample
    import comfy.samplers

    # As main.py does, since the module `nodes` of older releases puts the folder comfy/ first, which has a utils.py.
    importlib.import_module("utils.extra_config")
    return comfy


@pytest.fixture(scope="session")
def pack(comfyui: ModuleType) -> ModuleType:
    """This node pack, loaded as ComfyUI does it: a package named after its path.

    Its modules are imported with `importlib.import_module(pack.__name__ + ".nodes.bridge")`. Their dng_core is
    another copy than the tests' own `dng_core`: compare values, not classes.
    """
    return load_package(ROOT, str(ROOT).replace(".", "_x_"))


@pytest.fixture(scope="session")
def comfyui_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of the session's server."""
    return tmp_path_factory.mktemp("comfyui") / "comfyui.log"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, empty at first, in which the session's server looks for checkpoints too."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def comfyui_server(
    comfyui_location: Location, comfyui_log: Path, checkpoints: Path
) -> Iterator[headless_server.Server]:
    """A real ComfyUI server with this pack loaded, started once for the whole session.

    Run a workflow on it with `dng_core.headless.client.run_workflow(comfyui_server, prompt)`.
    """
    paths = checkpoints / "extra_model_paths.yaml"
    paths.write_text(json.dumps({"tests": {"checkpoints": str(checkpoints)}}), encoding="utf-8")  # JSON is YAML
    options = ["--extra-model-paths-config", str(paths)]
    if page := os.environ.get("DNG_FRONT_END"):  # of another release: dng test --frontend-version
        options += ["--front-end-root", page]
    with headless_server.comfyui_server(comfyui_location, ROOT, log=comfyui_log, options=options) as server:
        yield server


@pytest.fixture
def disk_full_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Within the context, so many files can be written; the next finds no space."""

    @contextlib.contextmanager
    def full(files: int) -> Iterator[None]:
        real, written = os.fsync, []

        def fsync(number: int) -> None:
            written.append(number)
            if len(written) > files:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(number)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            yield

    return full


@pytest.fixture
def mnist_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 64 + 64 random "digits" in MNIST's file format, accepted by their own checksums."""
    import torch

    from dng_core.models import mnist

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
