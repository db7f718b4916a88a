"""Say what is broken in a Python environment, one line for each problem; nothing is printed where all is well.

The environment's own Python runs this file as a script, so only the standard library is imported at the top.
"""

import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

IMPORTED = ("torch", "torchvision", "torchaudio", "aiohttp", "tqdm", "einops", "safetensors", "PIL", "yaml")


def problems() -> Iterator[str]:
    """Packages of which files are gone, else modules that cannot be imported."""
    whole = True
    for package in importlib.metadata.distributions():
        files = [file for file in package.files or () if file.suffix != ".pyc"]
        gone = [file for file in files if not Path(file.locate()).exists()]
        if gone:
            whole = False
            yield f"{package.name} lacks {len(gone)} of its {len(files)} files, for example {gone[0]}"
    for name in IMPORTED if whole else ():
        try:
            importlib.import_module(name)
        except Exception as error:
            yield f"{name} cannot be imported: {type(error).__name__}: {error}"


if __name__ == "__main__":
    for problem in problems():
        print(problem)
