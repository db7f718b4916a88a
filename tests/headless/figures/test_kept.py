"""What a figure measured already is kept in a file, which may be damaged."""

from pathlib import Path

import pytest

from dng_core.headless.errors import HeadlessError
from dng_core.headless.figures.kept import Kept


def test_a_value_is_measured_once(tmp_path: Path) -> None:
    assert Kept(tmp_path / "kept.json").get("a", lambda: 1) == 1
    assert Kept(tmp_path / "kept.json").get("a", lambda: 2) == 1


@pytest.mark.parametrize("content", ["{", "[1]", "7", "[" * 100_000])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, content: str) -> None:
    (tmp_path / "kept.json").write_text(content)
    with pytest.raises(HeadlessError, match=r"kept\.json is damaged[\s\S]*Remove it"):
        Kept(tmp_path / "kept.json")
