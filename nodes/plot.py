"""The trace of a guided run as a chart."""

from typing import get_args

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..dng_core.plots.drawing import ThemeName
from ..dng_core.plots.trace_chart import AXES, VIEWS, trace_chart
from .checks import check_values
from .inputs import TRACE


def as_image(picture: Image.Image) -> Tensor:
    """A picture as IMAGE, (1, height, width, 3) in 0 .. 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def theme_input() -> io.Input:
    return io.Combo.Input(
        "theme",
        options=list(get_args(ThemeName)),
        default="dark",
        tooltip="The colours, for a light or a dark background.",
    )


class PlotTrace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGPlotTrace",
            display_name="Plot Trace (DNG)",
            category="DNG",
            description="Draws the probability that each image is turning into what is to be avoided, and how hard "
            "the image was pushed away, over the steps of a run.",
            search_aliases=["dng", "trace", "posterior", "guidance scale", "chart", "graph", "visualize"],
            is_output_node=True,
            inputs=[
                TRACE.Input("trace", tooltip="The trace of KSampler (DNG) or KSampler Advanced (DNG)."),
                io.Combo.Input(
                    "axis",
                    options=list(AXES),
                    default=AXES[0],
                    tooltip="The horizontal axis: the number of the step, the noise level sigma, or log-SNR "
                    "(-2 ln sigma).",
                ),
                io.Combo.Input(
                    "view",
                    options=list(VIEWS),
                    default=VIEWS[0],
                    tooltip="lines: one line for each image and concept. quantiles: the median of the batch with "
                    "bands. auto: lines for up to 8 images, and quantiles for more.",
                ),
                theme_input(),
                io.Int.Input("width", default=960, min=240, max=8192, tooltip="The width of the chart in pixels."),
                io.Int.Input("height", default=720, min=240, max=8192, tooltip="The height of the chart in pixels."),
            ],
            outputs=[io.Image.Output(display_name="IMAGE", tooltip="The chart, as one picture.")],
        )

    @classmethod
    def execute(cls, trace, axis, view, theme, width, height) -> io.NodeOutput:
        check_values(cls, axis=axis, view=view, theme=theme, width=width, height=height)
        image = as_image(trace_chart(trace, axis, view, theme, width, height))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


NODES = [PlotTrace]
