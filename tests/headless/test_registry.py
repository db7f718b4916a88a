"""What is published to the Comfy registry: data that its client accepts, and an archive with what a user needs."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMFY = PROJECT["tool"]["comfy"]
# As comfy-cli checks it (registry/config_parser.py); it drops a bound of any other form with a warning.
BOUND = re.compile(r"(==|>=|<=|!=|~=|>|<)\d+\.\d+\.\d+")
ARCHIVE_BYTES = 28_000_000  # nearly all of it are the weights of six small models: a choice


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"the checkout is not a git repository: {done.stderr.strip()}")
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def archive() -> set[str]:
    """The files that would be published: what git tracks, less what .comfyignore names (in git's own syntax)."""
    left_out = git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore")
    return set(git("ls-files")) - set(left_out)


def test_the_metadata_is_whole_and_in_the_registrys_form() -> None:
    project = PROJECT["project"]
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,99}", project["name"])
    assert not project["name"].startswith("comfy")
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["description"] and project["license"] == "MIT"
    assert set(project["urls"]) == {"Repository", "Documentation", "Bug Tracker"}  # by these names the registry reads
    assert all(address.startswith("https://") for address in project["urls"].values())
    assert project["requires-python"].startswith(">=")
    assert COMFY["PublisherId"] and COMFY["DisplayName"]
    assert all(BOUND.fullmatch(bound) for bound in COMFY["requires-comfyui"].split(","))
    assert "web" not in COMFY  # WEB_DIRECTORY says it: both would serve the same scripts twice


def test_the_oldest_comfyui_is_the_same_everywhere() -> None:
    """What the registry, ComfyUI's log, the README and the changelog say, and what the tests are run with."""
    (oldest,) = re.findall(r'^OLDEST_COMFYUI = "(.*)"', (ROOT / "__init__.py").read_text(encoding="utf-8"), re.M)
    assert COMFY["requires-comfyui"] == f">={oldest}"
    assert f"ComfyUI ({oldest} or newer)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"ComfyUI {oldest} and newer" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_icon_and_banner_are_files_of_this_repository_in_the_registrys_shapes() -> None:
    for key, shape in (("Icon", 1), ("Banner", 21 / 9)):
        path = ROOT / COMFY[key].split("/main/")[1]
        with Image.open(path) as picture:
            assert picture.width / picture.height == pytest.approx(shape, rel=0.01)
        assert path.stat().st_size < 200_000


def test_the_page_that_documents_the_pack_is_a_file_of_this_repository() -> None:
    assert (ROOT / PROJECT["project"]["urls"]["Documentation"].split("/main/")[1]).is_file()


def test_the_scripts_extension_has_the_name_that_the_registry_shows() -> None:
    """As comfy-test checks it, so that no two packs register the same name."""
    shown = re.sub(r"[^a-z0-9]+", "", COMFY["DisplayName"].lower())
    for script in (ROOT / "web").rglob("*.js"):
        names = re.findall(r'registerExtension\(\{\s*name: "([^"]+)"', script.read_text(encoding="utf-8"))
        assert names and all(name.startswith(f"{shown}.") for name in names), script.name


def test_sources_can_be_read_and_file_names_written_on_every_system() -> None:
    """Windows opens a source as cp1252 unless told otherwise, and its file names know neither case nor these signs."""
    names = git("ls-files")
    for name in (name for name in names if name.endswith(".py")):
        (ROOT / name).read_text(encoding="utf-8").encode("cp1252")
    assert len({name.lower() for name in names}) == len(names)
    reserved = re.compile(r'[<>:"|?*\\]|[. ](/|$)|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)', re.IGNORECASE)
    assert [name for name in names if reserved.search(name) or len(name) > 150] == []


def test_text_is_read_and_written_as_utf_8_wherever_it_is() -> None:
    """Without an encoding, Python takes the system's, which is cp1252 on many a Windows."""
    unnamed = []
    for name in (name for name in git("ls-files") if name.endswith(".py") and not name.startswith("tests/")):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                text = node.func.attr in ("read_text", "write_text")
                if text and "encoding" not in {keyword.arg for keyword in node.keywords}:
                    unnamed.append(f"{name}:{node.lineno}")
    assert unnamed == []


def test_the_citation_is_of_this_version_and_address() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {PROJECT['project']['version']}\n" in citation
    assert f"\nrepository-code: {PROJECT['project']['urls']['Repository']}\n" in citation


def test_a_tag_publishes_this_project_and_nothing_else_does() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v*.*.*"]}}  # YAML reads the key `on` as true
    (job,) = workflow["jobs"].values()
    check = job["steps"][1]["run"]
    for name in git("grep", "-l", "PUBLISHER", "--", "*.toml", "*.cff", "README.md"):
        assert name in check
    assert job["steps"][-1]["with"] == {"personal_access_token": "${{ secrets.REGISTRY_ACCESS_TOKEN }}"}


def test_the_archive_has_what_comfyui_loads_and_no_tests(archive: set[str]) -> None:
    needed = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "nodes/__init__.py"}
    needed |= {"web/live_chart.js", "web/translated_tooltips.js", "web/docs/KSamplerDNG.md"}
    needed |= {"web/docs/KSamplerDNG/zh.md", "web/docs/images/compare.png"}
    needed |= {"locales/zh/nodeDefs.json", "workflows/mnist_class_removal.json", "workflows/mnist_class_removal.jpg"}
    needed |= {f"subgraphs/{path.name}" for path in (ROOT / "subgraphs").glob("*.json")}
    # Load Pixel Model and Class Report offer all of them.
    needed |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "dng_core" / "models" / "weights").iterdir()}
    assert needed <= archive
    assert not [
        name for name in archive if name.startswith(("tests/", "docs/", "nodes/bench/", ".ci/", ".git", "CITATION"))
    ]


def test_the_archive_is_small(archive: set[str]) -> None:
    assert sum((ROOT / name).stat().st_size for name in archive) < ARCHIVE_BYTES
