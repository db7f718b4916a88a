"""The node classes of the pack."""

from . import calibrate, compare, concepts, oracle, patch, picture_book, pixel_models, plot, sampling, trace

NODES = [
    *sampling.NODES,
    *patch.NODES,
    *concepts.NODES,
    *trace.NODES,
    *plot.NODES,
    *compare.NODES,
    *calibrate.NODES,
    *pixel_models.NODES,
    *picture_book.NODES,
    *oracle.NODES,
]
