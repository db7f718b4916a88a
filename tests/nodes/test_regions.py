"""Areas, masks and timestep ranges of the undesired conditioning, on the oracle."""

from typing import Any

import pytest
import torch
from torch import Tensor

LEFT = {"area": (4, 2, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
LEFT_BY_PERCENTAGE = {"area": ("percentage", 1.0, 0.5, 0.0, 0.0), "strength": 1.0, "set_area_to_bounds": False}


def one_step(bench: Any, negative: list, **changes: Any) -> Tensor:
    """The guided prediction at the first level, under negative prompting at scale 1."""
    concept = bench.concept(negative, method="negative_prompting")
    return bench.dng(bench.model(), concept, steps=1, **changes)[0]


@pytest.mark.parametrize("extra", [LEFT, LEFT_BY_PERCENTAGE, None], ids=["area", "percentage", "mask"])
def test_an_undesired_area_pushes_inside_and_leaves_the_rest_of_the_image_alone(bench, extra):
    base = bench.sample(bench.model(), steps=1)
    everywhere = one_step(bench, bench.cond("0"))
    out = one_step(bench, bench.cond("0", **extra or {"mask": bench.left_half()}))
    torch.testing.assert_close(out[..., 2:], base[..., 2:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[..., :2], everywhere[..., :2], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(everywhere, base, atol=1e-2)


def test_an_area_meets_its_mask(bench):
    top = torch.zeros(1, 4, 4)
    top[:, :2] = 1.0
    out = one_step(bench, bench.cond("0", **LEFT, mask=top, mask_strength=1.0))
    changed = (out - bench.sample(bench.model(), steps=1)).abs() > 1e-4
    assert changed[..., :2, :2].all()
    assert not changed[..., 2:, :].any() and not changed[..., :, 2:].any()


@pytest.mark.parametrize("extra", [{"strength": 0.0}, {"mask_strength": 0.0}], ids=str)
def test_an_undesired_conditioning_of_strength_0_pushes_nowhere(bench, extra):
    """ComfyUI gives zeros for such a conditioning, and zeros are no prediction."""
    out = one_step(bench, bench.cond("0", mask=bench.left_half(), **extra))
    torch.testing.assert_close(out, bench.sample(bench.model(), steps=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("extra", [{}, LEFT], ids=["mask", "mask and area"])
@pytest.mark.parametrize("masks", [2, 8])
def test_masks_in_a_batch_are_dealt_out_as_comfyui_does(bench, masks, extra):
    """Repeated where there are fewer than images (4), cut off where there are more."""
    batch = torch.zeros(masks, 4, 4)
    batch[0] = 1.0
    out = one_step(bench, bench.cond("0", mask=batch, **extra), latent=bench.latent(4))
    base = bench.sample(bench.model(), bench.latent(4), steps=1)
    changed = ((out - base).abs().flatten(1).amax(1) > 1e-3).tolist()
    assert changed == [i % masks == 0 for i in range(4)]


def test_two_undesired_regions_push_in_both(bench):
    right = 1 - bench.left_half()
    both = bench.cond("0", mask=bench.left_half()) + bench.cond("3", mask=right)
    out = one_step(bench, both)
    torch.testing.assert_close(out[..., :2], one_step(bench, bench.cond("0"))[..., :2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[..., 2:], one_step(bench, bench.cond("3"))[..., 2:], rtol=1e-5, atol=1e-5)


def test_outside_its_timestep_range_the_undesired_is_not_evaluated_and_nothing_moves(bench, count):
    model = bench.model()
    calls = count(model)
    _, trace = bench.dng(model, bench.concept(bench.cond("0", start_percent=0.3, end_percent=0.8)), steps=20)
    start, end = (model.get_model_object("model_sampling").percent_to_sigma(p) for p in (0.3, 0.8))
    inside = [end <= sigma <= start for sigma in trace.sigmas.tolist()]
    assert calls.forwards == [16 if i else 8 for i in inside]
    assert 3 < sum(inside) < 17
    first = inside.index(True)
    assert torch.equal(trace.posterior[: first + 1], trace.posterior[:1].expand(first + 1, -1, -1))
    after = len(inside) - inside[::-1].index(True)
    assert torch.equal(trace.posterior[after:], trace.posterior[after : after + 1].expand_as(trace.posterior[after:]))
    assert not torch.equal(trace.posterior[first], trace.posterior[after])


def test_a_range_that_is_never_reached_is_no_guidance(bench):
    model = bench.model()
    samples, _ = bench.dng(model, bench.concept(bench.cond("0", start_percent=1.0, end_percent=1.0)))
    assert torch.equal(samples, bench.sample(model))
