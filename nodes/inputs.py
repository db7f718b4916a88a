"""The DNG settings as node inputs, shared by every node that guides."""

from dataclasses import replace
from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ..dng_core.calibration_files import ModelCalibration
from ..dng_core.economy import ECONOMIES
from ..dng_core.methods import METHODS, MethodSettings
from ..dng_core.settings import CALIBRATED as CALIBRATED_SETTINGS
from ..dng_core.settings import OFFSET_FORMS, PRESETS, RULES, Settings
from .run.concept import REFERENCES, Concept

TRACE = io.Custom("DNG_TRACE")
CONCEPTS = io.Custom("DNG_CONCEPTS")
CALIBRATION = io.Custom("DNG_CALIBRATION")

DEFAULTS = Settings()
SETTINGS = "settings"
EXACT, CALIBRATED, PRESET, CUSTOM = "exact", "calibrated", "preset", "custom"
EVIDENCE_UNTIL = 0.25
"""The default share of the noise schedule in which a guidance scale acts on evidence alone, by the study of a
text-to-image model (docs/experiments.md, "What came out")."""
BASELINES = tuple(name for name in METHODS if name != Settings.method)

Limits = tuple[float, float, float, float]
"""Of a number: the least and the most, by how much the front end changes it, and to what the front end rounds it."""


def settings_input(choices: dict[str, list[io.Input]]) -> io.Input:
    """The input ``settings``: what to guide by, of which each choice shows the inputs that it takes, and no others.

    It is optional, and so is what it shows but a calibration, so that a KSampler's API prompt works when its class
    name alone is changed. A schema with this input sets ``accept_all_inputs``: ComfyUI would otherwise drop a choice
    that it does not know, which :func:`chosen` refuses, and the node would run with the default.
    """
    return io.DynamicCombo.Input(
        SETTINGS,
        optional=True,
        options=[io.DynamicCombo.Option(choice, inputs) for choice, inputs in choices.items()],
        tooltip="What guidance goes by. exact: the paper's exact values, a good start. calibrated: what was measured "
        "of the model. preset: published settings. custom: every setting. negative_prompting and "
        "safe_latent_diffusion are there to compare with. They push all the time, and track no posterior.",
    )


def concept_choices() -> dict[str, list[io.Input]]:
    """The choices of ``settings`` where they are one concept's. The first is the default."""
    strength = [_guidance_scale(), _prior(), _evidence_until()]
    calibrated = [calibration_input(optional=False), _guidance_scale(CALIBRATED_SETTINGS), _prior(), _evidence_until()]
    return {
        EXACT: strength,
        CALIBRATED: calibrated,
        PRESET: [_preset()],
        CUSTOM: [*strength, *_further_numbers(), rule_input(), calibration_input()],
        **{baseline: [_guidance_scale()] for baseline in BASELINES},
    }


def run_choices() -> dict[str, list[io.Input]]:
    """The choices of ``settings`` where they are a run's: some also say how all its concepts are evaluated."""
    evaluation = {CALIBRATED: [economy_input()], CUSTOM: [reference_input(), economy_input()]}
    evaluation |= {name: [reference_input()] for name in BASELINES}
    return {choice: [*inputs, *evaluation.get(choice, [])] for choice, inputs in concept_choices().items()}


def _guidance_scale(settings: Settings = DEFAULTS) -> io.Input:
    return _number(
        "guidance_scale",
        (0.0, 100.0, 0.01, 0.001),
        "How hard an image is pushed away once it turns into what is to be avoided (lambda_0 in the paper). 1 is the "
        "exact value, a larger one removes more, and 0 switches guidance off.",
        settings,
    )


def _prior() -> io.Input:
    return _number(
        "prior",
        (0.001, 0.999, 0.001, 0.001),
        "The share of images that you expect to show the undesired thing without guidance. If you are in doubt, "
        "choose a value that is too high rather than one that is too low.",
    )


def _evidence_until() -> io.Input:
    return float_input(
        "evidence_until",
        EVIDENCE_UNTIL,
        (0.0, 1.0, 0.01, 0.001),
        "Up to this share of the noise schedule, a guidance_scale above 1 acts on evidence alone: an image whose "
        "posterior has not risen above prior gets the exact push, and no multiple of it. This spares images that will "
        "not show the undesired thing. 0 multiplies from the start, as in the paper.",
        optional=True,
    )


def _preset() -> io.Input:
    return io.Combo.Input(
        PRESET,
        optional=True,
        options=list(PRESETS),
        default=next(iter(PRESETS)),
        tooltip="Whose settings to take. The help page lists their values and sources.",
    )


def _further_numbers() -> list[io.Input]:
    """The other fields of Settings. ComfyUI's front end rounds what a user types to a multiple of ``step``, so each
    ``step`` is as fine as a user may need."""
    return [
        _number(
            "temperature",
            (0.0, 10.0, 0.01, 0.001),
            "How far the evidence of each step moves the posterior (tau in the paper). 1 is the exact value. A "
            "smaller one makes the posterior slower, which helps with large latents and with models whose errors "
            "add up.",
        ),
        _number(
            "offset",
            (0.0, 100.0, 0.0001, 0.0001),
            "A steady upward drift of the posterior, which switches guidance on earlier (delta in the paper). 0 "
            "is the exact value. offset_form says what the number means.",
        ),
        io.Combo.Input(
            "offset_form",
            optional=True,
            options=list(OFFSET_FORMS),
            default=DEFAULTS.offset_form,
            tooltip="What the number in offset means. integrated: it is the paper's delta at 1000 steps, and acts "
            "alike at every step count. total: it is added to the log-posterior over a whole run, in nats. per_step: "
            "it is added at every step, as in the paper's Algorithm 2, so that more steps add more.",
        ),
        _number(
            "p_min",
            (1e-6, 0.999, 0.000001, 1e-6),
            "The posterior never falls below this value, so that it can rise again.",
        ),
        _number(
            "p_max",
            (0.001, 0.999, 0.001, 0.001),
            "The posterior p never rises above this value. So the push guidance_scale * p / (1 - p) has a bound.",
        ),
        _number(
            "max_scale",
            (0.1, 100000.0, 0.1, 0.01),
            "The push guidance_scale * p / (1 - p) is never larger than this value.",
        ),
    ]


def _number(name: str, limits: Limits, tooltip: str, settings: Settings = DEFAULTS) -> io.Input:
    """A number of Settings, with the default that it has in ``settings``; otherwise as :func:`float_input`."""
    return float_input(name, getattr(settings, name), limits, tooltip, optional=True)


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


def reference_input(**options: bool) -> io.Input:
    return io.Combo.Input(
        "reference",
        optional=True,
        options=list(REFERENCES),
        default=REFERENCES[0],
        tooltip="The prediction that the undesired one is compared with. auto: the positive where `negative` comes "
        "from Joint Negative, else the unconditional prediction where the sampler evaluates one, else the positive. "
        "positive: always the positive. cfg: the result of classifier-free guidance, as in public scripts of the "
        "paper.",
        **options,
    )


def more_concepts_input() -> io.Input:
    return CONCEPTS.Input(
        "more_concepts",
        optional=True,
        tooltip="Further things to avoid beside `negative`, from DNG Concept nodes. Each has a posterior and settings "
        "of its own. The sum of all priors must stay below 1.",
    )


def rule_input(**options: bool) -> io.Input:
    return io.Combo.Input(
        "rule",
        optional=True,
        options=list(RULES),
        default=DEFAULTS.rule,
        tooltip="How the evidence of a step is computed. auto: algorithm_2 where the sampler adds noise, and elbo "
        "where it adds none (euler, dpmpp_2m). algorithm_2: as in the paper. elbo: by how well the predictions so far "
        "foretold the image that the model now expects. step_noise: with an estimate for large steps, for small "
        "latents only. probe: with one more pair of predictions at some of the steps, for exact predictions only.",
        **options,
    )


def calibration_input(optional: bool = True) -> io.Input:
    return CALIBRATION.Input(
        "calibration",
        optional=optional,
        tooltip="What Calibrate Model (DNG) measured of this model, or Load Calibration (DNG) loaded. Its temperature "
        "and drift then take the place of temperature and offset.",
    )


def economy_input() -> io.Input:
    return io.Combo.Input(
        "economy",
        optional=True,
        options=list(ECONOMIES),
        default="off",
        tooltip="When the prediction of what to avoid is evaluated. off: at every call of the model. auto: not where "
        "it hardly differs from its reference, and not for images that are far from what is to be avoided; the last "
        "difference then stands in, for up to seven calls. The trace says how many predictions were spared.",
    )


def concepts_from(conditioning: list | None, values: dict[str, Any]) -> tuple[Concept, ...]:
    """What a node is to avoid: the concept of its own inputs first, then the concepts of ``more_concepts``.

    ``values`` holds what the node got beside its other inputs. Of these only ``settings`` and ``more_concepts`` count.
    Raises ValueError, naming the setting, where one is out of range.
    """
    choice, given = chosen(values)
    calibration = given.pop("calibration", None)
    reference, economy = given.pop("reference", REFERENCES[0]), given.pop("economy", "off")
    evidence_until = given.pop("evidence_until", EVIDENCE_UNTIL if choice in (EXACT, CALIBRATED, CUSTOM) else 0.0)
    if economy not in ECONOMIES:
        raise ValueError(f"economy must be one of {', '.join(ECONOMIES)}; it is {economy!r}")
    settings = settings_by(choice, given, calibration)
    own = Concept(conditioning or [], settings, reference, economy, calibration, evidence_until)
    more = values.get("more_concepts") or ()
    return own, *(replace(concept, reference=reference, economy=economy) for concept in more)


def chosen(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The choice of ``settings``, and what is given of the inputs that this choice takes.

    ComfyUI nests the inputs of a choice that it knows, with the choice among them. It leaves them beside ``settings``
    where the choice comes through a link or is missing; then the first choice is meant.
    """
    nested = values.get(SETTINGS)
    nested = nested if isinstance(nested, dict) else {SETTINGS: nested}
    choices = run_choices()
    choice = next(iter(choices)) if nested[SETTINGS] is None else nested[SETTINGS]
    if choice not in tuple(choices):  # a link may bring what has no hash
        raise ValueError(f"`settings` must be one of {', '.join(choices)}; it is {choice!r}")
    names = [given.id for given in choices[choice]]
    found = {name: nested.get(name, values.get(f"{SETTINGS}.{name}")) for name in names}
    return choice, {name: value for name, value in found.items() if value is not None}


def settings_by(choice: str, given: dict[str, Any], calibration: ModelCalibration | None) -> MethodSettings:
    """The settings that a choice of ``settings`` makes of its numbers and names."""
    if choice == CALIBRATED and calibration is None:
        raise ValueError(
            "`settings` is calibrated, which needs a calibration: connect Load Calibration (DNG) or Calibrate Model "
            "(DNG) to `calibration`, or choose exact"
        )
    if choice in BASELINES:
        return METHODS[choice](**given)
    if choice == PRESET:
        name = given.get(PRESET, next(iter(PRESETS)))
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}; it is {name!r}")
        return PRESETS[name]
    settings = (CALIBRATED_SETTINGS if choice == CALIBRATED else DEFAULTS).with_(**given)
    return settings if calibration is None else calibration.calibration.applied(settings)
