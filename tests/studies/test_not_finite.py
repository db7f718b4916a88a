"""What is not finite is an error in every measure of the studies: it never counts as an image without the class."""

import numpy as np
import pytest
import torch

from dng_core.models.networks import SmallClassifier, UNet
from dng_core.studies import evidence_figures
from dng_core.studies.features import classified
from dng_core.studies.network_figures import unguided

from .small_experiment import CHAIN, NAMES, NETWORK


def test_a_classifier_that_sees_nan_is_an_error_and_no_class():
    classifier = SmallClassifier(1, 3, 4).eval()
    images = np.zeros((2, 1, 8, 8), dtype=np.uint8)
    assert len(classified(classifier, images)[1]) == 2
    with torch.no_grad():
        classifier.head.bias[1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        classified(classifier, images)


@pytest.fixture
def nan_network() -> UNet:
    network = UNet(NETWORK).eval().requires_grad_(False)
    network.conv_out.bias[:] = float("nan")
    return network


def test_a_network_that_draws_nan_is_an_error_in_the_figures(nan_network, monkeypatch):
    with pytest.raises(FloatingPointError, match="not finite"):
        unguided(nan_network, CHAIN, 2, 3, 0)
    classifier = SmallClassifier(1, 3, 4).eval()
    monkeypatch.setattr(evidence_figures, "shipped_mnist", lambda: (nan_network, classifier, CHAIN, NAMES))
    for figure in (evidence_figures.evidence_figure, evidence_figures.rules_figure):
        with pytest.raises(ValueError, match="not finite"):
            list(figure(2, 3, 0))
