"""The README's lines are a whole program that does what the README says."""

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_lines_remove_the_undesired_component() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(program, names)
    share = (names["mixture"].classify(names["x"]) == 0).float().mean()
    assert share < 0.05  # one in eight without guidance
