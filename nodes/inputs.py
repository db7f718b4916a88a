"""The DNG settings as node inputs, shared by every node that guides."""

from dataclasses import fields, replace
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..dng_core.calibration_files import ModelCalibration
from ..dng_core.economy import ECONOMIES
from ..dng_core.methods import METHODS, MethodSettings
from ..dng_core.settings import OFFSET_FORMS, PRESETS, RULES, Settings
from .run.concept import REFERENCES, Concept

TRACE = io.Custom("DNG_TRACE")
CONCEPTS = io.Custom("DNG_CONCEPTS")

DEFAULTS = Settings()
CUSTOM, CALIBRATED = "custom", "calibrated"

Limits = tuple[float, float, float, float]
"""Of a number: the least and the most, by how much the front end changes it, and to what the front end rounds it."""


def settings_inputs() -> list[io.Input]:
    """One input for each field of Settings, and the method. The inputs that are rarely used are folded away.

    All inputs are optional, so that a KSampler's API prompt works when its class name alone is changed. ComfyUI's
    front end rounds what a user types to a multiple of ``step``, so each ``step`` is as fine as a user may need.
    """
    return [
        _number(
            "guidance_scale",
            (0.0, 100.0, 0.01, 0.001),
            "How hard an image is pushed away once it turns into what is to be avoided (lambda_0 in the paper). 1 "
            "is the exact value, a larger one removes more, and 0 switches guidance off.",
        ),
        _number(
            "prior",
            (0.001, 0.999, 0.001, 0.001),
            "The share of images that you expect to show the undesired thing without guidance. If you are in "
            "doubt, choose a value that is too high rather than one that is too low.",
        ),
        _number(
            "temperature",
            (0.0, 10.0, 0.01, 0.001),
            "How far the evidence of each step moves the posterior (tau in the paper). 1 is the exact value. A "
            "smaller one makes the posterior slower, which helps with large latents and with models whose errors "
            "add up.",
            advanced=True,
        ),
        _number(
            "offset",
            (0.0, 100.0, 0.0001, 0.0001),
            "A steady upward drift of the posterior, which switches guidance on earlier (delta in the paper). 0 "
            "is the exact value. offset_form says what the number means.",
            advanced=True,
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
        _number(
            "p_min",
            (1e-6, 0.999, 0.000001, 1e-6),
            "The posterior never falls below this value, so that it can rise again.",
            advanced=True,
        ),
        _number(
            "p_max",
            (0.001, 0.999, 0.001, 0.001),
            "The posterior p never rises above this value. So the push guidance_scale * p / (1 - p) has a bound.",
            advanced=True,
        ),
        _number(
            "max_scale",
            (0.1, 100000.0, 0.1, 0.01),
            "The push guidance_scale * p / (1 - p) is never larger than this value.",
            advanced=True,
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


def _number(name: str, limits: Limits, tooltip: str, **options: bool) -> io.Input:
    """A number of Settings, with the default that it has there; otherwise as :func:`float_input`."""
    return float_input(name, getattr(DEFAULTS, name), limits, tooltip, optional=True, **options)


def float_input(name: str, default: float, limits: Limits, tooltip: str, **options: bool) -> io.Input:
    """A number within ``limits``."""
    least, most, step, digit = limits
    return io.Float.Input(
        name, default=default, min=least, max=most, step=step, round=digit, tooltip=tooltip, **options
    )


def seed_input(name: str = "seed") -> io.Input:
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="The random seed of the noise. The same seed gives the same noise with and without guidance.",
    )


def cfg_input() -> io.Input:
    tooltip = "The scale of classifier-free guidance. At any value other than 1, connect `unconditional`."
    return float_input("cfg", 8.0, (0.0, 100.0, 0.1, 0.01), tooltip)


def scheduler_input() -> io.Input:
    return io.Combo.Input(
        "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="How noise is removed over the steps."
    )


def unconditional_input() -> io.Input:
    return io.Conditioning.Input(
        "unconditional",
        optional=True,
        tooltip="What classifier-free guidance extrapolates from, usually an empty prompt. It is needed at every cfg "
        "other than 1, and it is the best reference to compare `negative` with.",
    )


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
        "then only rule, reference, economy and calibration still count. exact is a good start. calibrated needs a "
        "calibration, and also takes prior. The help page lists the values and their sources.",
    )


def settings_from(values: dict[str, Any], calibration: ModelCalibration | None = None) -> MethodSettings:
    """The settings that ``preset`` names; where it is "custom" or missing, the settings that the inputs give.

    A baseline takes the inputs that it has a setting for. It leaves the others, and the calibration.
    """
    preset, method = values.pop("preset", CUSTOM), values.pop("method", Settings.method)
    if preset != CUSTOM:
        if preset not in PRESETS:
            raise ValueError(f"preset must be {CUSTOM} or one of {', '.join(PRESETS)}; it is {preset!r}")
        if preset == CALIBRATED and calibration is None:
            raise ValueError(
                f"preset is {CALIBRATED}, which needs a calibration: connect Load Calibration (DNG) or Calibrate "
                "Model (DNG) to `calibration`, or choose the preset exact"
            )
        kept = ("rule", "prior") if preset == CALIBRATED else ("rule",)
        settings = PRESETS[preset].with_(**{name: values[name] for name in kept if name in values})
    elif method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; it is {method!r}")
    elif method == Settings.method:
        settings = Settings(**values)
    else:
        known = {field.name for field in fields(METHODS[method])}
        return METHODS[method](**{name: value for name, value in values.items() if name in known})
    return settings if calibration is None else calibration.calibration.applied(settings)


def rule_input() -> io.Input:
    """The input ``rule``. New inputs come after it, since older graphs know the others by their position."""
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


def economy_input() -> io.Input:
    return io.Combo.Input(
        "economy",
        optional=True,
        options=list(ECONOMIES),
        default="off",
        advanced=True,
        tooltip="When the prediction of what to avoid is evaluated. off: at every call of the model. auto: not where "
        "it hardly differs from its reference, and not while every image of the batch is far from what is to be "
        "avoided; the last difference then stands in, for up to seven calls. The trace says how many predictions were "
        "spared.",
    )


def concepts_from(conditioning: list | None, values: dict[str, Any]) -> tuple[Concept, ...]:
    """What a node is to avoid: the concept of its own inputs first, then the concepts of ``more_concepts``.

    Raises ValueError, naming the setting, where one is out of range.
    """
    reference, economy = values.pop("reference", REFERENCES[0]), values.pop("economy", "off")
    if economy not in ECONOMIES:
        raise ValueError(f"economy must be one of {', '.join(ECONOMIES)}; it is {economy!r}")
    more = values.pop("more_concepts", None) or ()
    calibration = values.pop("calibration", None)
    own = Concept(conditioning or [], settings_from(values, calibration), reference, economy, calibration)
    return own, *(replace(concept, reference=reference, economy=economy) for concept in more)
