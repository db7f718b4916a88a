"""The mathematics stands alone: it imports without ComfyUI, and imports nothing but torch."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROBE = """
import json, sys
sys.path.insert(0, sys.argv[1])

class NoComfyUI:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("comfy", "comfy_api", "comfy_extras", "nodes", "folder_paths", "execution"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, NoComfyUI())
import torch
before = set(sys.modules)
import importlib, pkgutil
import dng_core
for module in pkgutil.iter_modules(dng_core.__path__, "dng_core."):
    if not module.ispkg and module.name != "dng_core.__main__":
        importlib.import_module(module.name)
assert {"posterior", "guidance", "baselines", "methods"} <= set(vars(dng_core)), vars(dng_core)
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def test_the_mathematics_imports_without_comfyui_and_needs_only_torch(tmp_path):
    # A folder that holds nothing but the package: the checkout's own nodes/ must not be importable either.
    (tmp_path / "dng_core").symlink_to(ROOT / "dng_core", target_is_directory=True)
    done = subprocess.run(
        [sys.executable, "-I", "-c", PROBE, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    imported = set(json.loads(done.stdout))
    assert imported - set(sys.stdlib_module_names) == {"dng_core"}
