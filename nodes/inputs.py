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
    """One input per field of Settings that users set for a concept, the rarely used ones folded away.

    All are optional, so that a KSampler's API prompt works with the class name alone changed. Each ``step`` is as fine
    as the values that make sense: ComfyUI's front end rounds what is typed to it, and clamps it to its grid.
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
            tooltip="lambda_0: how hard to push away once the image turns into what is to be avoided. 1 is exact, "
            "more is safer, 0 switches it off.",
        ),
        io.Float.Input(
            "prior",
            optional=True,
            default=DEFAULTS.prior,
            min=0.001,
            max=0.999,
            step=0.001,
            round=0.001,
            tooltip="The share of images that you expect to show the undesired thing without guidance. If in doubt, "
            "choose it too high rather than too low.",
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
            tooltip="tau: how far each step's evidence moves the posterior. 1 is exact; less makes it slower, which "
            "helps with models whose errors add up, and with large latents.",
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
            tooltip="delta: a steady upward drift of the posterior, which switches guidance on earlier. 0 is exact. "
            "Its unit is that of offset_form.",
        ),
        io.Combo.Input(
            "offset_form",
            optional=True,
            options=list(OFFSET_FORMS),
            default=DEFAULTS.offset_form,
            advanced=True,
            tooltip="integrated: the paper's delta at 1000 steps, the same at every step count. total: nats added to "
            "the log-posterior over a whole run. per_step: as in the paper's Algorithm 2, once per step taken.",
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
            tooltip="The posterior never falls below this, so that it can rise again.",
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
            tooltip="The posterior never rises above this, which bounds the push: guidance_scale * p / (1 - p).",
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
            tooltip="A cap on the push guidance_scale * p / (1 - p), whatever the posterior.",
        ),
        io.Combo.Input(
            "method",
            optional=True,
            options=list(METHODS),
            default=Settings.method,
            advanced=True,
            tooltip="dng: dynamic, by the posterior. For comparison: negative_prompting pushes at guidance_scale all "
            "the time; safe_latent_diffusion masks the push per element.",
        ),
    ]


def reference_input() -> io.Input:
    return io.Combo.Input(
        "reference",
        optional=True,
        options=list(REFERENCES),
        default=REFERENCES[0],
        advanced=True,
        tooltip="What the undesired prediction is compared with. auto: the unconditional prediction where there is "
        "one, else the positive. positive: the positive alone; then encode the undesired prompt together with the "
        "positive one (Joint Negative). cfg: the CFG mix, as in public scripts of the paper.",
    )


def more_concepts_input() -> io.Input:
    return CONCEPTS.Input(
        "more_concepts",
        optional=True,
        tooltip="More to avoid beside `negative`, from DNG Concept nodes: each with a posterior and settings of its "
        "own. Together their priors must stay below 1.",
    )


def preset_input() -> io.Input:
    return io.Combo.Input(
        "preset",
        optional=True,
        options=[CUSTOM, *PRESETS],
        default=CUSTOM,
        tooltip="custom: the settings above. Any other: published settings in their place; those above (but for "
        "reference) then do not count. exact is the place to start; the help page has the values and their sources.",
    )


def settings_from(values: dict[str, Any]) -> MethodSettings:
    """The settings that ``preset`` names; for "custom", or without it, those of the inputs.

    A baseline takes the inputs that it has a setting for, and leaves the others.
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
    """The last input of every node that guides, after those that older graphs know by position."""
    return io.Combo.Input(
        "rule",
        optional=True,
        options=list(RULES),
        default=DEFAULTS.rule,
        advanced=True,
        tooltip="How evidence is counted. algorithm_2: as in the paper. probe: one more pair of predictions on some "
        "of the steps makes deterministic samplers (euler, dpmpp_2m ...) remove more. step_noise: a free estimate for "
        "large steps, good for small latents only.",
    )


def concepts_from(conditioning: list | None, values: dict[str, Any]) -> tuple[Concept, ...]:
    """What a node is to avoid: its own conditioning and settings inputs first, then those of ``more_concepts``.

    Raises ValueError naming the setting that is out of range.
    """
    reference = values.pop("reference", REFERENCES[0])
    more = values.pop("more_concepts", None) or ()
    own = Concept(conditioning or [], settings_from(values), reference)
    return own, *(replace(concept, reference=reference) for concept in more)
