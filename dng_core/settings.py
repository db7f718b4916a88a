"""What a user may set: one validated dataclass per undesired concept, and the published presets."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from .schedules import ChainName

Method = Literal["dng", "negative_prompting", "safe_latent_diffusion"]
OffsetForm = Literal["integrated", "total", "per_step"]

METHODS: tuple[Method, ...] = ("dng", "negative_prompting", "safe_latent_diffusion")
OFFSET_FORMS: tuple[OffsetForm, ...] = ("integrated", "total", "per_step")

Rule = Literal["algorithm_2", "step_noise", "probe"]
RULES: tuple[Rule, ...] = ("algorithm_2", "step_noise", "probe")


@dataclass(frozen=True)
class Settings:
    """How one undesired concept is guided away from. Invalid values raise ValueError, naming the field.

    Parameters
    ----------
    method: "dng" scales the push by lambda_0 p / (1 - p), "negative_prompting" keeps it at lambda_0, and
        "safe_latent_diffusion" masks it per element, with momentum (Schramowski et al. 2023).
    guidance_scale: lambda_0, at least 0; 0 switches guidance off.
    prior: p(c-|x_T), the expected share of undesired samples, in (0, 1), within [p_min, p_max].
    temperature: tau, at least 0; 1 is exact, less makes the posterior slower to move.
    offset: delta, added to the log-posterior along the run; 0 is exact, more switches guidance on earlier. Its unit
        is that of ``offset_form``.
    offset_form: "integrated" takes delta as the paper's number at its 1000 steps and integrates it over the training
        chain, so that it means the same at every step count; "total" takes the nats added over the whole chain;
        "per_step" adds delta / (2 beta-tilde) once per step taken, as the paper's Algorithm 2 does.
    p_min, p_max: the posterior is clamped to this range, 0 < p_min < p_max < 1.
    max_scale: cap on the product lambda_0 p / (1 - p); infinity for none. A larger push seldom removes more, and can
        throw a state off its chain where steps are few.
    rule: how a jump's evidence is computed. "algorithm_2" is the paper's. The other two add a term that Algorithm 2
        lacks on large steps and on deterministic samplers: "step_noise" estimates the term from the noise that the
        sampler drew, which is good where predictions are exact and fails on large latents of trained networks;
        "probe" estimates it by one more pair of predictions at some of the steps (see :mod:`.divergence`).
    sld_threshold, sld_warmup_scale, sld_momentum_scale, sld_momentum_decay: Safe Latent Diffusion's threshold on
        eps - eps(c-), s_s, s_m and beta_m; defaults as in the authors' comparison.
    """

    method: Method = "dng"
    guidance_scale: float = 1.0
    prior: float = 0.2
    temperature: float = 1.0
    offset: float = 0.0
    offset_form: OffsetForm = "integrated"
    p_min: float = 1e-6
    p_max: float = 0.99
    max_scale: float = 10.0
    rule: Rule = "algorithm_2"
    sld_threshold: float = 0.04
    sld_warmup_scale: float = 100.0
    sld_momentum_scale: float = 0.2
    sld_momentum_decay: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float | int) and math.isnan(value):
                raise ValueError(f"{field.name} is not a number (NaN); give a finite value")
        self._check("method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        self._check("offset_form", self.offset_form in OFFSET_FORMS, f"one of {', '.join(OFFSET_FORMS)}")
        self._check("rule", self.rule in RULES, f"one of {', '.join(RULES)}")
        self._check("guidance_scale", 0 <= self.guidance_scale < math.inf, "at least 0 and finite")
        self._check("prior", 0 < self.prior < 1, "between 0 and 1, exclusive")
        self._check("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite")
        self._check("offset", math.isfinite(self.offset), "finite")
        self._check("p_min", 0 < self.p_min < 1, "between 0 and 1, exclusive")
        self._check("p_max", 0 < self.p_max < 1, "between 0 and 1, exclusive")
        self._check("p_min", self.p_min < self.p_max, f"less than p_max ({self.p_max})")
        self._check(
            "prior", self.p_min <= self.prior <= self.p_max, f"within [p_min, p_max] = [{self.p_min}, {self.p_max}]"
        )
        self._check("max_scale", self.max_scale > 0, "greater than 0")
        self._check("sld_momentum_decay", 0 <= self.sld_momentum_decay < 1, "at least 0 and less than 1")
        self._check("sld_warmup_scale", 0 <= self.sld_warmup_scale < math.inf, "at least 0 and finite")
        self._check("sld_momentum_scale", math.isfinite(self.sld_momentum_scale), "finite")

    def _check(self, name: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise ValueError(f"{name} must be {wanted}; it is {getattr(self, name)}")

    def with_(self, **changes: object) -> "Settings":
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Preset:
    """Published settings, the training chain that they were tuned on, and where they are published."""

    settings: Settings
    chain: ChainName
    source: str


def _table_3(scale: float, temperature: float, offset: float) -> Preset:
    return Preset(
        Settings(
            guidance_scale=scale,
            prior=0.01,
            temperature=temperature,
            offset=offset,
            offset_form="per_step",
            max_scale=100,
        ),
        chain="scaled_linear",
        source="Koulischer et al., ICLR 2025, Table 3, as quoted by a public re-implementation; per-step offset, "
        "tuned at an unpublished step count",
    )


PRESETS: dict[str, Preset] = {
    "exact": Preset(Settings(prior=0.1), "linear", "Algorithm 2 as derived: temperature 1, offset 0"),
    "authors' defaults": Preset(Settings(max_scale=100), "linear", "argument parser of the authors' code"),
    "CIFAR-10": Preset(
        Settings(guidance_scale=5, prior=0.01, temperature=0.2, offset=2e-4, p_max=0.8, max_scale=20),
        "linear",
        "README of the authors' code; its per-step offset at 1000 steps, here integrated over the chain",
    ),
    "Stable Diffusion": Preset(
        Settings(guidance_scale=20, prior=0.01, temperature=0.2, offset=2.7, offset_form="total", max_scale=20),
        "scaled_linear",
        "a place to start, not yet measured: between the paper's five prompts below; in nats, the offset that 0.004 "
        "per step is over 20 evenly spaced steps; a lower cap",
    ),
    "Medieval feast": _table_3(27, 0.2, 0.004),
    "A dinner table": _table_3(12, 0.3, 0.003),
    "An art workshop": _table_3(27, 0.2, 0.002),
    "An antique store": _table_3(21, 0.2, 0.004),
    "An English breakfast": _table_3(18, 0.3, 0.003),
}
