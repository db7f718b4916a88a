"""The table of samplers against the samplers: how much noise each adds, where it calls, and what is refused."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

STEP = (2.0, 1.4)
FLOW_STEP = (0.7, 0.5)
STOCHASTIC = [
    ("euler_ancestral", {}), ("euler_ancestral", {"eta": 0.6, "s_noise": 0.9}), ("dpm_2_ancestral", {"eta": 0.7}),
    ("dpmpp_2s_ancestral", {"eta": 0.7}), ("euler_ancestral_cfg_pp", {"eta": 0.7}),
    ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.7}), ("res_multistep_ancestral", {"eta": 0.7}),
    ("res_multistep_ancestral_cfg_pp", {"s_noise": 1.1}), ("dpmpp_sde", {"eta": 0.7}), ("dpmpp_sde_gpu", {}),
    ("dpmpp_2m_sde", {"eta": 0.7}), ("dpmpp_2m_sde_gpu", {}), ("dpmpp_2m_sde_heun", {"s_noise": 0.8}),
    ("dpmpp_2m_sde_heun_gpu", {}), ("dpmpp_3m_sde", {"eta": 0.7}), ("dpmpp_3m_sde_gpu", {}), ("ddpm", {}),
    ("er_sde", {}), ("er_sde", {"s_noise": 0.9}), ("seeds_2", {"eta": 0.7}), ("seeds_3", {"eta": 0.7}),
    ("exp_heun_2_x0_sde", {"eta": 0.7}), ("sa_solver", {}), ("sa_solver_pece", {}),
]  # fmt: skip
CHURNING = [(name, {"s_churn": 0.9, "s_noise": 1.1}) for name in ("euler", "heun", "heunpp2", "dpm_2")]


@pytest.fixture
def kernels(pack: Any, bench: Any) -> Any:
    return importlib.import_module(pack.__name__ + ".nodes.run.samplers")


def injected_variance(bench: Any, sampler: Any, model: Any, step: tuple[float, float]) -> tuple[float, float]:
    """Run a real sampler from x = 0 with a denoiser that says 0: all that is there after one step is its noise.

    Returns that noise's variance, and the level at which the sampler called next.
    """
    seen: list[tuple[float, float]] = []

    def denoiser(x: torch.Tensor, sigma: torch.Tensor, model_options: dict, seed: int) -> torch.Tensor:
        seen.append((float(sigma[0]), float(x.var())))
        for function in model_options.get("sampler_post_cfg_function", []):
            function({"denoised": x * 0, "uncond_denoised": x * 0})
        return x * 0

    sampling = model.get_model_object("model_sampling")
    denoiser.inner_model = SimpleNamespace(  # type: ignore[attr-defined]
        inner_model=SimpleNamespace(model_sampling=sampling), model_patcher=model
    )
    sigmas, x = torch.tensor([*step, 0.3 * step[1], 0.0]), torch.zeros(1, 1, 100, 400)
    torch.manual_seed(0)
    sampler.sampler_function(
        denoiser, x, sigmas, extra_args={"seed": 3, "model_options": {}}, disable=True, **sampler.extra_options
    )
    at_next = [(level, variance) for level, variance in seen if level >= step[1] * (1 - 1e-5)][-1]
    return at_next[1], at_next[0]


def measured_and_said(
    bench: Any, kernels: Any, name: str, options: dict, prediction: str, step: tuple[float, float]
) -> tuple[float, float]:
    model = bench.model(prediction)
    sampler = bench.comfy.samplers.KSAMPLER(bench.comfy.samplers.sampler_object(name).sampler_function, options)
    variance, next_level = injected_variance(bench, sampler, model, step)
    sampling = model.get_model_object("model_sampling")
    frame = bench.frames.noise_frame(sampling)
    known = kernels.options_of(sampler, sampling)
    sigma, next_sigma = frame.sigma(step[0]), frame.sigma(next_level)
    if "s_churn" in options:  # the noise that raised the first level is carried over the step, by sigma' / sigma
        raised = sigma * kernels._churn(known, step[0], 3)
        variance -= options["s_noise"] ** 2 * (raised**2 - sigma**2) * (step[1] / raised) ** 2
        sigma = raised
    exact = next_sigma**2 * (1 - (next_sigma / sigma) ** 2)
    said = kernels.noise_fraction(kernels.name_of(sampler), known, frame, 3, sigma, next_sigma)
    return variance * float(frame.to_ve(torch.tensor(1.0), next_level)) ** 2 / exact, said


@pytest.mark.parametrize(("name", "options"), [*STOCHASTIC, *CHURNING], ids=str)
def test_the_noise_fraction_is_that_of_the_real_sampler(bench, kernels, name, options):
    measured, said = measured_and_said(bench, kernels, name, options, "epsilon", STEP)
    assert measured == pytest.approx(said, rel=0.03)
    assert said > 0.02


@pytest.mark.parametrize(("name", "options"), STOCHASTIC, ids=str)
def test_the_noise_fraction_on_flow_models_is_that_of_the_real_sampler(bench, kernels, name, options):
    measured, said = measured_and_said(bench, kernels, name, options, "flow", FLOW_STEP)
    assert measured == pytest.approx(said, rel=0.03)


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_samplers_said_to_be_deterministic_add_no_noise(bench, kernels, prediction):
    step = STEP if prediction == "epsilon" else FLOW_STEP
    stochastic = {name for name, _ in STOCHASTIC}
    for name in bench.comfy.samplers.KSampler.SAMPLERS:
        if name in stochastic | {"lcm"}:
            continue
        if name in ("dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2"):  # these go their own ways below
            sampler = bench.comfy.samplers.sampler_object(name)
            options = kernels.options_of(sampler, None)
            frame = bench.frames.NoiseFrame("ve")
            assert kernels.noise_fraction(kernels.name_of(sampler), options, frame, 3, *STEP) == 0, name
            continue
        measured, said = measured_and_said(bench, kernels, name, {}, prediction, step)
        assert measured < 1e-8 and said == 0, name


def test_every_sampler_of_comfyui_is_in_the_table_or_refused(bench, kernels):
    names = {kernels.name_of(bench.comfy.samplers.sampler_object(n)) for n in bench.comfy.samplers.KSampler.SAMPLERS}
    assert names - kernels.TRACKED == {"lcm"}


def test_er_sde_with_the_noise_scaler_of_a_reverse_time_sde(bench, kernels):
    measured, said = measured_and_said(bench, kernels, "er_sde", {"noise_scaler": lambda x: x**1.7}, "epsilon", STEP)
    assert measured == pytest.approx(said, rel=0.03) and 0.5 < said < 0.9


def test_a_sampler_of_another_pack_is_tracked_as_algorithm_2_does(bench, kernels):
    frame = bench.frames.NoiseFrame("ve")
    assert kernels.noise_fraction("theirs", {}, frame, 3, *STEP) == 1


def test_a_churned_step_is_an_anchor_at_the_level_where_it_starts(bench):
    """Churn raises the noise before each step, off the schedule: every step must be tracked all the same."""
    sampler = bench.comfy.samplers.ksampler("euler", {"s_churn": 5.0})
    guider = bench.sampling.NegativeGuider(bench.model(), bench.cond(), [bench.concept()], None, 1.0)
    sigmas = bench.comfy.samplers.calculate_sigmas(bench.model().get_model_object("model_sampling"), "karras", 10)
    noise = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0, disable_pbar=True)
    assert len(guider.trace.sigmas) == 10
    torch.testing.assert_close(guider.trace.sigmas, sigmas[:-1].cpu() * 1.41421356, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["lcm", "ar_video"])
def test_samplers_that_cannot_be_tracked_are_refused_with_what_to_do_instead(bench, kernels, name):
    if name not in bench.comfy.samplers.KSampler.SAMPLERS:
        pytest.skip("this ComfyUI has no such sampler")
    sampler = bench.comfy.samplers.ksampler(name)
    with pytest.raises(ValueError, match=rf"{name} cannot be tracked.*choose another, such as euler_ancestral"):
        kernels.check_sampler(sampler)


def test_a_low_eta_leaves_as_little_as_eta_1(bench):
    """The step's own noise stands in for the rest: without it, eta 0.7 leaves about twice as much."""
    sigmas = bench.comfy.samplers.calculate_sigmas(bench.model().get_model_object("model_sampling"), "karras", 30)
    noise = torch.randn(800, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    left = {}
    for eta in (1.0, 0.7):
        sampler = bench.comfy.samplers.ksampler("euler_ancestral", {"eta": eta})
        concept = bench.concept(rule="step_noise")
        guider = bench.sampling.NegativeGuider(bench.model(), bench.cond(), [concept], None, 1.0)
        samples = guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0, disable_pbar=True)
        left[eta] = bench.report(samples).forbidden_share
    assert left[0.7] <= 0.055 and left[1.0] <= 0.055, left
