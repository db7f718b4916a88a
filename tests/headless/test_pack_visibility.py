"""The pack is loaded once, and nothing of the user's is copied, moved or shadowed."""

import shutil
import sys
from pathlib import Path

import pytest

from dng_core.headless.locate import Location
from dng_core.headless.server import PACK_NAME, server_options, visible_pack

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def comfyui_folder(tmp_path: Path) -> Location:
    """A folder as ComfyUI's is, with one node pack of somebody else."""
    folder = tmp_path / "ComfyUI"
    (folder / "custom_nodes" / "others").mkdir(parents=True)
    (folder / "custom_nodes" / "others" / "__init__.py").touch()
    return Location(folder, Path(sys.executable), "the test")


def copy_of_the_pack(location: Location) -> Path:
    folder = location.path / "custom_nodes" / "my-dng"
    folder.mkdir()
    for name in ("__init__.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_without_a_copy_of_the_users_own_the_pack_comes_through_a_link(
    comfyui_folder: Location, tmp_path: Path
) -> None:
    with visible_pack(comfyui_folder, ROOT, tmp_path, all_custom_nodes=False) as options:
        assert options[:3] == ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_NAME]
        link = tmp_path / "custom_nodes" / PACK_NAME
        assert link.resolve() == ROOT
        assert list(link.parent.iterdir()) == [link]
        assert str(link.parent) in Path(options[-1]).read_text()
    assert not link.exists()
    assert (ROOT / "pyproject.toml").is_file()


def test_a_link_of_the_users_own_to_this_pack_is_used(comfyui_folder: Location, tmp_path: Path) -> None:
    (comfyui_folder.path / "custom_nodes" / "linked").symlink_to(ROOT, target_is_directory=True)
    with visible_pack(comfyui_folder, ROOT, tmp_path, all_custom_nodes=False) as options:
        assert options == ["--disable-all-custom-nodes", "--whitelist-custom-nodes", "linked"]


def test_another_copy_of_the_users_own_is_left_out(comfyui_folder: Location, tmp_path: Path) -> None:
    copy = copy_of_the_pack(comfyui_folder)
    with visible_pack(comfyui_folder, ROOT, tmp_path, all_custom_nodes=False) as options:
        assert PACK_NAME in options
        assert copy.name not in options


def test_with_all_custom_nodes_a_copy_of_the_users_own_is_not_loaded_twice(
    comfyui_folder: Location, tmp_path: Path
) -> None:
    with visible_pack(comfyui_folder, ROOT, tmp_path, all_custom_nodes=True) as options:
        assert options[0] == "--extra-model-paths-config"
    copy_of_the_pack(comfyui_folder)
    with visible_pack(comfyui_folder, ROOT, tmp_path / "again", all_custom_nodes=True) as options:
        assert options == []


def test_a_library_without_the_nodes_uses_the_users_copy(comfyui_folder: Location, tmp_path: Path) -> None:
    with visible_pack(comfyui_folder, None, tmp_path, all_custom_nodes=False) as options:
        assert options == ["--disable-all-custom-nodes"]
    copy = copy_of_the_pack(comfyui_folder)
    with visible_pack(comfyui_folder, None, tmp_path, all_custom_nodes=False) as options:
        assert options[-1] == copy.name


def test_everything_a_server_writes_goes_into_its_own_folder(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = server_options(scratch, pictures)
    folders = {kind: options[options.index(f"--{kind}-directory") + 1] for kind in ("input", "output", "temp", "user")}
    assert folders.pop("input") == str(pictures)
    assert all(Path(folder).is_dir() and "scratch" in folder for folder in folders.values())


def test_further_nodes_come_through_links_beside_the_pack(comfyui_folder: Location, tmp_path: Path) -> None:
    bench = ROOT / "nodes" / "bench"
    with visible_pack(comfyui_folder, ROOT, tmp_path, all_custom_nodes=False, further=[bench]) as options:
        assert options[1:4] == ["--whitelist-custom-nodes", PACK_NAME, "dng-bench"]
        links = list((tmp_path / "custom_nodes").iterdir())
        assert {link.resolve() for link in links} == {ROOT, bench}
    assert not any(link.exists() for link in links)
    (comfyui_folder.path / "custom_nodes" / "linked").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "again").mkdir()
    with visible_pack(comfyui_folder, ROOT, tmp_path / "again", all_custom_nodes=False, further=[bench]) as options:
        assert options[1:4] == ["--whitelist-custom-nodes", "linked", "dng-bench"]
    assert (bench / "__init__.py").is_file()
