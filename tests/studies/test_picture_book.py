"""The picture book's parts of a study: exact shares, samplers, cases, methods and measures, on random weights."""

import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dng_core.baselines import ConceptRemoval, ConceptRemovalRun, perp_neg
from dng_core.calibration import EXACT
from dng_core.models.picture_book.judge import Verdict
from dng_core.models.picture_book.prompting import contexts, denoised
from dng_core.models.picture_book.scenes import PLACES, THINGS, TIMES, caption, random_scene
from dng_core.models.picture_book.shares import shares_given
from dng_core.models.picture_book.weights import load_picture_book
from dng_core.models.picture_book.words import split
from dng_core.oracle import GaussianMixture
from dng_core.sampling import ddpm_sample
from dng_core.schedules import DDPMSchedule, karras_sigmas
from dng_core.shares import Share
from dng_core.studies.metrics import wilson_interval
from dng_core.studies.picture_book import methods
from dng_core.studies.picture_book.averages import averaged
from dng_core.studies.picture_book.cases import CASES, LABELS, Case
from dng_core.studies.picture_book.figure import label_rows, picture_book_figure
from dng_core.studies.picture_book.measures import Seen, measure
from dng_core.studies.picture_book.methods import METHODS, calibrated, guided
from dng_core.studies.samplers import SAMPLERS, sample

pytestmark = pytest.mark.usefixtures("quick_distances")


def test_exact_shares_are_those_of_scenes_with_such_captions():
    """Over 3,000 captions, each thing that is not named is there as often as expected, within five errors."""
    expected, variance, there = Counter(), Counter(), Counter()
    for i in range(3000):
        generator = np.random.default_rng((3, i))
        scene = random_scene(generator)
        said = split(caption(scene, generator))
        for name, p in shares_given(said).items():
            if name not in said:
                expected[name] += p
                variance[name] += p * (1 - p)
                there[name] += name in (*scene.names, scene.place, scene.time)
    assert set(expected) == {*PLACES, *TIMES, *THINGS}
    for name, mean in expected.items():
        assert abs(there[name] - mean) <= 5 * math.sqrt(variance[name]), name


def test_what_is_said_is_certain_and_what_cannot_be_is_refused():
    shares = shares_given(["park", "by", "day", "tree"])
    assert shares["park"] == shares["day"] == shares["tree"] == 1
    assert shares["moon"] == shares["whale"] == shares["sea"] == 0
    with pytest.raises(ValueError, match="no scene has a caption with the words boat, desert"):
        shares_given(["boat", "desert"])


def test_euler_ancestral_is_the_ancestral_chain():
    mixture, sigmas = GaussianMixture.random(3, (4,)), karras_sigmas(8, 0.1, 20.0)
    noise = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    found = sample(mixture.denoised, noise, sigmas, "euler_ancestral", ours)
    wanted = ddpm_sample(lambda x, sigma: (mixture.denoised(x, sigma), []), noise, sigmas, generator=theirs)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_reach_the_mixture_and_second_order_is_nearer(sampler):
    """Shares of the components; deterministic samplers approach the run with many steps."""
    mixture = GaussianMixture.random(3, (8,))
    noise = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))

    def run(steps):
        return sample(
            mixture.denoised, noise, karras_sigmas(steps, 0.02, 40.0), sampler, torch.Generator().manual_seed(1)
        )

    drawn = run(40)
    shares = torch.bincount(mixture.classify(drawn), minlength=3) / len(drawn)
    torch.testing.assert_close(shares.double(), mixture.weights.double(), atol=0.05, rtol=0)
    assert mixture.distance(drawn).median() < 4
    if sampler == "dpmpp_2m":
        euler = sample(
            mixture.denoised, noise, karras_sigmas(40, 0.02, 40.0), "euler", torch.Generator().manual_seed(1)
        )
        fine = run(400)
        assert (drawn - fine).square().mean() < 0.5 * (euler - fine).square().mean()


def test_rows_count_what_was_asked_and_the_rest():
    things = torch.zeros(2, len(THINGS), dtype=torch.bool)
    things[0, THINGS.index("tree")] = True
    verdict = Verdict(torch.tensor([PLACES.index("park"), PLACES.index("sea")]), torch.tensor([0, 2]), things)
    rows = {row["of"]: row for row in label_rows(["a park by day with a tree", "a park with a tree"], verdict)}
    assert list(rows) == ["place", "time", "things", *THINGS]
    assert (rows["place"]["asked"], rows["place"]["shown, %"]) == (2, 50)
    assert (rows["time"]["asked"], rows["time"]["shown, %"]) == (1, 100)
    assert (rows["tree"]["asked"], rows["tree"]["shown, %"], rows["tree"]["not asked"]) == (2, 50, 0)
    flower = rows["flower"]
    assert flower["asked"] == 0 and flower["shown, %"] is None and flower["drawn, %"] == 0
    each = [shares_given(split(said))["flower"] for said in ("a park by day with a tree", "a park with a tree")]
    assert flower["expected, %"] == pytest.approx(50 * sum(each))


def test_the_figure_draws_and_judges(weights, tmp_path):
    rows = list(picture_book_figure(weights, tmp_path / "sheet.png", images=3, steps=2, seed=0))
    assert {row["cfg"] for row in rows} == {1.0, 3.0} and len(rows) == 2 * (3 + len(THINGS))
    assert all(0 <= row["expected, %"] <= 100 for row in rows if row["expected, %"] is not None)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_of_their_kind(case):
    """Related things are likely though not named, unrelated ones impossible, absurd ones asked for."""
    expected = case.expected()
    shares = [expected[name] for name in case.avoid]
    if case.kind == "related":
        assert min(shares) > 0.12 and not set(case.avoid) & set(split(case.prompt))
    elif case.kind == "unrelated":
        assert max(shares) == 0
    else:
        assert min(shares) == 1


def test_there_are_as_many_cases_as_the_study_promises():
    counted = Counter(case.kind for case in CASES)
    assert counted["related"] >= 12 and counted["unrelated"] == 12 and counted["absurd"] == 6
    assert any(len(case.avoid) == 2 for case in CASES)
    assert CASES[0].asked == ("park", "day")
    assert Case("absurd", "a park with a tree", ("tree",)).asked == ("park",)


@pytest.fixture(scope="module")
def book(weights):
    return load_picture_book(weights)[0]


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_each_method_combines_the_predictions_as_it_says(book, cfg):
    """At the first step, from the predictions D_p, D_u and D_n written out; DNG begins at its prior.

    In float64, since in float32 a network's prediction depends on the size of the batch by rounding.
    """
    chain, case = DDPMSchedule.named("linear"), Case("related", "a park by day", ("flower",))
    book = deepcopy(book).double()
    x, sigma = 3 * torch.randn(2, 48, 16, 16, generator=torch.Generator().manual_seed(0)).double(), 3.0
    texts = contexts(book, ["a park by day", "", "flower", "a park by day, flower"]).split(1)
    p, u, n, joint = denoised(book, chain, x, sigma, texts)
    assert min(float((a - b).abs().max()) for a, b in ((p, u), (n, u), (joint, p))) > 1e-3
    base = p if cfg == 1 else u + cfg * (p - u)
    reference = p if cfg == 1 else u
    far = 0.2 * ((n - reference) / sigma).flatten(1).square().sum(dim=1).reshape(-1, 1, 1, 1)
    faded = 2 * torch.exp(-far) / (1 + torch.exp(-far))
    wanted = {
        "nothing": (base, 1),
        "negative_prompt": (p if cfg == 1 else n + cfg * (p - n), 1),
        "constant_push": (base - 2 * (n - reference), 2),
        "contrastive_cfg": (base - 2 * faded * (n - reference), 2),
        "perp_neg": (perp_neg(p, n, u, cfg, 2.0), 3 - (cfg != 1)),
        "concept_removal": (base - ConceptRemovalRun(ConceptRemoval(2.0)).push(p, n, u, sigma), 3 - (cfg != 1)),
        "dng": (base - 2 * 0.25 * (n - reference), 2),
        "dng_joint": (base - 2 * 0.25 * (joint - p), 2),
        "dng_evidence": (base - 2 * 0.25 * (joint - p), 2),  # below its level
    }
    for name, (prediction, evaluations) in wanted.items():
        run = guided(book, chain, case, METHODS[name].at(2.0), cfg, [3.0, 1.0])
        torch.testing.assert_close(run(x, sigma), prediction, atol=1e-5, rtol=1e-5)
        assert run.evaluations == evaluations + (cfg != 1)
    assert METHODS["dng"].settings.prior == 0.2
    stock = guided(book, chain, case, METHODS["nag"].at(0.0), cfg, [3.0, 1.0])
    torch.testing.assert_close(stock(x, sigma), n + cfg * (p - n), atol=1e-5, rtol=1e-5)
    assert stock.evaluations == 2


def test_several_things_are_several_concepts(book):
    case = Case("related", "a park by day", ("tree", "flower"))
    run = guided(book, DDPMSchedule.named("linear"), case, METHODS["dng"], 3.0, [3.0, 1.0])
    run(torch.zeros(2, 48, 16, 16), 3.0)
    assert run.trace().posterior.shape == (1, 2, 2)
    assert len(guided(book, run.chain, case, METHODS["perp_neg"], 3.0, [3.0, 1.0]).things) == 1


def test_calibration_takes_the_share_that_an_unguided_run_shows(book, monkeypatch):
    case, method = Case("related", "a park by day", ("flower",)), METHODS["dng_calibrated"].at(2.0)
    chain = DDPMSchedule.named("linear")
    drawn, model = (
        (book, chain, case, method, 3.0, 3, 2, 0),
        replace(EXACT, temperature=0.5, drift=((8.0, 0.0), (1.0, 2.0))),
    )
    for share, told_apart, prior in ((0.0, 0.1, 0.001), (0.3, 0.1, 0.3), (1.0, 0.1, 0.99), (0.5, 0.9, 0.2)):
        monkeypatch.setattr(methods, "share_of", lambda *_, mean=share, open=told_apart: Share(mean, 0, 1, 2, open))
        found = calibrated(*drawn, model)
        assert found == replace(method, settings=model.applied(method.settings.with_(prior=prior)))
        assert (found.settings.temperature, found.settings.guidance_scale) == (0.5, 2.0)


def seen(pictures, things):
    """Pictures of a park by day that show these things, one list each; features by which they differ."""
    labels = torch.zeros(len(pictures), len(LABELS), dtype=torch.bool)
    for i, names in enumerate(things):
        for name in ("park", "day", *names):
            labels[i, LABELS.index(name)] = True
    return Seen(pictures, labels, labels[:, :8].double() + torch.arange(len(labels))[:, None])


def test_measures_count_what_is_left_and_what_else_changed():
    case = Case("related", "a park with a tree", ("flower",))
    before, after = torch.zeros(4, 3, 64, 64), torch.zeros(4, 3, 64, 64)
    after[2:] = 0.2
    without = seen(before, [["tree", "flower"], ["flower"], ["tree"], []])
    other = seen(before, [["tree"], ["tree"], ["flower"], ["cat"]])
    found = measure(case, seen(after, [["tree"], ["tree", "flower"], ["tree"], ["cat"]]), without, other)
    assert (found["left"], found["was"]) == (0.25, 0.5) and found["left_low"] < 0.25 < found["left_high"]
    assert (found["kept"], found["kept_was"]) == (7 / 8, 6 / 8)
    assert found["rms"] == pytest.approx(0.1)  # of the last two, which never showed a flower; pixels 0 to 1
    assert found["relabelled"] == pytest.approx(1 / (2 * len(LABELS)))
    assert found["balance"] == pytest.approx((abs(3 / 4 - 2 / 3) + abs(1 / 4 - 1 / 3)) / (len(LABELS) - 1))
    assert found["distance"] > 0


def test_what_cannot_be_measured_is_none():
    case = Case("related", "a park", ("flower",))
    all_show = seen(torch.zeros(2, 3, 64, 64), [["flower"], ["flower"]])
    found = measure(case, all_show, all_show, all_show)
    assert (
        found["left"] == 1 and (found["rms"], found["relabelled"], found["balance"], found["distance"]) == (None,) * 4
    )


def test_means_over_cases_have_intervals():
    row = {"images": 10, "left": 0.2, "kept": 1.0, "balance": None, "late_scale": None, "evaluations": 3, "seconds": 1}
    for name in ("rms", "relabelled", "distance"):
        row |= {name: 1.0, f"{name}_low": 0.5, f"{name}_high": 1.5}
    other = row | {"left": 0.4, "rms": 3.0, "rms_low": 1.0, "rms_high": 3.0, "distance": None, "distance_low": None}
    means = averaged([row, other])
    assert means["left"] == pytest.approx(0.3)
    assert (means["left_low"], means["left_high"]) == wilson_interval(6, 20)
    half = math.sqrt(0.5**2 + 1.0**2) / 2
    assert (means["rms"], means["rms_low"], means["rms_high"]) == pytest.approx((2, 1.5 - half, 1.5 + half))
    assert (means["distance"], means["distance_low"]) == (1.0, 0.5) and means["balance"] is None


def test_every_method_has_a_look_of_its_own():
    pytest.importorskip("matplotlib")
    from dng_core.studies.picture_book.plots import LOOKS

    assert LOOKS.keys() == METHODS.keys() and len(set(LOOKS.values())) == len(LOOKS)
