"""The node classes of the pack."""

from . import oracle, patch, pixel_models, sampling, trace

NODES = [*sampling.NODES, *patch.NODES, *trace.NODES, *pixel_models.NODES, *oracle.NODES]
