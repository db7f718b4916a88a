"""The oracle in a real ComfyUI: prompts that sample it through any node, and their reports, each measured once."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...methods import MethodSettings
from ...settings import Settings
from ..client import run_workflow
from ..server import Server
from ..workflow import Prompt
from .kept import Kept

ORACLE_SETTINGS = Settings(prior=1 / 8)
"""The prior is the undesired's true share: one of eight equally likely components."""
Node = Literal["stock", "stock guider", "ksampler", "guider", "patch"]


@dataclass(frozen=True)
class Task:
    """What is sampled, and how: the mixture (see the Oracle nodes), its conditions, and the sampler's inputs."""

    sampler: str = "euler_ancestral"
    scheduler: str = "karras"
    steps: int = 30
    samples: int = 2000
    seed: int = 0
    prediction: str = "epsilon"
    kind: str = "components"
    components: int = 8
    positive: str = "all"
    forbidden: str = "0"
    cfg: float = 1.0


@dataclass(frozen=True)
class OracleRun:
    """One sampling run of a task: through which node, and how it is guided ("stock" nodes are not).

    ``negative``: the conditions to avoid, one concept each. ``baseline``: the name of the run to compare with.
    """

    node: Node
    settings: MethodSettings = ORACLE_SETTINGS
    negative: tuple[str, ...] = ("0",)
    reference: str = "auto"
    baseline: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)


UNGUIDED = OracleRun("stock")


def concept_settings(settings: MethodSettings) -> dict[str, Any]:
    """The inputs of a DNG node that stand for ``settings``; DNG's multiply from the start, as in the paper."""
    given = asdict(settings)
    if isinstance(settings, Settings):
        del given["evidence_above"]
        given["evidence_until"] = 0.0
    choice = "custom" if isinstance(settings, Settings) else settings.method
    return {"settings": choice, **{f"settings.{name}": value for name, value in given.items()}}


def oracle_prompt(task: Task, runs: Mapping[str, OracleRun]) -> Prompt:
    """An API-format prompt that does a task's runs; the node "NAME report" reports on the run NAME."""
    of = task.components
    mixture = {"components": of, "kind": task.kind}
    prompt: Prompt = {
        "model": _node("DNGOracleModel", prediction=task.prediction, **mixture),
        "positive": _node("DNGOracleCondition", components=task.positive, of=of),
        "unconditional": _node("DNGOracleCondition", components="all", of=of),
        "latent": _node("DNGOracleLatent", batch_size=task.samples),
    }
    for name, run in runs.items():
        avoided = []
        for i, components in enumerate(run.negative if not run.node.startswith("stock") else ()):
            avoided.append(f"{name} avoids {i}")
            prompt[avoided[-1]] = _node("DNGOracleCondition", components=components, of=of)
        _add_run(prompt, task, name, run, avoided)
        report = {"samples": [name, 0], "forbidden": task.forbidden, "wanted": task.positive, **mixture}
        if run.baseline:
            report["baseline"] = [run.baseline, 0]
        if run.node == "ksampler":
            report["trace"] = [name, 1]
        prompt[f"{name} report"] = _node("DNGOracleReport", **report)
    return prompt


def _add_run(prompt: Prompt, task: Task, name: str, run: OracleRun, avoided: list[str]) -> None:
    """The nodes of one run, the last of them called ``name``: its output 0 holds the samples."""
    evaluation = {"reference": run.reference, **run.inputs}
    settings = concept_settings(run.settings) | {f"settings.{name}": value for name, value in evaluation.items()}
    model, guider = "model", f"{name} guider"
    if run.node == "patch":
        for condition in avoided:
            patch = f"{condition} patch"
            prompt[patch] = _node("DynamicNegativeGuidance", model=[model, 0], negative=[condition, 0], **settings)
            model = patch
    elif len(avoided) > 1:
        for condition, previous in zip(avoided[1:], [None, *avoided[1:-1]], strict=True):
            concept = _node("DNGConcept", negative=[condition, 0], **settings)
            if previous:
                concept["inputs"]["previous"] = [f"{previous} concept", 0]
            prompt[f"{condition} concept"] = concept
        settings["more_concepts"] = [f"{avoided[-1]} concept", 0]

    conditions = {"positive": ["positive", 0]}
    if run.node in ("ksampler", "guider"):
        conditions |= {"negative": [avoided[0], 0], "unconditional": ["unconditional", 0]}
    else:
        conditions |= {"negative": ["unconditional", 0]}
    common = {"model": [model, 0], "cfg": task.cfg, **conditions}
    if run.node in ("stock guider", "guider"):
        if run.node == "guider":
            prompt[guider] = _node("DNGGuider", **common, **settings)
        else:
            prompt[guider] = _node("CFGGuider", **common)
        prompt[f"{name} noise"] = _node("RandomNoise", noise_seed=task.seed)
        prompt[f"{name} sampler"] = _node("KSamplerSelect", sampler_name=task.sampler)
        prompt[f"{name} sigmas"] = _node(
            "BasicScheduler", model=["model", 0], scheduler=task.scheduler, steps=task.steps, denoise=1.0
        )
        parts = {part: [f"{name} {part}", 0] for part in ("noise", "guider", "sampler", "sigmas")}
        prompt[name] = _node("SamplerCustomAdvanced", latent_image=["latent", 0], **parts)
        return
    sampling = {
        "seed": task.seed, "steps": task.steps, "sampler_name": task.sampler, "scheduler": task.scheduler,
        "latent_image": ["latent", 0], "denoise": 1.0,
    }  # fmt: skip
    if run.node == "ksampler":
        prompt[name] = _node("KSamplerDNG", **common, **sampling, **settings)
    else:
        prompt[name] = _node("KSampler", **common, **sampling)


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


class OracleRunner:
    """Runs prompts on a server and keeps their reports in a file, so that a stopped figure goes on where it was.

    A kept report belongs to its prompt, to the code that answered it and to ComfyUI's version: when one of them
    changes, the prompt is run anew.

    Parameters
    ----------
    pack: the checkout whose code the server runs.
    path: the JSON file that keeps the reports.
    """

    def __init__(self, server: Server, pack: Path, path: Path) -> None:
        self._server = server
        self._kept = Kept(path)
        version = server.stats.get("system", {}).get("comfyui_version", "")
        self._code = f"{version} {code_digest(pack)}"

    def reports(self, task: Task, runs: Mapping[str, OracleRun]) -> dict[str, dict[str, Any]]:
        """The report of each run, by its name. Raises HeadlessError where ComfyUI or a node refuses the task."""
        nodes = [f"{name} report" for name in runs]
        return dict(zip(runs, self.figures(oracle_prompt(task, runs), nodes), strict=True))

    def figures(self, prompt: Prompt, nodes: Sequence[str]) -> list[dict[str, Any]]:
        """The figures that nodes of a prompt report. Raises HeadlessError where ComfyUI or a node refuses it."""
        key = hashlib.sha256(f"{self._code} {json.dumps(prompt, sort_keys=True)}".encode()).hexdigest()

        def measure() -> dict[str, dict[str, Any]]:
            result = run_workflow(self._server, prompt)
            return {node: result.ui[node]["figures"][0] for node in nodes}

        kept: dict[str, dict[str, Any]] = self._kept.get(key, measure)
        return [kept[node] for node in nodes]

    def check_alive(self) -> None:
        """Raise HeadlessError where the server has ended, because a run then fails whatever its task is."""
        self._server.check_alive()

    def options(self) -> dict[str, list[str]]:
        """The names of all samplers that this ComfyUI has ("sampler_name") and all its schedulers ("scheduler")."""
        task = Task(sampler="euler", steps=1, samples=1)
        result = run_workflow(self._server, oracle_prompt(task, {"dng": OracleRun("ksampler")}))
        required = result.node_info["KSamplerDNG"]["input"]["required"]
        return {name: _combo(required[name]) for name in ("sampler_name", "scheduler")}


def _combo(declared: list[Any]) -> list[str]:
    """The options of a combo input, in either of the forms in which ComfyUI declares it."""
    return declared[0] if isinstance(declared[0], list) else declared[1]["options"]


def code_digest(pack: Path) -> str:
    """A digest of the pack's own mathematics and nodes."""
    digest = hashlib.sha256()
    for path in _sources(pack):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(pack: Path) -> Iterator[Path]:
    for folder in ("dng_core", "nodes"):
        yield from sorted((pack / folder).glob("*.py"))
