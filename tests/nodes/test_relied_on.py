"""What docs/comfyui.md says that the pack relies on is there: of a new ComfyUI, this names what is missing."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

from dng_core.headless.server import server_options

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "comfyui.md"
PACKAGES = ("comfy", "comfy_api", "comfyui_version", "latent_preview", "nodes")
SHORT = {"io": "comfy_api.latest.io", "ui": "comfy_api.latest.ui"}
ASKED_FOR = {"comfy.model_management.intermediate_dtype"}  # before it is used: ComfyUI 0.16 lacks it

SIGNATURES = {
    "comfy.samplers.CFGGuider.outer_sample": "self noise latent_image sampler sigmas denoise_mask callback "
    "disable_pbar seed",
    "comfy.samplers.calc_cond_batch": "model conds x_in timestep model_options",
    "comfy.samplers.KSampler": "model steps device sampler scheduler denoise model_options",
    "comfy.sample.fix_empty_latent_channels": "model latent_image downscale_ratio_spacial",
    "comfy.sample.prepare_noise": "latent_image seed noise_inds",
    "comfy.patcher_extension.add_wrapper_with_key": "wrapper_type key wrapper transformer_options is_model_options",
    "comfy.model_patcher.ModelPatcher.get_wrappers": "self wrapper_type key",
    "comfy.model_patcher.ModelPatcher.add_wrapper_with_key": "self wrapper_type key wrapper",
    "comfy.model_patcher.ModelPatcher.remove_wrappers_with_key": "self wrapper_type key",
    "comfy.model_patcher.ModelPatcher.get_model_object": "self name",
    "latent_preview.prepare_callback": "model steps",
    "nodes.common_ksampler": "model seed steps cfg sampler_name scheduler positive negative latent denoise "
    "disable_noise start_step last_step force_full_denoise",
}
"""Parameters in this order, of what is called by position or by name; others may stand between or behind them."""

WRITTEN = {
    "comfy/samplers.py": [
        '"sampler_calc_cond_batch_function" in model_options',
        '"sampler_post_cfg_function"',
        *("self.conds", "self.model_options", "self.model_patcher", "WrappersMP.OUTER_SAMPLE"),
        *('"denoised"', '"input"', '"conds"', '"sigma"', '"model_options"', "WrappersMP.SAMPLER_SAMPLE"),
    ],
    "comfy/model_sampling.py": ["def percent_to_sigma", "sigmas"],
    "comfy/k_diffusion/sampling.py": ["def sample_euler_ancestral("],
    "server.py": [
        *("self.client_id", "self.last_node_id", "self.sockets", "self.prompt_queue"),
        "def send_sync(self, event, data, sid=None)",
    ],
}
"""What only shows while a run goes on, as it stands in the source."""


def names_in(file: Path) -> set[str]:
    """Every name that a file of the pack takes from ComfyUI, with its dots."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).split(".")[0] in PACKAGES:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES}
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"\w+(\.\w+)+", dotted := ast.unparse(node)):
            first, _, rest = dotted.partition(".")
            if first in SHORT or first in ("comfy", "latent_preview"):
                found.add(f"{SHORT.get(first, first)}.{rest}")
    return found


def used() -> set[str]:
    files = [ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py")]
    return set().union(*map(names_in, files))


def resolve(name: str) -> object:
    """What a dotted name means; raises AttributeError or ImportError where it means nothing."""
    parts = name.split(".")
    value = importlib.import_module(parts[0])
    for count, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:count]))
        value = getattr(value, part)
    return value


def missing(name: str) -> bool:
    try:
        resolve(name)
    except (AttributeError, ImportError):
        return True
    return False


def test_every_name_that_the_pack_takes_from_comfyui_is_there(pack):
    names = used()
    assert {"comfy.samplers.calc_cond_batch", "comfy_api.latest.io.Schema", "nodes.common_ksampler"} <= names
    assert sorted(name for name in names - ASKED_FOR if missing(name)) == []
    assert missing("comfy.samplers.no_such_thing") and missing("comfy.no_such_module")


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_is_called_takes_what_it_is_given(pack, name):
    asked = SIGNATURES[name].split()
    taken = [parameter for parameter in inspect.signature(resolve(name)).parameters if parameter in asked]
    assert taken == [parameter for parameter in asked if parameter != "self" or "self" in taken]


@pytest.mark.parametrize("file", WRITTEN)
def test_what_only_a_run_shows_is_written_in_the_source(comfyui_location, file):
    source = (comfyui_location.path / file).read_text(encoding="utf-8")
    assert [text for text in WRITTEN[file] if text not in source] == []


def test_comfyui_has_the_options_by_which_a_server_is_started(comfyui, tmp_path):
    options = importlib.import_module("comfy.cli_args").parser._option_string_actions
    asked = ["--disable-all-custom-nodes", "--whitelist-custom-nodes", "--extra-model-paths-config", "--cpu", "--port"]
    asked += [*server_options(tmp_path, None), "--front-end-root"]
    assert [option for option in asked if option.startswith("--") and option not in options] == []


def test_the_document_names_every_file_that_is_relied_on(pack, comfyui_location):
    rows = re.findall(r"^\| (`.*?`) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`([^`]+\.py)`", row)}
    assert [name for name in named if not (comfyui_location.path / name).is_file()] == []
    assert set(WRITTEN) <= named
    for name in used():
        parts = name.split(".")
        paths = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
        assert any(f"{path}{ending}" in named for path in paths for ending in (".py", "/__init__.py")), name
