"""The README's lines are a whole program that does what the README says."""

import re
import runpy
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_lines_remove_the_undesired_component(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    file = tmp_path / "program.py"
    file.write_text(program, encoding="utf-8")
    torch.manual_seed(0)
    names = runpy.run_path(str(file))
    share = (names["mixture"].classify(names["x"]) == 0).float().mean()
    assert share < 0.05  # one in eight without guidance
