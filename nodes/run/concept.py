"""What a run is to avoid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...dng_core.calibration_files import ModelCalibration
from ...dng_core.economy import EconomyName
from ...dng_core.methods import MethodSettings
from ...dng_core.settings import Settings
from .frames import sigma_at

Reference = Literal["auto", "positive", "cfg"]
KEY = "dng_"
"""How the keys of concepts begin, among the conditionings of a guider."""

REFERENCES: tuple[Reference, ...] = ("auto", "positive", "cfg")

JOINT = "dng_joint"
"""The option by which Joint Negative marks the entries of a conditioning that holds the prompt with the thing."""


@dataclass(frozen=True)
class Concept:
    """Something to avoid: its conditioning as it came through the wire, and how to guide away from it.

    ``reference`` says which prediction the undesired one is compared with (:attr:`compared_with`): the positive, the
    CFG mix, or what suits the conditioning ("auto"). ``economy`` says at which calls the undesired prediction is
    evaluated.
    ``calibration`` is where the settings' temperature and drift come from. ``evidence_until`` is the share of the
    noise schedule, 0 to 1, that ends at the settings' ``evidence_above``; 0 leaves the settings as they are.
    """

    conditioning: list
    settings: MethodSettings
    reference: Reference = "auto"
    economy: EconomyName = "off"
    calibration: ModelCalibration | None = None
    evidence_until: float = 0.0

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise ValueError(f"`reference` must be one of {', '.join(REFERENCES)}; it is {self.reference!r}")
        if not 0 <= self.evidence_until <= 1:
            raise ValueError(f"`evidence_until` must lie between 0 and 1; it is {self.evidence_until}")

    @property
    def compared_with(self) -> Reference:
        """The reference, where "auto" is left only for the unconditional prediction, if there is one.

        Where Joint Negative made the conditioning, "auto" is the positive: the prompt with the thing is compared with
        the prompt, and their ratio is the share of the thing among images of this prompt.
        """
        joint = bool(self.conditioning) and all(options.get(JOINT, False) for _, options in self.conditioning)
        return "positive" if joint and self.reference == "auto" else self.reference

    def settings_on(self, model_sampling: Any) -> MethodSettings:
        """The settings, with ``evidence_until`` as a noise level of the model's schedule."""
        if self.evidence_until == 0 or not isinstance(self.settings, Settings):
            return self.settings
        return self.settings.with_(evidence_above=sigma_at(model_sampling, self.evidence_until))

    @property
    def active(self) -> bool:
        """Whether there is something to avoid, and guidance is not switched off."""
        return bool(self.conditioning) and self.settings.guidance_scale > 0


def keys_of(concepts: Sequence[Concept]) -> list[str]:
    """Under which key a guider holds the conditioning of each concept. ComfyUI tells models this key."""
    return [f"{KEY}{i}" for i in range(len(concepts))]


def input_of(key: str) -> str:
    """The input that a guider's conditioning came through, as an error names it.

    What ComfyUI keeps as "negative" is `unconditional` in DNG's samplers.
    """
    if not key.startswith(KEY):
        return {"negative": "`negative` (of a DNG sampler: `unconditional`)"}.get(key, f"`{key}`")
    number = int(key.removeprefix(KEY)) + 1
    return "`negative`" if number == 1 else f"`negative` of concept {number} (of `more_concepts` or `concepts`)"
