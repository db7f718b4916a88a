"""Settings: every invalid field is refused by its name, and every preset is valid and holds the published numbers."""

import dataclasses
import math

import pytest

from dng_core.baselines import NegativePrompting, SafeLatentDiffusion
from dng_core.methods import STUDIED, MethodSettings
from dng_core.settings import OFFSET_FORMS, PRESETS, RULES, Settings

TABLE_3 = ["Medieval feast", "A dinner table", "An art workshop", "An antique store", "An English breakfast"]
NUMBERS = [
    (kind, field.name)
    for kind in STUDIED.values()
    for field in dataclasses.fields(kind)
    if field.name != "offset_form"
]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset_form", "linear"),
        ("rule", "algorithm 2"),
        ("rule", ""),
        ("guidance_scale", -0.1),
        ("guidance_scale", math.inf),
        ("prior", 0.0),
        ("prior", 1.0),
        ("prior", -0.2),
        ("prior", 1.5),
        ("temperature", -1e-9),
        ("temperature", math.inf),
        ("offset", math.inf),
        ("offset", -math.inf),
        ("p_min", 0.0),
        ("p_min", -1.0),
        ("p_min", 1.0),
        ("p_max", 0.0),
        ("p_max", 1.0),
        ("p_max", 2.0),
        ("max_scale", 0.0),
        ("max_scale", -1.0),
        ("evidence_above", -1.0),
    ],
)
def test_an_invalid_field_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        Settings(**{field: value})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (NegativePrompting, "guidance_scale", -0.1),
        (NegativePrompting, "guidance_scale", math.inf),
        (SafeLatentDiffusion, "guidance_scale", -0.1),
        (SafeLatentDiffusion, "guidance_scale", math.inf),
        (SafeLatentDiffusion, "warmup_scale", -1.0),
        (SafeLatentDiffusion, "warmup_scale", math.inf),
        (SafeLatentDiffusion, "momentum_scale", math.inf),
        (SafeLatentDiffusion, "momentum_decay", 1.0),
        (SafeLatentDiffusion, "momentum_decay", -0.1),
    ],
)
def test_an_invalid_field_of_a_baseline_is_refused_by_its_name(kind, field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        kind(**{field: value})


@pytest.mark.parametrize(("kind", "field"), NUMBERS)
def test_nan_is_refused_in_every_number(kind: type[MethodSettings], field: str):
    with pytest.raises(ValueError, match=rf"\b{field}\b"):
        kind(**{field: math.nan})


def test_an_empty_clamp_range_is_refused():
    for p_min in (0.5, 0.6):
        with pytest.raises(ValueError, match="p_min must be less than p_max"):
            Settings(prior=0.5, p_min=p_min, p_max=0.5)


@pytest.mark.parametrize("prior", [0.05, 0.95])
def test_a_prior_outside_the_clamp_range_is_refused(prior):
    with pytest.raises(ValueError, match=r"prior must be within \[p_min, p_max\]"):
        Settings(prior=prior, p_min=0.1, p_max=0.9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", OFFSET_FORMS)
def test_boundary_values_are_accepted(rule, form):
    settings = Settings(rule=rule, offset_form=form, guidance_scale=0, temperature=0, prior=0.99, p_max=0.99)
    assert settings.with_(max_scale=math.inf, offset=-1.0).max_scale == math.inf


def test_boundary_values_of_the_baselines_are_accepted():
    assert NegativePrompting(0).guidance_scale == 0
    assert SafeLatentDiffusion(0, math.inf, 0, -1.0, 0).threshold == math.inf


def test_with_validates_again_and_leaves_the_original_alone():
    settings = Settings()
    assert settings.with_(prior=0.3).prior == 0.3
    assert settings.prior == 0.2
    with pytest.raises(ValueError, match="prior"):
        settings.with_(prior=2.0)


def test_settings_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().prior = 0.5  # type: ignore[misc]


def test_every_preset_is_valid():
    assert all(Settings(**dataclasses.asdict(preset)) == preset for preset in PRESETS.values())


def test_presets_hold_the_published_numbers():
    published = {
        "authors' defaults": (1, 0.2, 1, 0, 0.99, 1e-6),
        "CIFAR-10": (5, 0.01, 0.2, 2e-4, 0.8, 1e-6),
        "Medieval feast": (27, 0.01, 0.2, 0.004, 0.99, 1e-6),
        "A dinner table": (12, 0.01, 0.3, 0.003, 0.99, 1e-6),
        "An art workshop": (27, 0.01, 0.2, 0.002, 0.99, 1e-6),
        "An antique store": (21, 0.01, 0.2, 0.004, 0.99, 1e-6),
        "An English breakfast": (18, 0.01, 0.3, 0.003, 0.99, 1e-6),
    }
    for name, numbers in published.items():
        s = PRESETS[name]
        assert (s.guidance_scale, s.prior, s.temperature, s.offset, s.p_max, s.p_min) == numbers, name


def test_table_3_offsets_are_per_step_as_they_were_tuned():
    per_step = [name for name, preset in PRESETS.items() if preset.offset_form == "per_step"]
    assert per_step == TABLE_3
