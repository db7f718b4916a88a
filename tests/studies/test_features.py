"""Feature distances against exact answers, and the balance and intervals against simulation."""

import math
import sys
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch

from dng_core.studies.features import Gaussian, frechet_distance, inception_fid, inside_manifold, require_inception
from dng_core.studies.metrics import balance_kl_renormalised, balance_kl_unbiased, bootstrap_interval


def test_the_frechet_distance_of_two_known_gaussians_is_the_closed_form():
    """For diagonal covariances it is |m|^2 + sum (s_a - s_b)^2; a rotation changes nothing."""
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    mean = torch.tensor([0.5, -1.0, 2.0]).double()
    exact = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    zero = torch.zeros(3).double()
    plain = frechet_distance(Gaussian(mean, a.diag()), Gaussian(zero, b.diag()))
    turned = [Gaussian(rotation @ m, rotation @ c.diag() @ rotation.T) for m, c in ((mean, a), (zero, b))]
    assert plain == pytest.approx(exact, rel=1e-12)
    assert frechet_distance(*turned) == pytest.approx(exact, rel=1e-10)


def test_the_frechet_distance_agrees_with_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (torch.randn(40, 6, generator=torch.Generator().manual_seed(i)) * (i + 1) + i for i in range(2))
    ours, theirs = Gaussian.of(a), Gaussian.of(b)
    x, y = a.double().numpy(), b.double().numpy()
    covariances = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(ours, theirs) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_tell_missing_modes_from_stray_points():
    """Drawn points cover one of two real clusters, and half of them are far off: precision and recall are 1/2 each."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 2, generator=generator) * 0.1
    real[100:] += 5
    drawn = real[:100] + 0.001
    stray = torch.randn(100, 2, generator=generator) + 50
    points = torch.cat([drawn, stray])
    assert float(inside_manifold(points, real).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(inside_manifold(real, points).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_too_few_images_for_distances_are_refused():
    with pytest.raises(ValueError, match="more than 3 images"):
        inside_manifold(torch.zeros(5, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at least 2 images"):
        Gaussian.of(torch.zeros(1, 2))


def test_the_unbiased_kl_is_unbiased_and_the_plug_in_is_not():
    """Multinomial draws of 150 images from a known distribution over ten classes, the first of them forbidden."""
    q = np.array([0.1, 0.04, 0.16, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    rest = q[1:] / q[1:].sum()
    exact = float((np.log(1 / 9) - np.log(rest)).mean())
    draws = np.random.default_rng(0).multinomial(150, q, size=2000).tolist()
    unbiased = np.mean([balance_kl_unbiased(d, 0) for d in draws])
    plug_in = np.mean([balance_kl_renormalised(d, 0) for d in draws])
    assert unbiased == pytest.approx(exact, abs=0.004)
    assert plug_in > exact + 0.02


def test_kl_of_nothing_left_is_nan():
    assert math.isnan(balance_kl_unbiased([5, 0, 0], 0))


def test_the_bootstrap_interval_of_a_mean_covers_it_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        values = generator.normal(size=60)
        low, high = bootstrap_interval(lambda i, v=values: float(v[i].mean()), 60, seed=seed)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_fid_is_asked_of_torch_fidelity(tmp_path, monkeypatch):
    images = np.zeros((2, 1, 4, 4), np.uint8)
    asked = {}

    def calculate(**options: object) -> dict[str, float]:
        asked.update(options)
        return {"frechet_inception_distance": 12.5}

    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(calculate_metrics=calculate))
    assert inception_fid(images, images, "real", tmp_path, cuda=False) == 12.5
    assert asked["fid"] and asked["input2_cache_name"] == "real"
    assert asked["input1"][0].shape == (3, 4, 4) and asked["input1"][0].dtype == torch.uint8


@pytest.mark.parametrize("found", ["weights", "no connection", "no torch-fidelity"])
def test_what_fid_needs_is_asked_for_before_anything_is_drawn(monkeypatch, found):
    """torch-fidelity itself needs Inception's weights from the network: a stand-in for it."""

    def create(name: str, features: list[str], **options: object) -> None:
        assert (name, features) == ("inception-v3-compat", ["2048"])
        if found == "no connection":
            raise URLError("Name or service not known")

    utils = SimpleNamespace(create_feature_extractor=create) if found != "no torch-fidelity" else None
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", utils)
    if found == "weights":
        require_inception()
        return
    remedy = "could not fetch .*internet, or leave out --fid" if found == "no connection" else "pip install"
    with pytest.raises(ValueError, match=remedy):
        require_inception()


def test_the_frechet_distance_is_torch_fidelitys_formula():
    """FID as torch-fidelity computes it, from features that we give it, is our Fréchet distance."""
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = (torch.randn(60, 8, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(2))
    statistics = [fidelity.fid_features_to_statistics(x) for x in (a, b)]
    theirs = fidelity.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(Gaussian.of(a), Gaussian.of(b)) == pytest.approx(theirs, rel=1e-6)
