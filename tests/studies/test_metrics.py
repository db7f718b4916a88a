"""The measures of class removal against values worked out by hand."""

import math

import pytest
import torch

from dng_core.studies.metrics import (
    balance_kl,
    balance_kl_renormalised,
    change_from_baseline,
    class_histogram,
    forbidden_share,
    wilson_interval,
)


def test_histogram_counts_every_class_also_the_empty_ones():
    assert class_histogram(torch.tensor([2, 0, 2, 2]), 4) == (1, 0, 3, 0)


def test_forbidden_share_is_a_share_of_all_images():
    assert forbidden_share((10, 20, 70), 0) == 0.1


def test_kl_by_hand():
    # Three classes, 0 forbidden, counts 20, 20, 60 of 100: uniform over the others is 1/2, 1/2.
    paper = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.6)
    renormalised = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert balance_kl((20, 20, 60), 0) == pytest.approx(paper, rel=1e-12)
    assert balance_kl_renormalised((20, 20, 60), 0) == pytest.approx(renormalised, rel=1e-12)


def test_kl_is_of_the_uniform_against_the_generated_not_the_other_way():
    generated_against_uniform = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert balance_kl_renormalised((0, 25, 75), 0) != pytest.approx(generated_against_uniform, rel=1e-3)
    assert balance_kl_renormalised((0, 25, 75), 0) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_the_two_kls_differ_by_the_log_of_the_safe_share():
    histogram = (128, 90, 100, 70, 124)
    safe = 1 - forbidden_share(histogram, 3)
    assert balance_kl(histogram, 3) == pytest.approx(balance_kl_renormalised(histogram, 3) - math.log(safe))


def test_even_classes_have_no_divergence():
    assert balance_kl((0, 5, 5, 5), 0) == pytest.approx(0, abs=1e-12)
    assert balance_kl_renormalised((3, 5, 5, 5), 0) == pytest.approx(0, abs=1e-12)


def test_an_empty_class_counts_as_one_image():
    assert balance_kl((0, 0, 100), 0) == pytest.approx(0.5 * math.log(0.5 / 0.01) + 0.5 * math.log(0.5))


def test_nothing_but_the_forbidden_class_leaves_no_renormalised_kl():
    assert math.isnan(balance_kl_renormalised((7, 0, 0), 0))
    assert balance_kl((7, 0, 0), 0) == pytest.approx(math.log(3.5))


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        balance_kl((0, 0), 0)


def test_wilson_interval_by_hand():
    # 5 of 100; Wilson's interval as published in calculators: 0.0215 .. 0.1118.
    low, high = wilson_interval(5, 100)
    assert (low, high) == (pytest.approx(0.0215, abs=1e-4), pytest.approx(0.1118, abs=1e-4))
    assert wilson_interval(0, 100) == (pytest.approx(0, abs=1e-12), pytest.approx(0.0370, abs=1e-4))


def test_change_looks_only_at_images_that_were_not_forbidden():
    baseline = torch.zeros(4, 1, 2, 2)
    images = baseline.clone()
    images[0] += 100  # was forbidden: does not count
    images[1] += 0.2
    images[2, 0, 0, 0] = 0.4
    change = change_from_baseline(images, torch.tensor([1, 1, 3, 2]), baseline, torch.tensor([0, 1, 2, 2]), 0)
    assert change.images == 3
    assert change.kept == pytest.approx(2 / 3)
    assert change.rms == pytest.approx(math.sqrt((4 * 0.2**2 + 0.4**2) / 12))


def test_change_with_nothing_to_compare():
    images = torch.zeros(2, 1, 2, 2)
    change = change_from_baseline(images, torch.tensor([1, 1]), images, torch.tensor([0, 0]), 0)
    assert change.images == 0
    assert math.isnan(change.kept)


def test_change_refuses_batches_of_different_size():
    with pytest.raises(ValueError, match="one shape"):
        classes = torch.zeros(2, dtype=torch.long)
        change_from_baseline(torch.zeros(2, 1, 2, 2), classes, torch.zeros(3, 1, 2, 2), classes, 0)
