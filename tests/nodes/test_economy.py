"""Economy inside ComfyUI: what is evaluated, what stays as it is, and that nothing is left behind."""

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

SAMPLERS = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_2m", "heun", "dpmpp_2s_ancestral", "dpm_adaptive", "seeds_2")


def concept(bench: Any, components: str | list = "0", economy: str = "auto", **changes: Any) -> Any:
    return dataclasses.replace(bench.concept(components, **changes), economy=economy)


def asked(calls: Any, own: int = 1) -> int:
    """How many undesired predictions were evaluated beside the sampler's own."""
    return sum(batch - own for batch in calls.batches)


@pytest.mark.parametrize("rule", ["algorithm_2", "probe"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_spares_predictions_and_the_trace_counts_them(bench, count, sampler, rule):
    model, options = bench.model(), {"latent": bench.latent(1), "steps": 20, "sampler_name": sampler}
    calls = count(model)
    _, full = bench.dng(model, concept(bench, economy="off", rule=rule), **options)
    everything = asked(calls)
    assert full.made == everything and full.spared == 0 and bool(full.looked.all())
    calls.batches.clear()
    samples, trace = bench.dng(model, concept(bench, rule=rule), **options)
    assert trace.made == asked(calls) < 0.75 * everything
    assert trace.spared > 0 and not bool(trace.looked.all())
    assert bool(samples.isfinite().all())


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m"])
def test_off_is_the_default_bit_for_bit(bench, sampler):
    model, rule = bench.model(), "probe" if sampler == "dpmpp_2m" else "algorithm_2"
    common = (model, 1, 12, 1.0, sampler, "karras", bench.cond(), bench.cond("0"), bench.latent(4), 1.0)
    (plain, trace), (off, other) = (
        bench.sampling.KSamplerDNG.execute(*common, **bench.inputs(rule=rule, **economy)).args
        for economy in ({}, {"economy": "off"})
    )
    assert torch.equal(plain["samples"], off["samples"]) and torch.equal(trace.posterior, other.posterior)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_patch_the_guider_and_the_node_sleep_alike(bench, count, cfg):
    model, options = bench.model(), {"latent": bench.latent(2), "steps": 15, "cfg": cfg}
    samples, trace = bench.dng(model, concept(bench), unconditional=bench.cond(), **options)
    patched = bench.patching.patch_model(model, [concept(bench)])
    assert torch.equal(bench.sample(patched, negative=bench.cond(), **options), samples)
    guider = bench.sampling.DNGGuider.execute(
        model, bench.cond(), bench.cond("0"), cfg, bench.cond(), **bench.inputs(economy="auto")
    ).args[0]
    sigmas = bench.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 15)
    noise = bench.comfy.sample.prepare_noise(options["latent"]["samples"], 1, None)
    sampler = bench.comfy.samplers.sampler_object("euler_ancestral")
    out = guider.sample(noise, options["latent"]["samples"], sampler, sigmas, disable_pbar=True, seed=1)
    assert torch.equal(out, samples) and torch.equal(guider.trace.looked, trace.looked)
    assert trace.spared > 0


def test_what_sleeps_is_not_part_of_the_forward_pass(bench, count):
    model = bench.model()
    calls = count(model)
    _, trace = bench.dng(model, concept(bench), bench.latent(1), steps=20)
    assert calls.batches == calls.forwards == [2 if look else 1 for look in trace.looked[:, 0].tolist()]


def test_only_the_images_that_are_awake_are_evaluated(bench, count):
    """Where all are, the sampler's own forward pass takes them; where some are, they have one of their own."""
    model = bench.model()
    calls = count(model)
    _, trace = bench.dng(model, concept(bench), bench.latent(4), steps=20)
    assert sum(calls.forwards) == 4 * 20 + trace.made and trace.made + trace.spared == 4 * 20
    assert trace.made < 4 * int(trace.looked.sum())
    assert set(calls.forwards) <= {1, 2, 3, 4, 8} and set(calls.forwards) & {1, 2, 3}


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_an_image_is_drawn_in_a_batch_as_it_is_alone(bench, sampler):
    """But for what its own sleep changes: a batch that is awake moves its posterior from call to call."""
    options = {"steps": 20, "sampler_name": sampler}
    together, trace = bench.dng(bench.model(), concept(bench), bench.latent(8, batch_index=range(8)), **options)
    made = 0
    for i in range(8):
        alone, own = bench.dng(bench.model(), concept(bench), bench.latent(1, batch_index=[i]), **options)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=0.02)
        made += own.made
    assert abs(trace.made - made) <= 0.1 * made


def through(bench: Any, model: Any) -> Any:
    """The model behind a function that calls it as it is."""
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    return model


def wrapped(bench: Any, model: Any) -> Any:
    """The model in a wrapper as EasyCache has one."""
    kinds = importlib.import_module("comfy.patcher_extension").WrappersMP
    model.add_wrapper_with_key(
        kinds.DIFFUSION_MODEL, "another's", lambda executor, *args, **kwargs: executor(*args, **kwargs)
    )
    return model


def injected(bench: Any, model: Any) -> Any:
    """The model with modules put in for the run, as AnimateDiff's, to which a batch is the frames of a video."""
    injection = importlib.import_module("comfy.model_patcher").PatcherInjection
    model.set_injections("another's", [injection(inject=lambda patcher: None, eject=lambda patcher: None)])
    return model


def patched(bench: Any, model: Any) -> Any:
    model.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
    return model


@pytest.mark.parametrize("change", [through, wrapped, injected, patched])
def test_beside_what_may_know_each_image_the_whole_batch_is_evaluated(bench, count, change):
    model = change(bench, bench.model().clone())
    calls = count(model)
    _, trace = bench.dng(model, concept(bench), bench.latent(4), steps=20)
    assert set(calls.forwards) == {4, 8} and trace.spared > 0
    assert trace.made == 4 * int(trace.looked.sum())


def test_with_a_mask_for_each_image_the_whole_batch_is_evaluated(bench, count):
    masks = torch.ones(4, 4, 4)
    model = bench.model()
    calls = count(model)
    bench.dng(model, concept(bench, bench.cond("0", mask=masks)), bench.latent(4), steps=20)
    assert set(calls.forwards) == {4, 8}
    calls.forwards.clear()
    bench.dng(model, concept(bench, bench.cond("0", mask=masks[:1])), bench.latent(4), steps=20)
    assert set(calls.forwards) & {1, 2, 3}


@pytest.mark.parametrize(
    ("entry", "one"),
    [
        ({}, True),
        ({"control": None, "mask": torch.ones(8, 8)}, True),
        ({"control": object()}, False),
        ({"hooks": object()}, False),
        ({"gligen": ("position", None, [])}, False),
        ({"mask": torch.ones(1, 8, 8)}, True),
        ({"mask": torch.ones(2, 8, 8)}, False),
        ({"model_conds": {"c_crossattn": "CONDCrossAttn(1, 77, 8)", "y": "CONDRegular(1, 4)"}}, True),
        ({"model_conds": {"c_crossattn": "CONDCrossAttn(2, 77, 8)"}}, False),
        ({"model_conds": {"c_concat": "CONDNoiseShape(2, 4, 8, 8)"}}, False),
        ({"model_conds": {"num_video_frames": "CONDConstant(14)"}}, False),
        ({"model_conds": {"ref_latents": "CONDList(1, 4, 8, 8)"}}, True),
        ({"model_conds": {"ref_latents": "CONDList(2, 4, 8, 8)"}}, False),
    ],
    ids=str,
)
def test_a_batch_is_divided_where_a_conditioning_says_the_same_of_every_image(bench, entry, one):
    part = importlib.import_module(bench.begin.__name__.replace(".begin", ".part"))
    conds = importlib.import_module("comfy.conds")
    made = {}
    for name, described in entry.get("model_conds", {}).items():
        kind, sizes = described.rstrip(")").split("(")
        shape = [int(size) for size in sizes.split(",")]
        value = torch.zeros(shape) if kind != "CONDConstant" else shape[0]
        made[name] = getattr(conds, kind)([value] if kind == "CONDList" else value)
    args = {"model": None, "input": torch.zeros(2, 4, 8, 8), "sigma": torch.ones(2), "model_options": {}}
    assert part.divisible(args, [entry | {"model_conds": made}]) is one
    assert not part.divisible(args | {"sigma": torch.ones(1)}, [])
    assert not part.divisible(args | {"model_options": {"context_handler": object()}}, [])


def test_each_of_several_concepts_sleeps_on_its_own(bench, count):
    """More concepts take the economy of the node, as they take its reference."""
    model, latent = bench.model(), bench.latent(1)
    more = bench.concepts.DNGConcept.execute(bench.cond("1"), **bench.inputs(prior=0.002)).args[0]
    calls = count(model)
    _, trace = bench.sampling.KSamplerDNG.execute(
        model, 1, 20, 1.0, "euler_ancestral", "karras", bench.cond(), bench.cond("0"), latent, 1.0,
        more_concepts=more, **bench.inputs(economy="auto"),
    ).args  # fmt: skip
    assert calls.batches == (1 + trace.looked.sum(dim=1)).tolist()
    assert not torch.equal(trace.looked[:, 0], trace.looked[:, 1])


def test_chained_patches_sleep_as_the_concepts_of_one_node_do(bench, count):
    model, options = bench.model(), {"latent": bench.latent(1), "steps": 20}
    concepts = [concept(bench, "0"), concept(bench, "1", prior=0.002)]
    calls = count(model)
    samples, trace = bench.dng(model, concepts, **options)
    together = list(calls.batches)
    calls.batches.clear()
    chained = bench.patching.patch_model(bench.patching.patch_model(model, concepts[:1]), concepts[1:])
    assert torch.equal(bench.sample(chained, **options), samples)
    assert calls.batches == together and min(trace.looked.sum(dim=0)) < 20


def test_a_split_run_begins_with_a_look_and_counts_both_parts(bench, count):
    model, inputs = bench.model(), bench.inputs(economy="auto")
    calls, latent, trace = count(model), bench.latent(1), None
    for start, end in ((0, 12), (12, 24)):
        latent, trace = bench.sampling.KSamplerAdvancedDNG.execute(
            model, "disable" if start else "enable", 1, 24, 1.0, "euler_ancestral", "karras", bench.cond(),
            bench.cond("0"), latent, start, end, "enable" if end < 24 else "disable", previous_trace=trace, **inputs,
        ).args  # fmt: skip
    assert trace.made == asked(calls) and trace.made + trace.spared == 24 == len(trace.looked)
    assert bool(trace.looked[0]) and bool(trace.looked[12])


def test_where_other_entries_apply_than_at_the_last_look_the_concept_is_looked_at_again(bench):
    """One component in the first half of the run, another after that: the second is looked at where it begins."""
    both = bench.cond("0", end_percent=0.5) + bench.cond("1", start_percent=0.5)
    model = bench.model()
    options = {"latent": bench.latent(1), "steps": 24, "scheduler": "simple"}
    _, trace = bench.dng(model, concept(bench, both, prior=1e-5), **options)
    half = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
    first = int((trace.sigmas <= half).nonzero()[0])
    _, alone = bench.dng(model, concept(bench, "0", prior=1e-5), **options)
    assert bool(trace.looked[first])
    assert not bool(alone.looked[first]) or not bool(alone.looked[first - 1])


@pytest.mark.parametrize("interrupted_batch", [1, 3])
@pytest.mark.parametrize("patched", [False, True], ids=["guider", "patch"])
def test_an_interruption_while_asleep_leaves_nothing_behind(bench, monkeypatch, patched, interrupted_batch):
    """The next run of the same guider or patch, with a larger or a smaller batch, is the run of a new one."""
    model = bench.model()
    options = {"steps": 24, "sampler_name": "euler_ancestral"}
    expected, trace = bench.dng(model, concept(bench), bench.latent(2), **options)
    hooks = importlib.import_module(bench.begin.__name__.replace(".begin", ".hooks"))
    post_cfg, interrupted = hooks.Run.post_cfg, bench.comfy.model_management.InterruptProcessingException

    def stop(self: Any, args: dict) -> Tensor:
        out = post_cfg(self, args)
        if self.guidance.trace().spared >= 2:
            raise interrupted
        return out

    if patched:
        again = bench.patching.patch_model(model, [concept(bench)])

        def run(batch: int) -> Tensor:
            return bench.sample(again, bench.latent(batch), **options)
    else:
        guider = bench.sampling.NegativeGuider(model, bench.cond(), [concept(bench)], None, 1.0)
        schedule = bench.sampling.Schedule(1, 24, "euler_ancestral", "karras")

        def run(batch: int) -> Tensor:
            return bench.sampling.run_guider(guider, model, schedule, bench.latent(batch))[0]["samples"]

    with monkeypatch.context() as patch:
        patch.setattr(hooks.Run, "post_cfg", stop)
        with pytest.raises(interrupted):
            run(interrupted_batch)
    assert patched or guider.trace is None
    assert torch.equal(run(2), expected)
    assert patched or torch.equal(guider.trace.looked, trace.looked)
    assert not model.model_options.get("sampler_post_cfg_function")


@pytest.mark.parametrize("patched", [False, True], ids=["guider", "patch"])
def test_batches_may_grow_and_shrink_between_runs(bench, patched):
    """The same guider or patch, run after run: each is the run of a new one."""
    model, options = bench.model(), {"steps": 12, "sampler_name": "euler_ancestral"}
    again = bench.patching.patch_model(model, [concept(bench)])
    guider = bench.sampling.NegativeGuider(model, bench.cond(), [concept(bench)], None, 1.0)
    schedule = bench.sampling.Schedule(1, 12, "euler_ancestral", "karras")
    for batch in (1, 4, 2):
        expected, _ = bench.dng(model, concept(bench), bench.latent(batch), **options)
        if patched:
            out = bench.sample(again, bench.latent(batch), **options)
        else:
            out = bench.sampling.run_guider(guider, model, schedule, bench.latent(batch))[0]["samples"]
        assert torch.equal(out, expected)


def test_an_unknown_economy_is_refused(bench):
    with pytest.raises(ValueError, match="economy must be one of off, auto; it is 'always'"):
        bench.node_inputs.concepts_from(bench.cond("0"), bench.inputs(economy="always"))


def test_the_table_says_what_was_evaluated_and_what_was_spared(bench):
    _, trace = bench.dng(bench.model(), concept(bench), bench.latent(1), steps=20)
    table = bench.traces.TraceTable.execute(trace).args[0]
    assert table.endswith(f"{trace.made} evaluated, {trace.spared} spared.")
    assert table.count("| no |") == trace.spared


def test_a_baseline_never_sleeps(bench, count):
    model = bench.model()
    calls = count(model)
    bench.dng(model, concept(bench, method="negative_prompting", guidance_scale=1.0), bench.latent(1), steps=12)
    assert calls.batches == [2] * 12
