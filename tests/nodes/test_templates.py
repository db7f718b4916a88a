"""The templates of large models, node by node by ComfyUI's own classes and the pack's, on small models.

The loaders give small models of the same architectures with random weights, a small text encoder and a small VAE. So
wires, sockets and settings are run as they ship, and the large checkpoints are not.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "workflows" / "api"
# Where ComfyUI keeps the nodes of these templates that are not in nodes.py.
EXTRAS = ("nodes_sd3", "nodes_model_advanced", "nodes_hunyuan", "nodes_video")
OWN = ("sampling", "concepts", "plot")
SAVERS = ("SaveImage", "SaveVideo")
SMALL = {"width": 64, "height": 64, "length": 9, "steps": 4}
# The real one but for its size: its modulation needs a width of at least 256.
Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,
    "cap_feat_dim": 16,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 8,
    "n_kv_heads": 8,
    "multiple_of": 16,
    "axes_dims": [8, 12, 12],
    "axes_lens": [512, 64, 64],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}


class Template:
    """A template in its API form, run node by node. ``models`` are given by the loaders, in turn."""

    def __init__(self, name: str, networks: ModuleType, pack: ModuleType, models: list[Any], vae: Any) -> None:
        self.prompt = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        self.models, self.clip, self.vae = iter(models), networks.small_clip(), vae
        self.classes = dict(importlib.import_module("nodes").NODE_CLASS_MAPPINGS)
        modules = [importlib.import_module(f"comfy_extras.{extra}") for extra in EXTRAS]
        modules += [importlib.import_module(f"{pack.__name__}.nodes.{part}") for part in OWN]
        for module in modules:
            self.classes |= getattr(module, "NODE_CLASS_MAPPINGS", {})
            for node in vars(module).values():
                if getattr(node, "__module__", "") == module.__name__ and hasattr(node, "GET_SCHEMA"):
                    self.classes[node.GET_SCHEMA().node_id] = node
        self.done: dict[str, tuple] = {}
        for key, node in self.prompt.items():
            if node["class_type"] not in SAVERS:
                self.outputs(key)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The inputs of all nodes of a type, as they were executed."""
        return [node["inputs"] for node in self.prompt.values() if node["class_type"] == kind]

    def outputs(self, key: str) -> tuple:
        if key not in self.done:
            self.done[key] = self._run(self.prompt[key])
        return self.done[key]

    def result(self, kind: str) -> tuple:
        """The outputs of the last node of a type."""
        return self.outputs([key for key, node in self.prompt.items() if node["class_type"] == kind][-1])

    def _run(self, node: dict[str, Any]) -> tuple:
        kind, inputs = node["class_type"], node["inputs"]
        given = {"UNETLoader": lambda: (next(self.models),), "CLIPLoader": lambda: (self.clip,)}
        given |= {"VAELoader": lambda: (self.vae,)}
        given |= {"CheckpointLoaderSimple": lambda: (next(self.models), self.clip, self.vae)}
        if kind in given:
            return given[kind]()
        if kind.startswith(("Empty", "KSampler")):
            inputs |= {name: value for name, value in SMALL.items() if name in inputs}
        if inputs.get("end_at_step") == 10:
            inputs["end_at_step"] = 2
        if inputs.get("start_at_step") == 10:
            inputs["start_at_step"] = 2
        found = self.classes[kind]
        declared = found.INPUT_TYPES()
        known = {*declared.get("required", {}), *declared.get("optional", {})}
        # ComfyUI leaves out a value that its node does not know (an older release). A choice's inputs have dots.
        values = {
            name: self.outputs(value[0])[value[1]] if isinstance(value, list) else value
            for name, value in inputs.items()
            if name in known or isinstance(value, list) or "." in name
        }
        if hasattr(found, "GET_SCHEMA"):
            return found.execute(**values).args
        return getattr(found(), found.FUNCTION)(**values)


def small_vae(networks: ModuleType, comfyui: Any, network: torch.nn.Module) -> Any:
    """The VAE that ComfyUI makes of a small network's weights, drawn at random."""
    networks.randomize(network, 0)
    return comfyui.sd.VAE(sd=network.state_dict())


@pytest.fixture
def run(bench: Any, networks: ModuleType, pack: ModuleType, comfyui: Any) -> Any:
    taesd = importlib.import_module("comfy.taesd.taesd").TAESD
    taehv = importlib.import_module("comfy.taesd.taehv").TAEHV

    def start(name: str) -> Template:
        if name == "sdxl_ksampler":
            network = networks.SDXL_UNET | {"adm_in_channels": 16 + 6 * 256}
            models, vae = [networks.Family("SDXL", network, ()).build()], taesd()
        elif name == "z_image_turbo_cfg_1":
            models, vae = [networks.Family("ZImage", Z_IMAGE, ()).build()], taesd(latent_channels=16)
        else:
            models = [networks.Family("WAN21_T2V", networks.WAN, ()).build(seed=seed) for seed in (0, 1)]
            vae = taehv(latent_channels=16)
        return Template(name, networks, pack, models, small_vae(networks, comfyui, vae))

    return start


@pytest.mark.parametrize("name", ["sdxl_ksampler", "z_image_turbo_cfg_1"])
def test_a_template_of_a_large_model_draws_a_picture(run: Any, name: str) -> None:
    template = run(name)
    samples, trace = template.result("KSamplerDNG")
    assert bool(samples["samples"].isfinite().all())
    assert trace.posterior.shape[1:] == (1, 1) and len(trace.posterior) >= SMALL["steps"]
    assert bool(trace.posterior.isfinite().all())
    (picture,) = template.result("VAEDecode")
    assert picture.shape == (1, 64, 64, 3) and bool(picture.isfinite().all())


def test_at_cfg_1_the_prompt_is_compared_with_the_prompt_and_the_thing(bench: Any, run: Any) -> None:
    template = run("z_image_turbo_cfg_1")
    (sampler,) = template.of("KSamplerDNG")
    assert sampler["cfg"] == 1 and "unconditional" not in sampler
    assert sampler["positive"][0] == sampler["negative"][0]
    positive, negative = template.outputs(sampler["positive"][0])
    assert not torch.equal(positive[0][0], negative[0][0])
    assert bench.node_inputs.concepts_from(negative, {})[0].compared_with == "positive"


def test_two_stages_of_wan_share_one_posterior(run: Any) -> None:
    """The second stage's trace begins with the first's, and its model is another."""
    template = run("wan_2_2_two_stages")
    first, second = template.of("KSamplerAdvancedDNG")
    assert {k: v for k, v in first.items() if k.startswith("settings")} == {
        k: v for k, v in second.items() if k.startswith("settings")
    }
    one, two = (key for key, node in template.prompt.items() if node["class_type"] == "KSamplerAdvancedDNG")
    assert second["previous_trace"] == [one, 1] and second["latent_image"] == [one, 0]
    assert template.outputs(first["model"][0]) != template.outputs(second["model"][0])
    (_, upper), (samples, lower) = template.outputs(one), template.outputs(two)
    taken = len(upper.posterior)
    assert 0 < taken < len(lower.posterior)
    assert torch.equal(lower.posterior[:taken], upper.posterior)
    assert samples["samples"].shape == (1, 16, 3, 8, 8) and bool(samples["samples"].isfinite().all())
    (frames,) = template.result("VAEDecode")
    assert frames.shape == (9, 64, 64, 3) and bool(frames.isfinite().all())
