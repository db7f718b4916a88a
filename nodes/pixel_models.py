"""Class-conditional models of pixels in ComfyUI: nodes that load one, name a class, and measure the images.

A latent of these models is the image itself, (batch, channels, height, width) in -1 .. 1, so that no VAE is needed.
"""

import math
from collections.abc import Sequence
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import numpy as np
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..dng_core.models.networks import UNet
from ..dng_core.models.weight_files import (
    DenoiserInfo,
    load_classifier,
    load_denoiser,
    shipped_classifiers,
    shipped_denoisers,
)
from ..dng_core.studies.report.class_report import Report, bar_chart, contact_sheet, markdown_table, measure
from .checks import check_filled, check_images, check_values, shape_text
from .plot import as_image
from .run.concept import input_of
from .run.regions import used_sizes

CATEGORY = "DNG/pixel models"
LABEL_KEY = "dng_class_label"  # in a conditioning's dict: the class, as the network counts them
NO_CLASS = "none"
SAMPLING_SETTINGS = {  # DDPMSchedule's names -> ComfyUI's, which calls Stable Diffusion's chain "linear"
    "linear": {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 0.02},
    "scaled_linear": {"beta_schedule": "linear", "linear_start": 0.00085, "linear_end": 0.012},
}
MODEL_TYPES = {  # what a network predicts -> how ComfyUI computes the denoised image from it
    "epsilon": comfy.model_base.ModelType.EPS,
    "v": comfy.model_base.ModelType.V_PREDICTION,
}
LARGEST = 2**27  # pixels of upscaled images, which take 1.6 GB as an IMAGE: a choice
LIVE_FEATURE_MAPS = 14  # peak memory of a forward pass in feature maps: 0.64 MiB per 28x28 image, measured on the CPU

DNGReport = io.Custom("DNG_REPORT")


class PixelLatentFormat(comfy.latent_formats.LatentFormat):
    """A latent that is the image itself, neither compressed nor scaled. ComfyUI's preview shows it as it is."""

    spacial_downscale_ratio = 1

    def __init__(self, channels: int) -> None:
        self.latent_channels = channels
        self.latent_rgb_factors = np.eye(3).tolist() if channels == 3 else [[1.0, 1.0, 1.0]]


class PixelModelConfig(comfy.supported_models_base.BASE):
    """What ComfyUI asks about a model before the model is made."""

    supported_inference_dtypes = [torch.float32]

    def __init__(self, info: DenoiserInfo) -> None:
        super().__init__({"disable_unet_model_creation": True})
        self.sampling_settings = SAMPLING_SETTINGS[info.schedule]
        self.latent_format = PixelLatentFormat(info.network.in_channels)


class PixelNetwork(nn.Module):
    """The U-Net, with the arguments by which ComfyUI calls a network."""

    dtype = torch.float32

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, class_label: Tensor, **options: Any) -> Tensor:
        return self.unet(x, timestep, class_label)


class PixelModel(comfy.model_base.BaseModel):
    """A class-conditional network that predicts epsilon or v, as a ComfyUI model. ``info`` says what it draws."""

    def __init__(self, unet: UNet, info: DenoiserInfo) -> None:
        super().__init__(PixelModelConfig(info), MODEL_TYPES[info.network.prediction])
        self.diffusion_model = PixelNetwork(unet)
        self.info = info

    def _apply_model(self, *args: Any, **kwargs: Any) -> Tensor:
        """The denoised image, clamped to the range of images (as in Ho et al. 2020): early errors stay small."""
        return super()._apply_model(*args, **kwargs).clamp(-1, 1)

    def memory_required(self, input_shape: Sequence[int], cond_shapes: object = None) -> float:
        """The bytes that a forward pass takes. By them ComfyUI decides how many predictions go into one batch."""
        floats = LIVE_FEATURE_MAPS * self.info.network.base_channels / self.info.network.patch_size**2
        return input_shape[0] * math.prod(input_shape[2:]) * floats * self.get_dtype().itemsize

    def extra_conds(self, **conditioning: Any) -> dict[str, comfy.conds.CONDRegular]:
        """The class label, as the network gets it. ComfyUI asks once for each conditioning, before sampling.

        Raises
        ------
        ValueError: for a conditioning without a label of this model, or for a latent of another size.
        """
        name, network = self.info.name, self.info.network
        given = input_of(conditioning.get("prompt_type", "positive"))
        label = conditioning.get(LABEL_KEY)
        if label is None:
            raise ValueError(
                f"the conditioning {given} carries no class label, and the pixel model {name!r} knows nothing else "
                f"(is it a text conditioning?): connect a Class Label node"
            )
        if not 0 <= label <= network.num_classes:
            raise ValueError(
                f"the conditioning {given} has the class label {label}, which is not one of the pixel model {name!r}: "
                f"connect a Class Label node that has this model as its input"
            )
        expected = (network.in_channels, network.image_size, network.image_size)
        if tuple(conditioning["noise"].shape[1:]) != expected:
            raise ValueError(
                f"`latent_image` is {shape_text(conditioning['noise'].shape[1:])}, the pixel model {name!r} draws "
                f"{shape_text(expected)} (channels x height x width): connect an Empty Pixel Latent node"
            )
        sizes = used_sizes(conditioning.get("area"), expected[1:])
        patch = network.patch_size
        least = patch * 2 ** (len(network.channel_multipliers) - 1)  # every level but the last is halved
        if any(size < least or size % patch for size in sizes):
            raise ValueError(
                f"the conditioning {given} is used in an area of {shape_text(sizes)}, which is not one that the pixel "
                f"model {name!r} can draw in: remove the area, use a mask, or make the area's height and width at "
                f"least {least} pixels, and multiples of {patch}"
            )
        if not conditioning["cross_attn"].any():  # no class, or zeroed by ConditioningZeroOut
            label = network.num_classes
        return {"class_label": comfy.conds.CONDRegular(torch.tensor([label], device=conditioning["device"]))}


def load_pixel_model(name: str) -> comfy.model_patcher.ModelPatcher:
    """A shipped denoiser as ComfyUI's MODEL. It raises what :func:`load_denoiser` raises.

    The plain ModelPatcher is chosen on purpose. The dynamic one loads weights piece by piece through ComfyUI's own
    layers; this network has no such layers, and with five megabytes it needs none.
    """
    unet, info = load_denoiser(shipped_denoisers()[name])
    patcher = comfy.model_patcher.ModelPatcher(
        PixelModel(unet, info),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    patcher.cached_patcher_init = (load_pixel_model, (name,))
    return patcher


def pixel_model_info(model: comfy.model_patcher.ModelPatcher, node: str) -> DenoiserInfo:
    """The description of a MODEL that :class:`LoadPixelModel` made. ``node`` is the name of the node for errors."""
    if not isinstance(model.model, PixelModel):
        raise ValueError(
            f"{node}: the model is a {type(model.model).__name__}, not a pixel model: connect Load Pixel Model"
        )
    return model.model.info


def class_index(text: str, class_names: tuple[str, ...], name: str) -> int | None:
    """The number of the class that ``text`` names or numbers; None for "none" and for an empty text.

    Raises
    ------
    ValueError: if ``text`` is neither a name nor a number of a class. ``name`` names the input in the error.
    """
    text = text.strip()
    if text.lower() in ("", NO_CLASS):
        return None
    names = [name.lower() for name in class_names]
    if text.lower() in names:
        return names.index(text.lower())
    if text.isdecimal() and len(text) < 10 and int(text) < len(names):
        return int(text)
    raise ValueError(
        f"`{name}` is {text!r}, which is not one of the classes {', '.join(class_names)} (nor their number, from 0)"
    )


def to_classifier_images(images: Tensor, size: int, channels: int, name: str) -> Tensor:
    """Turn IMAGE, (n, k size, k size, 3) in 0 .. 1, into (n, channels, size, size) in -1 .. 1: undo an upscaling by k.

    Raises
    ------
    ValueError: if the images are no whole multiple of the size. ``name`` names the input in the error.
    """
    height, width = images.shape[1:3]
    factor = height // size
    if height != width or factor * size != height:
        raise ValueError(
            f"{name} is {width}x{height}, but the classifier needs {size}x{size} or a whole multiple: connect the "
            f"output of Pixel Latent to Image"
        )
    small = images[:, ::factor, ::factor, :3].float().permute(0, 3, 1, 2)
    return 2 * (small if channels == 3 else small.mean(dim=1, keepdim=True)) - 1


class LoadPixelModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGLoadPixelModel",
            display_name="Load Pixel Model",
            category=CATEGORY,
            description="Loads a small class-conditional diffusion model that comes with DNG. It draws pixels, and "
            "needs no VAE.",
            search_aliases=["mnist", "cifar10", "digits", "class model", "ddpm", "pixel space"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(shipped_denoisers()),
                    tooltip="The model. mnist draws handwritten digits of 28x28 pixels, in the classes 0 to 9. "
                    "cifar10 draws small, still blurred photographs of 32x32 pixels, in ten classes from airplane to "
                    "truck.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="A MODEL for any sampler. Class Label gives its conditionings.")],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        check_values(cls, name=name)
        return io.NodeOutput(load_pixel_model(name))


class ClassLabel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGClassLabel",
            display_name="Class Label",
            category=CATEGORY,
            description="A class as a conditioning: the class that a pixel model should draw, or should avoid.",
            search_aliases=["class condition", "digit", "label conditioning", "null label"],
            inputs=[
                io.Model.Input("model", tooltip="The pixel model whose classes are meant."),
                io.String.Input(
                    "label",
                    default=NO_CLASS,
                    tooltip='The name or the number of a class, counted from 0. "none" stands for any class, which is '
                    "the unconditional prediction.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="A conditioning for `positive`, `negative` or `unconditional`."),
                io.String.Output(
                    display_name="label", tooltip="The label itself, for example for `forbidden` of Class Report."
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, label: str) -> io.NodeOutput:
        info = pixel_model_info(model, "Class Label")
        index = class_index(label, info.class_names, "label")
        # The tensor is 1 for a class and 0 for none, so that ConditioningZeroOut means none.
        marker = torch.zeros(1, 1, 1) if index is None else torch.ones(1, 1, 1)
        entry = [marker, {LABEL_KEY: info.network.num_classes if index is None else index}]
        return io.NodeOutput([entry], label)


class EmptyPixelLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGEmptyPixelLatent",
            display_name="Empty Pixel Latent",
            category=CATEGORY,
            description="An empty latent of the size that a pixel model draws.",
            search_aliases=["empty latent", "blank image", "pixel space"],
            inputs=[
                io.Model.Input("model", tooltip="The pixel model, which draws images of one size."),
                io.Int.Input("batch_size", default=64, min=1, max=4096, tooltip="The number of images to draw."),
            ],
            outputs=[io.Latent.Output(tooltip="A latent for a sampler that runs the pixel model.")],
        )

    @classmethod
    def execute(cls, model: Any, batch_size: int) -> io.NodeOutput:
        check_values(cls, batch_size=batch_size)
        network = pixel_model_info(model, "Empty Pixel Latent").network
        samples = torch.zeros(
            (batch_size, network.in_channels, network.image_size, network.image_size),
            device=comfy.model_management.intermediate_device(),
        )
        return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": 1})


class PixelLatentToImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGPixelLatentToImage",
            display_name="Pixel Latent to Image",
            category=CATEGORY,
            description="Turns the latent of a pixel model into images.",
            search_aliases=["decode pixels", "latent to image", "vae decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent of a sampler that ran a pixel model."),
                io.Int.Input(
                    "upscale",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Each pixel becomes a square with this side. Class Report undoes this.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The images, in colour or grey.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], upscale: int) -> io.NodeOutput:
        pixels = samples["samples"]
        if pixels.is_nested or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(
                f"Pixel Latent to Image: `samples` is {shape_text(pixels.shape)}, not a batch of images with 1 or 3 "
                f"channels: connect a sampler that runs a pixel model (the latents of other models need VAE Decode)"
            )
        check_values(cls, upscale=upscale)
        check_filled(pixels, "`samples`")
        enlarged = pixels.shape[0] * pixels.shape[2] * pixels.shape[3] * upscale**2
        if enlarged > LARGEST:
            raise ValueError(
                f"{len(pixels)} images at `upscale` {upscale} would be {enlarged / 1e6:.0f} million pixels, more than "
                f"the {LARGEST / 1e6:.0f} million that are made; lower `upscale`, or take fewer `samples`"
            )
        image = ((pixels.float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
        image = image.repeat_interleave(upscale, dim=2).repeat_interleave(upscale, dim=3)
        return io.NodeOutput(image.permute(0, 2, 3, 1).contiguous())


class ClassReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DNGClassReport",
            display_name="Class Report",
            category=CATEGORY,
            description=(
                "Measures what share of the images still shows the class that was to be avoided, how evenly the other "
                "classes are drawn, and what changed in comparison with the images without guidance. Several reports "
                "can be chained through previous: the table, chart and sheet of the last one hold a row for each."
            ),
            search_aliases=["classifier", "evaluate", "histogram", "class removal", "metrics", "KL"],
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The images of one method, from Pixel Latent to Image."),
                io.String.Input("name", default="DNG", tooltip="The method's name in the table and pictures."),
                io.Combo.Input(
                    "classifier",
                    options=list(shipped_classifiers()),
                    tooltip="The classifier that looks at the images. mnist knows the digits 0 to 9, cifar10 "
                    "ten classes from airplane to truck.",
                ),
                io.String.Input(
                    "forbidden",
                    default="0",
                    tooltip="The name or the number (counted from 0) of the class that was to be avoided.",
                ),
                io.Image.Input(
                    "baseline",
                    optional=True,
                    tooltip="The images without guidance, from the same seeds. With them, the row also says how many "
                    "of the images that did not show the forbidden class kept their class, and how much they changed.",
                ),
                DNGReport.Input("previous", optional=True, tooltip="The report to which this row is added."),
            ],
            outputs=[
                DNGReport.Output(
                    display_name="report", tooltip="Connect this to `previous` of the next Class Report."
                ),
                io.String.Output(display_name="table", tooltip="All rows as a Markdown table."),
                io.Image.Output(display_name="chart", tooltip="A bar chart of the share of each class."),
                io.Image.Output(
                    display_name="sheet",
                    tooltip="The images of all methods side by side, with the same seed in the same place. A red "
                    "frame marks images that still show the forbidden class.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        images: Tensor,
        name: str,
        classifier: str,
        forbidden: str,
        baseline: Tensor | None = None,
        previous: Report | None = None,
    ) -> io.NodeOutput:
        check_values(cls, classifier=classifier)
        network, info = load_classifier(shipped_classifiers()[classifier])
        index = class_index(forbidden, info.class_names, "forbidden")
        if index is None:
            raise ValueError(f"Class Report: forbidden must be one of the classes {', '.join(info.class_names)}")
        report = previous or Report(info.class_names, index)
        if (report.class_names, report.forbidden) != (info.class_names, index):
            raise ValueError(
                f"Class Report: previous is a report on {report.class_names[report.forbidden]!r}, but this node asks "
                f"for {info.class_names[index]!r}: give all rows of a report the same classifier and forbidden class"
            )

        def seen(batch: Tensor, input_name: str) -> Tensor:
            check_images(batch, input_name)
            return to_classifier_images(batch, info.image_size, info.in_channels, f"Class Report: {input_name}").cpu()

        unguided = None if baseline is None else seen(baseline, "baseline")
        report = report.with_row(*measure(name, seen(images, "images"), network, info.class_names, index, unguided))
        table = markdown_table(report)
        return io.NodeOutput(
            report,
            table,
            as_image(bar_chart(report)),
            as_image(contact_sheet(report)),
            ui={"text": [table], "figures": [row.to_dict() for row in report.rows]},
        )


NODES: list[type[io.ComfyNode]] = [LoadPixelModel, ClassLabel, EmptyPixelLatent, PixelLatentToImage, ClassReport]
