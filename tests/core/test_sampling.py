"""Algorithm 1 on the oracle: the tracked posterior against the exact one, and how much of a component it removes."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from dng_core.baselines import NegativePrompting
from dng_core.economy import Economy
from dng_core.guidance import NegativeGuidance
from dng_core.methods import MethodSettings, guidance_by
from dng_core.oracle import GaussianMixture
from dng_core.posterior import Chain
from dng_core.sampling import ddpm_sample
from dng_core.schedules import DDPMSchedule, IntegratedOffset, ddpm_sigmas, karras_sigmas
from dng_core.settings import PRESETS, Rule, Settings

CHAIN = DDPMSchedule.named("linear")
OFFSET = IntegratedOffset(CHAIN)
MIXTURE = GaussianMixture.random(8, (32,), std=0.2)
EXACT = Settings(prior=1 / 8, p_min=1e-30, p_max=1 - 1e-12)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are small: more threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def predictor(undesired: Sequence[int] = (0,)) -> Callable[[Tensor, float], tuple[Tensor, list[Tensor]]]:
    return lambda x, sigma: (MIXTURE.denoised(x, sigma), [MIXTURE.denoised(x, sigma, undesired)])


def start(samples: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(samples, 32, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def schedule(name: str, steps: int) -> list[float]:
    if name == "ddpm":
        return ddpm_sigmas(CHAIN, steps)
    return karras_sigmas(steps, float(CHAIN.sigmas[0]), float(CHAIN.sigmas[-1]))


def run(settings: MethodSettings | None, sigmas: list[float], samples: int, seed: int = 0) -> Tensor:
    guidance = guidance_by([settings], Chain(sigmas, OFFSET)) if settings else None
    return ddpm_sample(predictor(), start(samples, seed), sigmas, guidance, torch.Generator().manual_seed(seed + 1))


def forbidden_share(x: Tensor) -> float:
    return float((MIXTURE.classify(x) == 0).float().mean())


def tracking_error(steps: int, samples: int, guidance_scale: float, rule: Rule = "algorithm_2") -> float:
    """mean |tracked - exact posterior| at the last step, from the exact posterior of the first state, in float64."""
    sigmas = ddpm_sigmas(CHAIN, steps)
    noise = start(samples, dtype=torch.float64)
    first = MIXTURE.log_posterior(noise * (1 + sigmas[0] ** 2) ** 0.5, sigmas[0], [0])
    settings = EXACT.with_(guidance_scale=guidance_scale, rule=rule)
    guidance = NegativeGuidance([settings], Chain(sigmas, OFFSET), [first])
    ddpm_sample(predictor(), noise, sigmas, guidance, torch.Generator().manual_seed(1))
    last = guidance.paths[0].points[-1]
    assert last.call is not None
    assert last.sigma == sigmas[-1]
    return float((last.log_p.exp() - MIXTURE.log_posterior(last.call.x, last.sigma, [0]).exp()).abs().mean())


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0], ids=["unguided", "guided"])
def test_the_tracked_posterior_approaches_the_exact_one_as_steps_grow(guidance_scale):
    errors = [tracking_error(steps, 600, guidance_scale) for steps in (15, 60, 240)]
    assert errors[0] > 1.2 * errors[1] > 1.2**2 * errors[2]
    assert errors[2] < 0.025


def test_the_ancestral_sampler_probes_where_the_rule_probe_asks_for_it():
    assert tracking_error(30, 600, 0.0, "probe") < 0.5 * tracking_error(30, 600, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0], ids=["unguided", "guided"])
def test_at_1000_steps_the_tracked_posterior_is_within_0_01(guidance_scale):
    assert tracking_error(1000, 2000, guidance_scale) <= 0.01


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("spacing", ["ddpm", "karras"])
def test_the_papers_cifar_10_setting_leaves_at_most_1_percent_at_few_steps(spacing, steps):
    sigmas = schedule(spacing, steps)
    assert forbidden_share(run(PRESETS["CIFAR-10"], sigmas, 800)) <= 0.01
    assert 0.09 < forbidden_share(run(None, sigmas, 500)) < 0.16


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 30, 50, 100, 250, 1000])
@pytest.mark.parametrize("spacing", ["ddpm", "karras"])
def test_the_papers_cifar_10_setting_leaves_at_most_1_percent_at_any_step_count(spacing, steps):
    assert forbidden_share(run(PRESETS["CIFAR-10"], schedule(spacing, steps), 2000)) <= 0.01


def test_the_per_step_offset_does_not_carry_over_to_few_steps():
    """The integrated form of the offset exists for this reason."""
    per_step = PRESETS["CIFAR-10"].with_(offset_form="per_step")
    assert forbidden_share(run(per_step, schedule("ddpm", 50), 500)) > 0.05


def test_the_exact_setting_removes_and_leaves_the_others_balanced_and_on_the_mixture():
    sigmas = schedule("karras", 50)
    guided, unguided = (run(s, sigmas, 1000) for s in (Settings(prior=1 / 8), None))
    assert forbidden_share(guided) <= 0.04
    shares = torch.bincount(MIXTURE.classify(guided), minlength=8)[1:] / (MIXTURE.classify(guided) != 0).sum()
    assert float((1 / 7 * (1 / 7 / shares).log()).sum()) < 0.02
    on_mixture = MIXTURE.distance(unguided).median()
    assert float(MIXTURE.distance(guided).median()) == pytest.approx(float(on_mixture), rel=0.05)


def test_guidance_leaves_almost_all_other_samples_where_they_were():
    sigmas = schedule("karras", 30)
    guided, unguided = (run(s, sigmas, 500) for s in (Settings(prior=1 / 8), None))
    others = MIXTURE.classify(unguided) != 0
    assert float((MIXTURE.classify(guided) == MIXTURE.classify(unguided))[others].float().mean()) > 0.85


def test_negative_prompting_at_scale_0_is_unguided():
    sigmas = schedule("ddpm", 10)
    off = NegativePrompting(0)
    assert torch.equal(run(off, sigmas, 16), run(None, sigmas, 16))


def test_the_product_mixture_needs_the_reference_that_its_negative_is_a_part_of():
    """Attribute A, the positive, is components 0-3. Attribute B, the undesired, is 0, 4 and 5: only 0 is in A too.

    p(B|x) compares B with the unconditional mixture. p(B|x, A) compares the joint negative, component 0, with the
    positive. To compare B itself with the positive gives neither, and removes much less.
    """
    positive, undesired, joint = [0, 1, 2, 3], [0, 4, 5], [0]
    cases = {
        "unconditional": (None, undesired, 3 / 8),
        "joint": (positive, joint, 1 / 4),
        "mismatched": (positive, undesired, 1 / 4),
    }
    sigmas = schedule("karras", 40)
    left = {}
    for name, (reference, negative, prior) in cases.items():
        guidance = NegativeGuidance([Settings(prior=prior)], Chain(sigmas, OFFSET))
        generator = torch.Generator().manual_seed(1)
        x = start(500) * (1 + sigmas[0] ** 2) ** 0.5

        def guided(
            x: Tensor, sigma: float, parts: tuple = (reference, negative), dng: NegativeGuidance = guidance
        ) -> Tensor:
            reference, negative = (MIXTURE.denoised(x, sigma, part) for part in parts)
            return dng(x, sigma, MIXTURE.denoised(x, sigma, positive), reference, [negative])

        out = ddpm_sample(lambda x, sigma, f=guided: (f(x, sigma), []), start(500), sigmas, None, generator)
        assert out.shape == x.shape
        left[name] = forbidden_share(out)
    assert left["unconditional"] < 0.12 and left["joint"] < 0.12
    assert left["mismatched"] > 1.5 * max(left["unconditional"], left["joint"])


def test_the_step_noise_does_not_depend_on_guidance_or_on_what_else_draws_numbers():
    """The same seed means the same noise: with a predictor that answers the noise alone, all runs are one."""
    sigmas = schedule("ddpm", 6)
    generator = torch.Generator()
    outs = []
    for settings in (None, Settings(), NegativePrompting(3.0)):
        torch.rand(7)  # the global generator moves on
        guidance = guidance_by([settings], Chain(sigmas, OFFSET)) if settings else None
        same: Callable[[Tensor, float], tuple[Tensor, list[Tensor]]] = lambda x, s: (x / 2, [x / 2])  # noqa: E731
        outs.append(ddpm_sample(same, start(4), sigmas, guidance, generator.manual_seed(3)))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], ddpm_sample(same, start(4), sigmas, None, generator.manual_seed(4)))


def test_a_run_can_be_repeated():
    sigmas = schedule("karras", 10)
    assert torch.equal(run(Settings(), sigmas, 8), run(Settings(), sigmas, 8))


def test_the_undesired_prediction_at_every_fourth_of_many_steps_removes_as_much():
    steps, samples = 200, 4000
    sigmas = schedule("ddpm", steps)
    left, counted = [], 0

    def both(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        nonlocal counted
        counted += 1
        return predictor()(x, sigma)

    for every in (1, 4):
        counted = 0
        guidance = NegativeGuidance([EXACT], Chain(sigmas, OFFSET), economies=[Economy.every(every)])
        generator = torch.Generator().manual_seed(1)
        reference_alone = lambda x, sigma: (MIXTURE.denoised(x, sigma), [])  # noqa: E731
        out = ddpm_sample(both, start(samples), sigmas, guidance, generator, between=reference_alone)
        trace = guidance.trace()
        assert counted == steps // every == trace.made / samples == int(trace.looked.sum())
        assert (trace.made + trace.spared) / samples == steps == len(trace.sigmas)
        left.append(forbidden_share(out))
    assert forbidden_share(run(None, sigmas, samples)) > 0.1
    assert left[0] < 0.015 and abs(left[1] - left[0]) < 3 * (2 * 0.012 / samples) ** 0.5  # three standard errors


def test_between_looks_the_difference_is_held():
    """A reference of 0 and an undesired prediction of 1 at a constant scale: the estimate is minus the scale."""
    estimates: list[Tensor] = []

    def predict(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        return torch.zeros_like(x), [torch.ones_like(x)]

    sigmas = [4.0, 3.0, 2.0, 1.0]
    for every in (1, 2, 3, 9):
        guidance = guidance_by([NegativePrompting(0.5)], economies=[Economy.every(every)])
        generator = torch.Generator().manual_seed(0)
        estimates.append(ddpm_sample(predict, start(2), sigmas, guidance, generator))
    assert all(torch.equal(e, torch.full((2, 32), -0.5)) for e in estimates)


@pytest.mark.parametrize("variance", ["posterior", "forward"])
def test_the_chain_spreads_as_ddpm_does(variance):
    """With D = 0 and unit-variance noise each step is r x + noise: the last state's variance is known."""
    states: list[Tensor] = []

    def predict(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        states.append(x)
        return torch.zeros_like(x), []

    high, low = float(CHAIN.sigmas[600]), float(CHAIN.sigmas[599])
    ddpm_sample(predict, start(4000), [high, low], None, torch.Generator().manual_seed(5), variance)
    beta, beta_tilde = float(CHAIN.betas[600]), float(CHAIN.posterior_variances[599])
    added = (beta if variance == "forward" else beta_tilde) * (1 + low**2)
    carried = (low / high) ** 4 * (1 + high**2)
    assert float(states[1].var()) == pytest.approx(carried + added, rel=0.02)
    # beta and beta-tilde nearly coincide here: the noise itself must tell them apart
    noise = torch.randn(4000, 32, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(states[1] - (low / high) ** 2 * states[0], added**0.5 * noise, rtol=1e-4, atol=1e-4)


def test_the_result_is_the_last_prediction_without_noise():
    x = ddpm_sample(lambda x, s: (torch.full_like(x, s), []), start(2), [3.0, 1.0, 0.25])
    assert x.unique().tolist() == [0.25]


@pytest.mark.parametrize("sigmas", [[], [1.0, 1.0], [1.0, 2.0], [1.0, 0.0], [0.0], [2.0, -1.0]], ids=str)
def test_schedules_that_do_not_fall_to_above_0_are_refused(sigmas):
    with pytest.raises(ValueError, match="falling noise levels above 0"):
        ddpm_sample(predictor(), start(1), sigmas)


def test_an_unknown_variance_is_refused():
    with pytest.raises(ValueError, match="'posterior' or 'forward'"):
        ddpm_sample(predictor(), start(1), [1.0], variance="beta")  # type: ignore[arg-type]
