"""Perp-Neg, with which the studies compare, is the one of ComfyUI's own PerpNegGuider."""

import pytest
import torch

from dng_core.baselines import perp_neg


@pytest.mark.parametrize(("cfg", "scale"), [(1.0, 1.0), (8.0, 1.0), (3.0, 2.5), (3.0, 0.0)])
def test_perp_neg_is_comfyuis_for_each_image(comfyui, cfg, scale):
    from comfy_extras import nodes_perpneg

    generator = torch.Generator().manual_seed(0)
    positive, negative, empty = torch.randn(3, 2, 4, 6, 6, generator=generator, dtype=torch.float64)
    found = perp_neg(positive, negative, empty, cfg, scale)
    for i in range(2):
        p, n, u = (prediction[i : i + 1] for prediction in (positive, negative, empty))
        wanted = nodes_perpneg.perp_neg(torch.zeros_like(p), p, n, u, neg_scale=scale, cond_scale=cfg)
        torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-12, atol=1e-12)
    together = nodes_perpneg.perp_neg(None, positive, negative, empty, neg_scale=scale, cond_scale=cfg)
    assert torch.allclose(together, found) == (scale == 0)  # of a batch, ComfyUI's images depend on one another
