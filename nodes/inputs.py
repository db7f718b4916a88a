"""The DNG settings as node inputs, shared by every node that guides."""

from dataclasses import fields, replace
from typing import Any

from comfy_api.latest import io

from ..dng_core.methods import METHODS, MethodSettings
from ..dng_core.settings import OFFSET_FORMS, PRESETS, RULES, Settings
from .run.concept import REFERENCES, Concept

TRACE = io.Custom("DNG_TRACE")
CONCEPTS = io.Custom("DNG_CONCEPTS")

DEFAULTS = Settings()
CUSTOM = "custom"


def settings_inputs() -> list[io.Input]:
    """One input for each field of Settings, and the method. The inputs that are rarely used are folded away.

    All inputs are optional, so that a KSampler's API prompt works when its class name alone is changed. ComfyUI's
    front end rounds what a user types to a multiple of ``step``, so each ``step`` is as fine as a user may need.
    """
    return [
        io.Float.Input(
            "guidance_scale",
            optional=True,
            default=DEFAULTS.guidance_scale,
            min=0.0,
            max=100.0,
            step=0.01,
            round=0.001,
            tooltip="How hard an image is pushed away once it turns into what is to be avoided (lambda_0 in the "
            "paper). 1 is the exact value, a larger one removes more, and 0 switches guidance off.",
        ),
        io.Float.Input(
            "prior",
            optional=True,
            default=DEFAULTS.prior,
            min=0.001,
            max=0.999,
            step=0.001,
            round=0.001,
            tooltip="The share of images that you expect to show the undesired thing without guidance. If you are in "
            "doubt, choose a value that is too high rather than one that is too low.",
        ),
        io.Float.Input(
            "temperature",
            optional=True,
            default=DEFAULTS.temperature,
            min=0.0,
            max=10.0,
            step=0.01,
            round=0.001,
            advanced=True,
            tooltip="How far the evidence of each step moves the posterior (tau in the paper). 1 is the exact value. "
            "A smaller one makes the posterior slower, which helps with large latents and with models whose errors "
            "add up.",
        ),
        io.Float.Input(
            "offset",
            optional=True,
            default=DEFAULTS.offset,
            min=0.0,
            max=100.0,
            step=0.0001,
            round=0.0001,
            advanced=True,
            tooltip="A steady upward drift of the posterior, which switches guidance on earlier (delta in the paper). "
            "0 is the exact value. offset_form says what the number means.",
        ),
        io.Combo.Input(
            "offset_form",
            optional=True,
            options=list(OFFSET_FORMS),
            default=DEFAULTS.offset_form,
            advanced=True,
            tooltip="What the number in offset means. integrated: it is the paper's delta at 1000 steps, and acts "
            "alike at every step count. total: it is added to the log-posterior over a whole run, in nats. per_step: "
            "it is added at every step, as in the paper's Algorithm 2, so that more steps add more.",
        ),
        io.Float.Input(
            "p_min",
            optional=True,
            default=DEFAULTS.p_min,
            min=1e-6,
            max=0.999,
            step=0.000001,
            round=1e-6,
            advanced=True,
            tooltip="The posterior never falls below this value, so that it can rise again.",
        ),
        io.Float.Input(
            "p_max",
            optional=True,
            default=DEFAULTS.p_max,
            min=0.001,
            max=0.999,
            step=0.001,
            round=0.001,
            advanced=True,
            tooltip="The posterior p never rises above this value. So the push guidance_scale * p / (1 - p) has a "
            "bound.",
        ),
        io.Float.Input(
            "max_scale",
            optional=True,
            default=DEFAULTS.max_scale,
            min=0.1,
            max=100000.0,
            step=0.1,
            round=0.01,
            advanced=True,
            tooltip="The push guidance_scale * p / (1 - p) is never larger than this value.",
        ),
        io.Combo.Input(
            "method",
            optional=True,
            options=list(METHODS),
            default=Settings.method,
            advanced=True,
            tooltip="dng pushes as far as the posterior asks for. The two others are there to compare with, and "
            "track no posterior: negative_prompting always pushes by guidance_scale, and safe_latent_diffusion masks "
            "the push at each element.",
        ),
    ]


def reference_input() -> io.Input:
    return io.Combo.Input(
        "reference",
        optional=True,
        options=list(REFERENCES),
        default=REFERENCES[0],
        advanced=True,
        tooltip="The prediction that the undesired one is compared with. auto: the unconditional prediction where the "
        "sampler evaluates one, else the positive. positive: always the positive; then encode the undesired prompt "
        "together with the positive one (Joint Negative). cfg: the result of classifier-free guidance, as in public "
        "scripts of the paper.",
    )


def more_concepts_input() -> io.Input:
    return CONCEPTS.Input(
        "more_concepts",
        optional=True,
        tooltip="Further things to avoid beside `negative`, from DNG Concept nodes. Each has a posterior and settings "
        "of its own. The sum of all priors must stay below 1.",
    )


def preset_input() -> io.Input:
    return io.Combo.Input(
        "preset",
        optional=True,
        options=[CUSTOM, *PRESETS],
        default=CUSTOM,
        tooltip="custom takes the settings of this node. Any other choice takes published settings in their place: "
        "then only rule and reference still count. exact is a good start. The help page lists the values and their "
        "sources.",
    )


def settings_from(values: dict[str, Any]) -> MethodSettings:
    """The settings that ``preset`` names; where it is "custom" or missing, the settings that the inputs give.

    A baseline takes the inputs that it has a setting for. It leaves the others.
    """
    preset, method = values.pop("preset", CUSTOM), values.pop("method", Settings.method)
    if preset != CUSTOM:
        if preset not in PRESETS:
            raise ValueError(f"preset must be {CUSTOM} or one of {', '.join(PRESETS)}; it is {preset!r}")
        return PRESETS[preset].with_(rule=values.get("rule", DEFAULTS.rule))
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; it is {method!r}")
    if method == Settings.method:
        return Settings(**values)
    known = {field.name for field in fields(METHODS[method])}
    return METHODS[method](**{name: value for name, value in values.items() if name in known})


def rule_input() -> io.Input:
    """The input ``rule``. It is the last one of every node, since older graphs know the others by their position."""
    return io.Combo.Input(
        "rule",
        optional=True,
        options=list(RULES),
        default=DEFAULTS.rule,
        advanced=True,
        tooltip="How the evidence of a step is computed. algorithm_2: as in the paper. probe: with one more pair of "
        "predictions at some of the steps, by which deterministic samplers (euler, dpmpp_2m) remove more. step_noise: "
        "with an estimate for large steps that costs nothing, and that is good for small latents only.",
    )


def concepts_from(conditioning: list | None, values: dict[str, Any]) -> tuple[Concept, ...]:
    """What a node is to avoid: the concept of its own inputs first, then the concepts of ``more_concepts``.

    Raises ValueError, naming the setting, where one is out of range.
    """
    reference = values.pop("reference", REFERENCES[0])
    more = values.pop("more_concepts", None) or ()
    own = Concept(conditioning or [], settings_from(values), reference)
    return own, *(replace(concept, reference=reference) for concept in more)
