"""The oracle's nodes: which mixture a condition names, and what the report says of samples whose truth is known."""

import json

import pytest
import torch


@pytest.mark.parametrize(
    ("text", "of", "components"),
    [
        ("all", 4, [0, 1, 2, 3]),
        ("0,3", 8, [0, 3]),
        ("A1", 16, [4, 5, 6, 7]),
        ("B0", 16, [0, 4, 8, 12]),
        ("A1 B2", 16, [6]),
        ("A1B2", 16, [6]),
    ],
)
def test_a_condition_names_numbers_or_attributes(bench, text, of, components):
    assert bench.oracle.chosen_components(text, of) == components


@pytest.mark.parametrize(("text", "of"), [("", 8), ("8", 8), ("A0", 8), ("A4", 16), ("C0", 16), ("0;1", 8)])
def test_a_condition_that_names_nothing_says_what_it_takes(bench, text, of):
    with pytest.raises(ValueError, match="`components` must"):
        bench.oracle.chosen_components(text, of)


def test_a_kind_that_the_number_of_components_does_not_fit_is_refused(bench):
    for kind, components in (("attributes", 8), ("topics", 9)):
        with pytest.raises(ValueError, match="components"):
            bench.oracle.load_oracle(components, "epsilon", kind)


def test_correlated_attributes_have_a_rare_first_value_that_makes_the_undesired_likely(bench):
    weights = bench.oracle.mixture(16, "correlated attributes").weights.reshape(4, 4)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float(weights[0].sum()) == pytest.approx(0.1)
    assert float(weights[0, 0] / weights[0].sum()) == pytest.approx(1 / 3)
    assert float(weights[1, 0] / weights[1].sum()) == pytest.approx(0.02)


@pytest.mark.parametrize("kind", ["components", "attributes", "correlated attributes", "topics"])
def test_the_unguided_model_draws_every_kind_by_its_weights(bench, kind):
    """The components' shares are the mixture's weights, within what 30 steps and 2,000 samples allow."""
    samples = bench.sample(bench.oracle.load_oracle(16, "epsilon", kind), bench.latent(2000), steps=30, **whole(bench))
    truth = bench.oracle.mixture(16, kind)
    shares = torch.bincount(truth.classify(samples), minlength=16) / 2000
    torch.testing.assert_close(shares, truth.weights, atol=0.04, rtol=0)
    assert float(truth.distance(samples).median()) < 1  # 0.8 in the limit of many steps


def whole(bench):
    return {"positive": bench.oracle.oracle_condition("all", 16), "negative": bench.oracle.oracle_condition("all", 16)}


def report(bench, samples, forbidden, components, **options):
    (text,) = bench.oracle.OracleReport.execute({"samples": samples}, forbidden, components, **options).args
    return json.loads(text)


def test_the_balance_is_that_of_what_is_wanted_and_not_forbidden(bench):
    means = bench.oracle.mixture(16, "attributes").means
    drawn = means[[0, 1, 1, 2, 2, 3, 3, *range(5, 8), *range(9, 12), *range(13, 16)]]
    figures = report(bench, drawn, "B0", 16, kind="attributes", wanted="A0")
    assert figures["forbidden_share"] == 1 / 16
    assert figures["kl_renormalised"] == pytest.approx(0.0)
    assert figures["median_distance"] == 0
    assert report(bench, drawn, "B0", 16, kind="attributes")["kl_renormalised"] > 0.01


def test_samples_are_compared_with_their_baseline_bit_by_bit(bench):
    drawn = bench.oracle.mixture(8).means.clone()
    assert (
        report(bench, drawn, "0", 8, baseline={"samples": drawn}).items()
        >= {"identical": True, "rms_change": 0.0}.items()
    )
    moved = report(bench, drawn, "0", 8, baseline={"samples": drawn + 0.5})
    assert not moved["identical"] and moved["rms_change"] == pytest.approx(0.5)


def test_what_is_forbidden_is_counted_image_by_image_against_the_baseline(bench):
    means = bench.oracle.mixture(8).means
    figures = report(bench, means[[0, 0, 2, 3]], "0,1", 8, baseline={"samples": means[[2, 1, 1, 3]]})
    assert (figures["forbidden_gained"], figures["forbidden_lost"]) == (1, 1)


def test_what_is_not_finite_has_no_figures(bench):
    drawn = bench.oracle.mixture(8).means.clone()
    drawn[0, 0, 0, 0] = torch.nan
    figures = report(bench, drawn, "0", 8, baseline={"samples": drawn})
    assert not figures["finite"]
    assert [figures[k] for k in ("forbidden_share", "kl_renormalised", "median_distance", "rms_change")] == [None] * 4


def test_a_trace_is_held_against_the_exact_posterior_of_the_finished_samples(bench):
    drawn = bench.oracle.mixture(8).means
    posterior = torch.zeros(2, 1, 8)
    posterior[1, 0, :2] = torch.tensor([0.75, 0.25])
    trace = bench.guidance.Trace(torch.tensor([1.0, 0.1]), posterior, 2 * posterior)
    figures = report(bench, drawn, "0", 8, trace=trace)
    assert figures["posterior_error"] == pytest.approx([0.5 / 8])
    assert figures["mean_scale"] == [pytest.approx([0.0, 0.25])]
    with pytest.raises(ValueError, match="concepts"):
        report(bench, drawn, "0", 8, trace=bench.guidance.Trace(trace.sigmas, posterior.repeat(1, 2, 1), posterior))


def test_what_is_not_finite_leaves_the_figures_json(bench):
    """A baseline or a trace beside it has figures that are None, and never NaN, which JSON does not know."""
    drawn = bench.oracle.mixture(8).means.clone()
    broken = torch.full_like(drawn, torch.nan)
    assert report(bench, drawn, "0", 8, baseline={"samples": broken})["rms_change"] is None
    posterior = torch.zeros(2, 1, 8)
    trace = bench.guidance.Trace(torch.tensor([1.0, 0.1]), posterior, posterior)
    assert report(bench, broken, "0", 8, trace=trace)["posterior_error"] is None


@pytest.mark.parametrize("wrong", ["positive", "negative", "unconditional"])
@pytest.mark.parametrize(("of", "components"), [(16, "0,15"), (16, "0"), (4, "0")])
def test_a_condition_of_another_mixture_is_refused_by_its_name(bench, wrong, of, components):
    given = {name: bench.cond() for name in ("positive", "negative", "unconditional")}
    given[wrong] = bench.oracle.oracle_condition(components, of)
    concept = bench.concept(given.pop("negative"))
    with pytest.raises(ValueError, match=rf"`{wrong}`.* is of a mixture of {of} components, the oracle model has 8"):
        bench.dng(bench.model(), concept, cfg=2.0, **given)


@pytest.mark.parametrize("area", [(1, 2, 0, 0), ("percentage", 0.5, 1.0, 0.25, 0.0), (8, 8, 1, 0), (4, 4, 0, 4)])
def test_a_condition_of_a_part_of_a_sample_is_refused_by_its_name_in_stock_samplers_too(bench, area):
    positive, negative = bench.cond(area=area), bench.cond("0", area=area)
    with pytest.raises(ValueError, match=r"`positive` is used in an area of .* alone.* remove the area"):
        bench.sample(bench.model(), positive=positive)
    with pytest.raises(ValueError, match=r"`negative`.* is used in an area of .* alone.* remove the area"):
        bench.sample(bench.model(), negative=negative, cfg=2.0, positive=bench.cond(mask=torch.ones(1, 4, 4)))


def test_an_area_that_holds_a_whole_sample_is_none(bench):
    whole = bench.sample(bench.model(), positive=bench.cond("0", area=(8, 8, 0, 0)))
    assert torch.equal(whole, bench.sample(bench.model(), positive=bench.cond("0")))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 4, 4), (2, 1, 1, 4), (2, 1, 4, 4, 4)])
def test_a_latent_of_another_size_than_the_oracles_is_refused(bench, shape):
    latent = {"samples": torch.full(shape, 0.5)}
    with pytest.raises(ValueError, match=r"`latent_image` is .*1x4x4 .*Empty Oracle Latent"):
        bench.dng(bench.model(), latent=latent)
    with pytest.raises(ValueError, match=r"`latent_image` is .*1x4x4 .*Empty Oracle Latent"):
        bench.sample(bench.model(), latent)


@pytest.mark.parametrize(
    ("samples", "others", "message"),
    [
        ((8, 1, 1, 1), {}, "`samples` is 8x1x1x1"),
        ((8, 16), {}, "`samples` is 8x16"),
        ((0, 1, 4, 4), {}, "`samples` holds none"),
        ((8, 1, 4, 4), {"baseline": {"samples": torch.zeros(1, 1, 4, 4)}}, "`baseline` is 1x1x4x4"),
        ((8, 1, 4, 4), {"baseline": {"samples": torch.zeros(8, 1, 4, 1)}}, "`baseline` is 8x1x4x1"),
    ],
)
def test_the_report_refuses_what_does_not_belong_together(bench, samples, others, message):
    with pytest.raises(ValueError, match=message):
        report(bench, torch.zeros(samples), "0", 8, **others)


def test_the_report_refuses_the_trace_of_another_batch(bench):
    posterior = torch.zeros(2, 1, 1)
    trace = bench.guidance.Trace(torch.tensor([1.0, 0.1]), posterior, posterior)
    with pytest.raises(ValueError, match="`trace` is that of 1 samples, but `samples` holds 8"):
        report(bench, bench.oracle.mixture(8).means, "0", 8, trace=trace)
