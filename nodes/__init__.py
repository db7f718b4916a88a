"""The node classes of the pack."""

from . import concepts, oracle, patch, pixel_models, sampling, trace

NODES = [*sampling.NODES, *patch.NODES, *concepts.NODES, *trace.NODES, *pixel_models.NODES, *oracle.NODES]
