"""Which folder of dng_core may import which: everything the mathematics, and nothing the command line."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dng_core"
MATHEMATICS = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "files", "calibration_files"}
ALLOWED = {
    "": set(),
    "plots": {"plots"},
    "models": {"models", "files"},
    "studies": {"studies", "models", "plots", "files", "calibration_files"},
    "headless": {"headless", "plots", "files", "__version__"},
}


def imported(path: Path) -> Iterator[str]:
    """What a module imports of dng_core: the first part of each name below it."""
    here = ("dng_core", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            full = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            names = [[*filter(None, full), alias.name] for alias in node.names]
            yield from (name[1] for name in names)


@pytest.mark.parametrize("folder", ALLOWED)
def test_arrows_go_one_way(folder):
    paths = PACKAGE.glob("*.py") if not folder else (PACKAGE / folder).rglob("*.py")
    for path in paths:
        if folder or path.stem in MATHEMATICS:
            assert set(imported(path)) <= MATHEMATICS | ALLOWED[folder], path


def test_only_headless_spells_the_ids_of_nodes():
    for path in PACKAGE.rglob("*.py"):
        if PACKAGE / "headless" not in path.parents:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts = {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
            assert not {"KSampler", "KSamplerDNG", "DynamicNegativeGuidance", "DNGGuider"} & texts, path
