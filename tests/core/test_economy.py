"""When to look at the undesired prediction, what is held in between, and what a step costs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dng_core.baselines import NegativePrompting
from dng_core.economy import ECONOMIES, Economy, Watch, places
from dng_core.evidence import Call, held_evidence
from dng_core.guidance import HELD, NegativeGuidance, Some, Trace
from dng_core.methods import guidance_by
from dng_core.oracle import GaussianMixture
from dng_core.posterior import Chain
from dng_core.sampling import ddpm_sample
from dng_core.schedules import DDPMSchedule, IntegratedOffset, karras_sigmas
from dng_core.settings import Settings

AUTO = ECONOMIES["auto"]
MIXTURE = GaussianMixture.random(8, (1, 4, 4), std=0.2)
SIGMAS = karras_sigmas(30, 0.01, 157.0)
PRIOR = Settings(prior=1 / 8)


def oracle(
    economies: Sequence[Economy], settings: Sequence[Settings] = (PRIOR,), samples: int = 16, seed: int = 0
) -> tuple[Tensor, Trace]:
    """Samples of the mixture, away from its first components."""

    def predict(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        return MIXTURE.denoised(x, sigma), [MIXTURE.denoised(x, sigma, [i]) for i in range(len(settings))]

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, 1, 4, 4, generator=generator)
    guidance = NegativeGuidance(settings, Chain(SIGMAS), economies=economies)
    out = ddpm_sample(predict, noise, SIGMAS, guidance, generator)
    return out, guidance.trace()


# The policy


def watch(log_p: float, scale: float, length: float, economy: Economy = AUTO, temperature: float = 1.0) -> Watch:
    """A watch that looked at sigma 4 and saw one image with this posterior, scale and length of the difference."""
    watch = Watch(economy)
    watch.looked(4.0, torch.full((1, 4), length / 2), torch.zeros(1, 4))
    watch.note(torch.tensor([log_p]), torch.tensor([scale]), temperature)
    return watch


def due(watch: Watch, sigma: float) -> bool:
    """Whether any image is to be looked at."""
    rows = watch.awake(sigma)
    return rows is None or bool(rows)


@pytest.mark.parametrize(
    ("p", "scale", "length", "temperature", "wanted"),
    [
        (0.1, 0.1, 10.0, 1.0, True),  # awake
        (1e-4, 1e-4, 10.0, 1.0, False),  # asleep
        (0.1, 0.1, 0.8, 1.0, False),  # quiet: 0.8 is less than 0.3 times 3
        (0.1, 0.1, 1.0, 1.0, True),
        (0.1, 0.1, 1.0, 0.5, False),  # at half the temperature, half the evidence
        (0.9, 9.0, 0.8, 1.0, True),  # a strong push makes a small difference large
        (0.1, 0.1, float("nan"), 1.0, True),
    ],
)
def test_an_image_rests_where_it_is_asleep_or_quiet(p, scale, length, temperature, wanted):
    log_p = float(torch.tensor(p).log())
    assert due(watch(log_p, scale, length, temperature=temperature), 3.0) is wanted


def test_each_image_of_a_batch_sleeps_on_its_own_and_is_looked_at_in_time():
    """The second of three is awake; the others are looked at again at the fourth call after the first look."""
    images = Watch(Economy(asleep=1e-3, longest=4))
    images.looked(4.0, torch.full((3, 4), 5.0), torch.zeros(3, 4))
    found = []
    for sigma in (3.5, 3.0, 2.5, 2.0, 1.5):
        images.note(torch.tensor([1e-5, 0.1, 1e-5]).log(), torch.tensor([0.0, 0.1, 0.0]), 1.0)
        found.append(images.awake(sigma))
        images.looked(sigma, torch.full((3, 4), 5.0), torch.zeros(3, 4), found[-1])
    assert found == [[1], [1], [1], None, [1]]
    assert (images.made, images.spared) == (3 + 1 + 1 + 1 + 3 + 1, 2 + 2 + 2 + 2)


def test_nothing_is_held_for_longer_than_the_longest():
    asleep = watch(-20.0, 0.0, 10.0, Economy(asleep=1e-3, longest=4))
    answers = []
    for sigma in (3.0, 2.5, 2.0, 1.5, 1.0):
        answers.append(due(asleep, sigma))
        asleep.held()
    assert answers == [False, False, False, True, True]


def test_a_return_to_more_noise_and_a_concept_that_did_not_apply_are_looked_at():
    asleep = watch(-20.0, 0.0, 10.0)
    assert not due(asleep, 4.0) and due(asleep, 4.1)
    asleep.forget()
    assert due(asleep, 3.0)


def test_every_so_many_th_call_needs_no_values():
    fixed = Watch(Economy.every(3))
    answers = []
    for sigma in range(9, 0, -1):
        answers.append(due(fixed, float(sigma)))
        if answers[-1]:
            fixed.looked(float(sigma), torch.full((1, 4), float("nan")), torch.zeros(1, 4))
        else:
            fixed.held()
    assert answers == [True, False, False] * 3
    assert (fixed.made, fixed.spared) == (3, 6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"asleep": -0.1}, "asleep must be between 0 and 1; it is -0.1"),
        ({"asleep": 1.1}, "asleep must be between 0 and 1"),
        ({"asleep": float("nan")}, "asleep is not a number"),
        ({"quiet": -1.0}, "quiet must be at least 0 and finite"),
        ({"quiet": float("inf")}, "quiet must be at least 0 and finite"),
        ({"longest": 0}, "longest must be a whole number of at least 1; it is 0"),
        ({"longest": 2.5}, "longest must be a whole number"),
    ],
)
def test_thresholds_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Economy(**values)


def test_each_concept_needs_an_economy_of_its_own():
    with pytest.raises(ValueError, match="2 concepts were set up with 1 economies"):
        NegativeGuidance([PRIOR, PRIOR], economies=[AUTO])


def test_a_prediction_that_was_never_seen_cannot_be_held():
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="cannot be held before it was evaluated once"):
        NegativeGuidance([PRIOR], economies=[AUTO])(x, 2.0, x, x, [HELD])


# What is held


@pytest.mark.parametrize("rule", ["algorithm_2", "elbo", "step_noise", "probe"])
def test_off_is_what_it_is_without_an_economy(rule):
    settings = [PRIOR.with_(rule=rule), PRIOR.with_(rule=rule)]
    (ours, trace), (plain, without) = oracle([Economy(), Economy()], settings), oracle(None, settings)
    assert torch.equal(ours, plain) and torch.equal(trace.posterior, without.posterior)
    assert trace.spared == 0 and bool(trace.looked.all())


def test_a_held_call_moves_the_posterior_by_one_jump_from_the_last_look_and_no_jump_starts_there():
    levels = [4.0, 3.0, 2.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    xs, references, negatives = torch.randn(3, 4, 2, 8, generator=generator) * 0.3
    wide = Settings(prior=0.3, p_min=1e-30, p_max=1 - 1e-12)
    guidance = NegativeGuidance([wide], Chain(levels), economies=[Economy.every(3)])
    for i, sigma in enumerate(levels):
        asked = guidance.looks(sigma)
        assert asked == [i in (0, 3)]
        negative = negatives[i] if asked[0] else HELD
        out = guidance(xs[i], sigma, references[i], references[i], [negative])
        scale = guidance.trace().scale[-1, 0]
        difference = negatives[0] - references[0] if i < 3 else negatives[3] - references[3]
        torch.testing.assert_close(out, references[i] - scale[:, None] * difference)
    calls = [Call(xs[i], levels[i], references[i], negatives[i]) for i in range(4)]
    jumps = torch.stack([held_evidence(calls[0], calls[i], calls[0]) for i in (1, 2, 3)])
    trace = guidance.trace()
    torch.testing.assert_close(trace.posterior[1:, 0].log(), torch.tensor(0.3).log() + jumps)
    assert trace.looked[:, 0].tolist() == [True, False, False, True]
    assert (trace.made, trace.spared) == (2 * 2, 2 * 2)


def some(rows: list[int], negative: Tensor) -> Some:
    return Some(rows, places(rows, negative.device), negative)


def test_where_some_images_are_evaluated_the_others_go_on_as_if_the_held_difference_had_been_seen():
    levels, generator = [4.0, 3.0, 2.0], torch.Generator().manual_seed(0)
    xs, references, negatives = torch.randn(3, 3, 4, 8, generator=generator)
    believed = negatives[1].clone()
    held = (negatives[0] - references[0])[[0, 3]]
    believed[[0, 3]] = references[1][[0, 3]] + held
    given = {"some": [some([1, 2], negatives[1][[1, 2]]), HELD], "all": [believed, HELD]}
    outs, traces = {}, {}
    for name, later in given.items():
        guidance = NegativeGuidance([PRIOR], Chain(levels), economies=[AUTO])
        outs[name] = [
            guidance(xs[i], levels[i], references[i], references[i], [negative])
            for i, negative in enumerate([negatives[0], *later])
        ]
        traces[name] = guidance.trace()
    torch.testing.assert_close(outs["some"], outs["all"])
    torch.testing.assert_close(traces["some"].posterior, traces["all"].posterior)
    assert (traces["some"].made, traces["some"].spared) == (4 + 2, 2 + 4)
    scale = traces["some"].scale[-1, 0][[0, 3], None]
    torch.testing.assert_close(outs["some"][2][[0, 3]], references[2][[0, 3]] - scale * held)


def test_a_part_of_a_prediction_that_is_not_finite_does_not_push():
    x = torch.zeros(3, 8)
    guidance = NegativeGuidance([PRIOR], Chain([4.0, 3.0]), economies=[AUTO])
    guidance(x, 4.0, x, x, [x + 1])
    out = guidance(x, 3.0, x, x, [some([1], torch.full((1, 8), float("nan")))])
    assert bool(out.isfinite().all()) and torch.equal(out[1], x[1]) and guidance.ignored()


@pytest.mark.parametrize("rule", ["step_noise", "probe"])
def test_rules_that_compare_two_calls_are_evaluated_for_all_images(rule):
    """One of two images is awake."""
    x = torch.zeros(2, 8)
    for of, wanted in (("algorithm_2", [[1]]), (rule, [None])):
        guidance = NegativeGuidance([Settings(prior=1e-5, p_min=1e-6, rule=of)], Chain([4.0, 3.0]), economies=[AUTO])
        guidance.paths = [replace(guidance.paths[0], log_prior=torch.tensor([1e-5, 0.3]).log())]
        guidance(x, 4.0, x, x, [x + 9])
        assert guidance.awake(3.0) == wanted and guidance.looks(3.0) == [True]


def test_images_that_sleep_are_left_as_they_are_and_half_the_predictions_are_spared():
    """Alone, an image of the oracle that does not turn to the undesired stays what it is."""
    made = []
    for seed in range(8):
        plain, _ = oracle([Economy()], samples=1, seed=seed)
        spared, trace = oracle([AUTO], samples=1, seed=seed)
        assert MIXTURE.classify(plain) == MIXTURE.classify(spared)
        torch.testing.assert_close(plain, spared, rtol=0, atol=0.1)
        assert trace.made + trace.spared == len(SIGMAS)
        made.append(trace.made)
    assert sum(made) <= 0.55 * 8 * len(SIGMAS)


def test_the_looks_follow_the_policy():
    """The steps of the trace, decided again from its own posterior and scale and from the mixture's differences."""
    seen: list[Tensor] = []

    def predict(x: Tensor, sigma: float) -> tuple[Tensor, list[Tensor]]:
        seen.append(x)
        return MIXTURE.denoised(x, sigma), [MIXTURE.denoised(x, sigma, [0])]

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 1, 4, 4, generator=generator)
    guidance = NegativeGuidance([PRIOR], Chain(SIGMAS), economies=[AUTO])
    ddpm_sample(predict, noise, SIGMAS, guidance, generator)
    trace, since, length = guidance.trace(), 0, torch.zeros(3)
    for i, (x, sigma) in enumerate(zip(seen, SIGMAS, strict=True)):
        p, scale = trace.posterior[i - 1, 0], trace.scale[i - 1, 0]
        rests = (p < AUTO.asleep) | (scale.clamp(min=1) * length <= AUTO.quiet * sigma)
        due = i == 0 or since >= AUTO.longest or not bool(rests.all())
        assert bool(trace.looked[i, 0]) is due, i
        if due:
            length = (MIXTURE.denoised(x, sigma, [0]) - MIXTURE.denoised(x, sigma)).flatten(1).norm(dim=1)
        since = 1 if due else since + 1


def test_each_concept_sleeps_on_its_own():
    """The prediction of a concept that sleeps is not used, whatever it is; the other goes on being looked at."""
    x, generator = torch.zeros(2, 8), torch.Generator().manual_seed(0)
    asleep = Settings(prior=1e-5, p_min=1e-6)
    guidance = NegativeGuidance([asleep, PRIOR], Chain([4.0, 3.0, 2.0]), economies=[AUTO, AUTO])
    negatives = [torch.randn(2, 8, generator=generator) * 9 for _ in range(2)]
    guidance(x, 4.0, x, x, negatives)
    assert guidance.looks(3.0) == [False, True]
    guidance(x, 3.0, x, x, [HELD, negatives[1]])
    assert guidance.trace().looked.tolist() == [[True, True], [False, True]]


def test_an_image_that_turns_to_the_undesired_between_two_looks_wakes_by_itself():
    x, undesired = torch.zeros(1, 8), torch.full((1, 8), 2.0)
    guidance = NegativeGuidance([Settings(prior=5e-4)], Chain([4.0, 3.0, 2.0, 1.0]), economies=[AUTO])
    guidance(x, 4.0, x, x, [undesired])
    assert guidance.looks(3.0) == [False]
    guidance(x + 2, 3.0, x, x, [HELD])
    assert guidance.looks(2.0) == [True]


def test_a_baseline_never_sleeps_and_can_still_look_at_every_other_call():
    x = torch.zeros(1, 8)
    for economy, wanted in ((AUTO, True), (Economy.every(2), False)):
        guidance = guidance_by([NegativePrompting(2.0)], economies=[economy])
        guidance(x, 4.0, x, x, [x + 1])
        assert guidance.looks(3.0) == [wanted]
    assert torch.equal(guidance(x, 3.0, x, x, [HELD]), x - 2)


def test_a_trace_that_goes_on_counts_both_runs():
    first, second = (oracle([AUTO], samples=1, seed=seed)[1] for seed in (0, 1))
    both = first.then(second)
    assert (both.made, both.spared) == (first.made + second.made, first.spared + second.spared)
    assert torch.equal(both.looked, torch.cat([first.looked, second.looked]))


# What a step costs


class Operations(TorchDispatchMode):
    """Counts tensor operations; refuses those that wait for a device, or copy to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item", "equal", "unique"), name
        out = function(*args, **(kwargs or {}))
        moved = [t for t in args if isinstance(t, Tensor)]
        if isinstance(out, Tensor) and moved:
            assert all(t.device == out.device for t in moved if t.ndim), f"{name} copies to {out.device}"
        self.count += 1
        return out


@pytest.mark.parametrize(("concepts", "at_most"), [(1, 40), (3, 120)])
@pytest.mark.parametrize("rule", ["algorithm_2", "elbo", "step_noise", "probe"])
def test_a_step_takes_few_operations_and_waits_for_nothing(concepts, at_most, rule):
    """Tracker, decision and combination. (The offset's table is made once in a run.)"""
    settings, offset = [Settings(prior=0.1, rule=rule)] * concepts, IntegratedOffset(DDPMSchedule.named("linear"))
    assert offset(1.0) > 0
    for economy in (Economy(), AUTO, Economy.every(2)):
        chain = Chain([4.0, 3.0, 2.0, 1.0], offset)
        guidance = NegativeGuidance(settings, chain, economies=[economy] * concepts)
        generator = torch.Generator().manual_seed(0)
        for sigma in (4.0, 3.0, 2.0, 1.0):
            x, reference, *negatives = torch.randn(2 + concepts, 2, 4, 8, 8, generator=generator)
            with Operations() as operations:
                looks = guidance.looks(sigma) if economy.asleep == 1 else [True] * concepts
                given = [n if look else HELD for n, look in zip(negatives, looks, strict=True)]
                guidance(x, sigma, reference, reference, given)
            assert 0 < operations.count <= at_most
