"""The methods by name: DNG and its baselines, the settings of each, and the guidance that follows them."""

from collections.abc import Sequence

from torch import Tensor

from .baselines import Baseline, BaselineGuidance, ContrastiveCFG, NegativePrompting, SafeLatentDiffusion
from .economy import Economy
from .evidence import Foretold
from .guidance import Guidance, NegativeGuidance
from .posterior import Chain
from .settings import Settings

MethodSettings = Settings | Baseline

METHODS: dict[str, type[MethodSettings]] = {
    settings.method: settings for settings in (Settings, NegativePrompting, SafeLatentDiffusion)
}
"""The methods that the nodes offer."""
STUDIED: dict[str, type[MethodSettings]] = METHODS | {ContrastiveCFG.method: ContrastiveCFG}
"""The methods that the studies compare: those of the nodes, and baselines of the literature."""


def guidance_by(
    settings: Sequence[MethodSettings],
    chain: Chain | None = None,
    log_priors: Sequence[Tensor] | Tensor | None = None,
    seed: int = 0,
    economies: Sequence[Economy] | None = None,
    foretold: Sequence[Foretold | None] | None = None,
) -> Guidance:
    """The guidance of one run away from one or more concepts; all but ``settings`` and ``economies`` are DNG's.

    Raises
    ------
    ValueError: if the concepts' settings are of several methods, or what :class:`NegativeGuidance` raises.
    """
    methods = sorted({s.method for s in settings})
    if len(methods) > 1:
        raise ValueError(f"all concepts of a run must share one method, not {', '.join(methods)}")
    dynamic = [s for s in settings if isinstance(s, Settings)]
    constant = [s for s in settings if not isinstance(s, Settings)]
    if constant:
        return BaselineGuidance(constant, economies)
    return NegativeGuidance(dynamic, chain, log_priors, seed, economies, foretold)
