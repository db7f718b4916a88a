"""What a run is to avoid."""

from dataclasses import dataclass
from typing import Literal

from ...dng_core.methods import MethodSettings

Reference = Literal["auto", "positive", "cfg"]
REFERENCES: tuple[Reference, ...] = ("auto", "positive", "cfg")


@dataclass(frozen=True)
class Concept:
    """Something to avoid: its conditioning as it came through the wire, and how to guide away from it.

    ``reference`` says which prediction the undesired one is compared with: the unconditional one where there is one
    ("auto"), the positive, or the CFG mix.
    """

    conditioning: list
    settings: MethodSettings
    reference: Reference = "auto"

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise ValueError(f"`reference` must be one of {', '.join(REFERENCES)}; it is {self.reference!r}")

    @property
    def active(self) -> bool:
        """Whether there is something to avoid, and guidance is not switched off."""
        return bool(self.conditioning) and self.settings.guidance_scale > 0
