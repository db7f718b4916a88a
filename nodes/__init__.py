"""The node classes of the pack."""

from . import oracle, patch, pixel_models, sampling

NODES = [*sampling.NODES, *patch.NODES, *pixel_models.NODES, *oracle.NODES]
