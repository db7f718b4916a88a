"""What ComfyUI's samplers really draw from: how much noise each adds over a step, and at which levels it calls.

Formulas are those of ``comfy/k_diffusion/sampling.py`` (v0.30), in the variance-exploding frame: sigma and sigma' are
the levels of a step, r = sigma'^2 / sigma^2, and the exact kernel has the variance sigma'^2 (1 - r).
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import comfy.samplers

from ...dng_core.frames import NoiseFrame

REFUSED = {
    "lcm": "draws a new image at every step",
    "ar_video": "makes a video block after block, each with noise of its own",
}
ADAPTIVE = ("dpm_fast", "dpm_adaptive")
"""Samplers that choose their own levels."""

DETERMINISTIC = frozenset(
    [
        "euler_cfg_pp",
        "euler_pp",
        "lms",
        "dpm_fast",
        "dpmpp_2m",
        "dpmpp_2m_cfg_pp",
        "ipndm",
        "ipndm_v",
        "deis",
        "res_multistep",
        "res_multistep_cfg_pp",
        "gradient_estimation",
        "gradient_estimation_cfg_pp",
        "exp_heun_2_x0",
        "unipc",
        "unipc_bh2",
    ]
)
CHURNING = frozenset(["euler", "heun", "heunpp2", "dpm_2"])
ANCESTRAL = frozenset(["euler_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu"])
RECTIFIED = frozenset(["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"])
"""Ancestral samplers that take another form on flow models."""
UNSCALED = frozenset(
    ["res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "ddpm"]
)
"""Ancestral samplers that have no form for flow models: they use the level t in formulas for sigma."""
TRIES = frozenset(["dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp"])
"""Ancestral samplers whose midpoint, reached without noise, lies on the next level at eta 1."""
SDE = frozenset(
    [
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
        "dpmpp_2m_sde_heun",
        "dpmpp_2m_sde_heun_gpu",
        "dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
        "seeds_2",
        "seeds_3",
        "exp_heun_2_x0_sde",
    ]
)
NOISELESS = DETERMINISTIC | CHURNING | {"er_sde", "dpm_adaptive"}
"""Samplers that at their default options add no noise to speak of (:data:`~.posterior.LEAST_NOISE_FRACTION`)."""
SA_SOLVERS = frozenset(["sa_solver", "sa_solver_pece"])
TRACKED = DETERMINISTIC | CHURNING | ANCESTRAL | RECTIFIED | UNSCALED | SDE | SA_SOLVERS | {"er_sde", "dpm_adaptive"}


def name_of(sampler: comfy.samplers.Sampler) -> str:
    """A sampler's name as ComfyUI's menus have it, from its function; its class's name where it has none."""
    name: str = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
    return name.removeprefix("sample_").removesuffix("_function")


def options_of(sampler: comfy.samplers.Sampler, model_sampling: Any) -> dict[str, Any]:
    """The options that a sampler runs with: its function's defaults, and what its node set."""
    function = getattr(sampler, "sampler_function", None)
    parameters = inspect.signature(function).parameters.values() if function else ()
    options = {p.name: p.default for p in parameters if p.default is not p.empty}
    options |= getattr(sampler, "extra_options", {})
    if options.get("tau_func", 0) is None:  # SA-Solver is stochastic between these levels unless told otherwise
        start, end = model_sampling.percent_to_sigma(0.2), model_sampling.percent_to_sigma(0.8)
        options["tau_func"] = lambda level: 1.0 if start >= level >= end else 0.0
    return options


def check_sampler(sampler: comfy.samplers.Sampler) -> None:
    """Raise ValueError for a sampler whose states are no chain that could be tracked."""
    for name, reason in REFUSED.items():
        if name in name_of(sampler):
            raise ValueError(
                f"the sampler {name} cannot be tracked by Dynamic Negative Guidance, since it {reason}; choose "
                "another, such as euler_ancestral or dpmpp_2m"
            )


def tracked_levels(name: str, options: dict[str, Any], sigmas: Sequence[float]) -> list[float] | None:
    """The levels of the calls between which a sampler steps; None for one that chooses its own.

    With churn, a step starts above its scheduled level, by the factor of :func:`_churn`.
    """
    if name in ADAPTIVE:
        return None
    levels = [level for level in sigmas if level > 0]
    if name in CHURNING and options.get("s_churn", 0.0) > 0:
        levels = [level * _churn(options, level, len(sigmas) - 1) for level in levels]
    return levels


def has_trial_points(name: str, options: dict[str, Any], frame: NoiseFrame) -> bool:
    """Whether a sampler reaches each level first by a trial step without noise, then by the step itself.

    The midpoint of such a sampler is at sqrt(sigma sigma_down), and sigma_down is sigma'^2 / sigma at eta 1.
    """
    return name in TRIES and frame.kind != "flow" and float(options.get("eta", 1.0)) == 1


def noise_fraction(
    name: str, options: dict[str, Any], frame: NoiseFrame, steps: int, sigma: float, next_sigma: float
) -> float:
    """The variance that a sampler injects over sigma -> sigma' (VE), as a share of the exact kernel's.

    0 for deterministic samplers, 1 for ancestral and SDE ones at eta 1. Also 1, as Algorithm 2 assumes, where it is
    not known: samplers of other packs, ``dpm_adaptive`` with an eta, and steps from infinite noise.
    """
    if name in DETERMINISTIC:
        return 0.0
    if math.isinf(sigma) or name not in TRACKED:
        return 1.0
    r = (next_sigma / sigma) ** 2
    eta, s_noise = float(options.get("eta", 1.0)), float(options.get("s_noise", 1.0))
    flow = frame.kind == "flow"
    if name == "dpm_adaptive":
        return 0.0 if options.get("eta", 0.0) == 0 else 1.0
    if name in CHURNING:
        raised = _churn_of_level(options, _level(frame, next_sigma), steps)
        return s_noise**2 * (1 - 1 / raised**2) / (1 - r) if raised > 1 and not flow else 0.0
    if flow and name in RECTIFIED:
        t, u = _level(frame, sigma), _level(frame, next_sigma)
        down = u * (1 + (u / t - 1) * eta)
        return s_noise**2 * (1 - (down * (1 - u) / (u * (1 - down))) ** 2) / (1 - r)
    if flow and name in UNSCALED:
        unscaled = (_level(frame, next_sigma) / _level(frame, sigma)) ** 2
        known = 1 / frame.noise_scale if name == "ddpm" else 1.0  # ddpm draws unit noise on every model
        return (s_noise * known) ** 2 * min(1.0, eta**2 * (1 - unscaled)) / (1 - r)
    if name in ANCESTRAL | RECTIFIED | UNSCALED:
        return s_noise**2 * min(1 / (1 - r), eta**2)
    if name in SDE:
        return s_noise**2 * (1 - r**eta) / (1 - r)
    if name in SA_SOLVERS:
        tau = options["tau_func"](_level(frame, next_sigma))
        return s_noise**2 * (1 - r ** (tau**2)) / (1 - r)
    return _er_sde(options, sigma / frame.noise_scale, next_sigma / frame.noise_scale)


def _level(frame: NoiseFrame, sigma: float) -> float:
    """A VE noise level as the sampler's schedule has it."""
    return sigma / (frame.noise_scale + sigma) if frame.kind == "flow" else sigma


def _churn(options: dict[str, Any], level: float, steps: int) -> float:
    """The factor by which noise is raised before a step from a scheduled level (Karras et al. 2022, Algorithm 2)."""
    if not options.get("s_tmin", 0.0) <= level <= options.get("s_tmax", math.inf):
        return 1.0
    return 1 + min(options.get("s_churn", 0.0) / steps, math.sqrt(2) - 1)


def _churn_of_level(options: dict[str, Any], raised_level: float, steps: int) -> float:
    """The same, from the level after it was raised."""
    factor = 1 + min(options.get("s_churn", 0.0) / steps, math.sqrt(2) - 1)
    return _churn(options, raised_level / factor, steps)


def _er_sde(options: dict[str, Any], sigma: float, next_sigma: float) -> float:
    """ER-SDE (arXiv:2309.06169): sigma'^2 - sigma^2 (phi(sigma') / phi(sigma))^2, with phi its noise scaler."""
    scaler = options.get("noise_scaler")
    try:
        if scaler is None:
            ratio = next_sigma * (math.exp(next_sigma**0.3) + 10) / (sigma * (math.exp(sigma**0.3) + 10))
        else:
            ratio = float(scaler(next_sigma)) / float(scaler(sigma))
    except OverflowError:
        return 1.0
    injected = max(0.0, next_sigma**2 - (sigma * ratio) ** 2)
    r = (next_sigma / sigma) ** 2
    return float(options.get("s_noise", 1.0)) ** 2 * injected / (next_sigma**2 * (1 - r))
