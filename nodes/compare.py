"""Images without and with guidance, side by side."""

from comfy_api.latest import io, ui
from torch import Tensor

from ..dng_core.guidance import Trace
from ..dng_core.plots.comparison import ORDERS, comparison_sheet, comparison_table, rms_changes
from .checks import check_images, check_values
from .inputs import TRACE
from .plot import as_image, theme_input


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGCompare",
            display_name="Compare (DNG)",
            category="DNG",
            description="Shows how much guidance changed: the images without and with guidance, from the same seed, "
            "side by side with their difference. The trace of each image is drawn below.",
            search_aliases=["dng", "compare", "difference map", "side by side", "before and after", "rms"],
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "without",
                    tooltip="The images without guidance, from a stock KSampler or with guidance_scale 0.",
                ),
                io.Image.Input("with_dng", tooltip="The images with guidance, from the same seed and settings."),
                TRACE.Input(
                    "trace",
                    optional=True,
                    tooltip="The trace of the run with guidance. It is drawn under the images.",
                ),
                io.Int.Input(
                    "at_most",
                    optional=True,
                    default=16,
                    min=1,
                    max=256,
                    tooltip="The largest number of images on the sheet.",
                ),
                io.Combo.Input(
                    "order",
                    optional=True,
                    options=list(ORDERS),
                    default=ORDERS[0],
                    tooltip="The order of the images. Where there are more than at_most, the first ones are shown.",
                ),
                io.Int.Input(
                    "image_size",
                    optional=True,
                    default=256,
                    min=64,
                    max=2048,
                    tooltip="The longest side of an image on the sheet, in pixels. Small images are enlarged by a "
                    "whole factor.",
                ),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The sheet, as one picture."),
                io.String.Output(
                    display_name="table",
                    tooltip="The RMS change of each image, and the largest posterior and guidance scale of its trace, "
                    "as a table in Markdown.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        without,
        with_dng,
        theme,
        trace=None,
        at_most=16,
        order=ORDERS[0],
        image_size=256,
    ) -> io.NodeOutput:
        check_values(cls, theme=theme, at_most=at_most, order=order, image_size=image_size)
        check_pairs(without, with_dng, trace)
        before, after = (images[..., :3].float().cpu().numpy() for images in (without, with_dng))
        image = as_image(comparison_sheet(before, after, trace, order, at_most, image_size, theme))
        table = comparison_table(rms_changes(before, after), trace)
        return io.NodeOutput(image, table, ui=ui.PreviewImage(image, cls=cls))


def check_pairs(without: Tensor, with_dng: Tensor, trace: Trace | None) -> None:
    """Raise ValueError, naming the input and the remedy, where the images without and with do not pair up."""
    check_images(without, "without")
    check_images(with_dng, "with_dng")
    if without.shape[1:3] != with_dng.shape[1:3]:
        raise ValueError(
            f"Compare (DNG): `without` is {_size(without)} but `with_dng` {_size(with_dng)} (width x height); compare "
            "images of the same size"
        )
    if len(without) != len(with_dng):
        raise ValueError(
            f"Compare (DNG): `without` holds {len(without)} images but `with_dng` {len(with_dng)}; give both samplers "
            "the same latent and seed"
        )
    traced = None if trace is None else trace.posterior.shape[2]
    if traced and traced != len(with_dng):
        raise ValueError(
            f"Compare (DNG): `trace` is that of {traced} images but `with_dng` holds {len(with_dng)}; connect the "
            "trace of the sampler that drew them"
        )


def _size(images: Tensor) -> str:
    return f"{images.shape[2]}x{images.shape[1]}"


NODES = [Compare]
