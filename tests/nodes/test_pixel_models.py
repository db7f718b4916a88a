"""Pixel-space class models in a real ComfyUI, with the shipped weights and stock samplers."""

import importlib
import json
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dng_core.headless.client import run_workflow
from dng_core.models.networks import PREDICTIONS, UNet, UNetConfig
from dng_core.models.predictors import denoised
from dng_core.models.weight_files import DenoiserInfo
from dng_core.schedules import DDPMSchedule


@pytest.fixture(scope="module")
def pixel(pack: ModuleType) -> ModuleType:
    return importlib.import_module(pack.__name__ + ".nodes.pixel_models")


@pytest.fixture(scope="module")
def stock(comfyui: ModuleType) -> ModuleType:
    """ComfyUI's own nodes."""
    return importlib.import_module("nodes")


@pytest.fixture
def model(pixel: ModuleType) -> Any:
    return pixel.LoadPixelModel.execute("mnist")[0]


def label(pixel: ModuleType, model: Any, text: str) -> Any:
    return pixel.ClassLabel.execute(model, text)[0]


def ksampler(stock: ModuleType, model: Any, positive: Any, negative: Any, latent: Any, **changes: Any) -> Any:
    options = {"seed": 0, "steps": 2, "cfg": 1.0, "sampler_name": "euler_ancestral", "scheduler": "karras"} | changes
    with torch.inference_mode():
        return stock.KSampler().sample(
            model, positive=positive, negative=negative, latent_image=latent, denoise=1.0, **options
        )[0]


@pytest.fixture
def batches(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What the network was called with."""
    calls: list[SimpleNamespace] = []
    network = model.model.diffusion_model
    forward = network.forward

    def recorded(x: torch.Tensor, timestep: torch.Tensor, class_label: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append(SimpleNamespace(x=x, timestep=timestep, labels=class_label.tolist()))
        return forward(x, timestep, class_label, **options)

    monkeypatch.setattr(network, "forward", recorded)
    return calls


def test_all_1000_sigmas_are_ddpms_linear_chain(model):
    expected = DDPMSchedule.named("linear").sigmas
    sigmas = model.get_model_object("model_sampling").sigmas.double()
    assert len(sigmas) == 1000
    assert ((sigmas - expected) / expected).abs().max() < 1e-6


def test_stock_ksampler_draws_the_digit_that_is_asked_for(pixel, stock, model):
    latent = pixel.EmptyPixelLatent.execute(model, 16)[0]
    positive, none = label(pixel, model, "7"), label(pixel, model, "none")
    drawn = ksampler(stock, model, positive, none, latent, steps=16)
    images = pixel.PixelLatentToImage.execute(drawn, 1)[0]
    report = pixel.ClassReport.execute(images, "drawn", "mnist", "7")[0]
    assert report.rows[0].histogram["7"] >= 13


def test_no_class_draws_many_digits(pixel, stock, model):
    none = label(pixel, model, "none")
    drawn = ksampler(stock, model, none, none, pixel.EmptyPixelLatent.execute(model, 32)[0], steps=12)
    images = pixel.PixelLatentToImage.execute(drawn, 1)[0]
    histogram = pixel.ClassReport.execute(images, "drawn", "mnist", "0")[0].rows[0].histogram
    assert sum(count > 0 for count in histogram.values()) >= 6


def test_a_class_and_none_ride_in_one_forward_pass(pixel, stock, model, batches):
    positive, none = label(pixel, model, "3"), label(pixel, model, "none")
    ksampler(stock, model, positive, none, pixel.EmptyPixelLatent.execute(model, 2)[0], cfg=3.0)
    assert len(batches) == 2
    assert all(sorted(call.labels) == [3, 3, 10, 10] for call in batches)
    assert batches[0].timestep.tolist() == [999.0] * 4


def test_the_network_sees_the_vp_state(pixel, model, batches):
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    sigma = DDPMSchedule.named("linear").sigmas[500:501].float()
    model.model.apply_model(x, sigma, class_label=torch.tensor([4]))
    assert torch.allclose(batches[0].x, x / (1 + sigma**2).sqrt(), rtol=1e-5)
    assert batches[0].timestep.tolist() == [500.0]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_comfyui_denoises_as_the_experiments_do_whatever_the_network_predicts(pixel, prediction):
    torch.manual_seed(0)
    network = UNetConfig(8, 1, 32, (1,), 1, (), num_classes=2, prediction=prediction)
    unet = UNet(network).eval().requires_grad_(False)
    model = pixel.PixelModel(unet, DenoiserInfo("try", network, "linear", (-1.0, 1.0), ("a", "b")))
    chain, labels = DDPMSchedule.named("linear"), torch.tensor([0, 2])
    for timestep in (0, 300, 700):
        sigma = chain.sigmas[timestep]
        x = torch.full((2, 1, 8, 8), -0.5) + sigma.float() * torch.randn(2, 1, 8, 8)
        ours = denoised(unet, chain, x, float(sigma), labels)
        theirs = model.apply_model(x, sigma.float().expand(2), class_label=labels)
        assert torch.allclose(theirs, ours, atol=1e-4)


def test_memory_estimate_lets_a_batch_of_512_through_and_is_of_the_measured_size(model):
    mebibytes = model.model.memory_required([512, 1, 28, 28]) / 2**20
    assert 0.6 * 512 <= mebibytes <= 0.8 * 512  # measured: 0.64 MiB per image


def test_zeroed_conditioning_means_no_class(pixel, stock, model, batches):
    zeroed = stock.ConditioningZeroOut().zero_out(label(pixel, model, "3"))[0]
    ksampler(stock, model, zeroed, zeroed, pixel.EmptyPixelLatent.execute(model, 1)[0])
    assert {tuple(call.labels) for call in batches} == {(10,)}


def test_previews_show_the_image(pixel, model, comfyui, monkeypatch):
    latent_preview = importlib.import_module("latent_preview")
    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    previewer = latent_preview.get_previewer(torch.device("cpu"), model.model.latent_format)
    x0 = torch.full((1, 1, 28, 28), -1.0)
    x0[0, 0, 3, 5] = 1.0
    _, image, _ = previewer.decode_latent_to_preview_image("JPEG", x0)
    assert image.size == (28, 28)
    assert image.getpixel((5, 3)) == (255, 255, 255)
    assert image.getpixel((3, 5)) == (0, 0, 0)


def test_multigpu_and_device_nodes_can_load_another_copy(model):
    factory, arguments = model.cached_patcher_init[:2]
    assert factory(*arguments).model is not model.model


def test_empty_latent_has_the_models_size(pixel, model):
    latent = pixel.EmptyPixelLatent.execute(model, 5)[0]
    assert latent["samples"].shape == (5, 1, 28, 28)
    assert latent["downscale_ratio_spacial"] == 1


@pytest.mark.parametrize(("text", "index"), [("7", 7), (" 0 ", 0), ("none", 10), ("", 10), ("NONE", 10)])
def test_class_label_reads_names_numbers_and_none(pixel, model, text, index):
    [[_, options]] = label(pixel, model, text)
    assert options[pixel.LABEL_KEY] == index


def test_names_come_before_numbers(pixel):
    assert pixel.class_index("Dog", ("cat", "dog"), "label") == 1
    assert pixel.class_index("1", ("cat", "dog"), "label") == 1
    assert pixel.class_index("1", ("1", "0"), "label") == 0


@pytest.mark.parametrize("text", ["10", "-1", "seven", "1.5"])
def test_a_label_the_model_does_not_have_is_refused(pixel, model, text):
    with pytest.raises(ValueError, match=r"`label` is .* not one of the classes 0, 1, 2"):
        label(pixel, model, text)


def test_text_conditioning_is_refused_by_name(pixel, stock, model):
    text = [[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 768)}]]
    with pytest.raises(ValueError, match=r"conditioning `negative` .*carries no class label.*connect a Class Label"):
        latent = pixel.EmptyPixelLatent.execute(model, 1)[0]
        ksampler(stock, model, label(pixel, model, "1"), text, latent, cfg=2.0)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("positive", "`positive`"),
        ("negative", "`negative`"),
        ("unconditional", r"`negative` \(of a DNG sampler: `unconditional`\)"),
        ("more_concepts", r"`negative` of concept 2 \(of `more_concepts` or `concepts`\)"),
    ],
)
def test_a_dng_sampler_names_the_input_that_carries_no_label(pack, pixel, model, wrong, named):
    """ComfyUI knows the conditionings of a DNG sampler by other names."""
    concepts, sampling = (
        importlib.import_module(f"{pack.__name__}.nodes.{name}") for name in ("concepts", "sampling")
    )
    given = dict.fromkeys(("positive", "negative", "unconditional", "more_concepts"), label(pixel, model, "1"))
    given[wrong] = [[torch.zeros(1, 77, 1), {"pooled_output": torch.zeros(1, 768)}]]  # as wide as a label
    given["more_concepts"] = concepts.DNGConcept.execute(given["more_concepts"])[0]
    with torch.inference_mode(), pytest.raises(ValueError, match=f"the conditioning {named} carries no class label"):
        latent = pixel.EmptyPixelLatent.execute(model, 1)[0]
        sampling.KSamplerDNG.execute(model, 0, 2, 2.0, "euler", "karras", latent_image=latent, denoise=1.0, **given)


def test_a_label_of_a_larger_model_is_refused(pixel, stock, model):
    foreign = [[torch.ones(1, 1, 1), {pixel.LABEL_KEY: 11}]]
    with pytest.raises(ValueError, match="class label 11, which is not one of the pixel model 'mnist'"):
        ksampler(stock, model, foreign, foreign, pixel.EmptyPixelLatent.execute(model, 1)[0])


def test_a_latent_of_another_size_is_refused(pixel, stock, model):
    latent = stock.EmptyLatentImage().generate(512, 512)[0]
    none = label(pixel, model, "none")
    with pytest.raises(ValueError, match=r"`latent_image` is 1x512x512.*draws 1x28x28.*Empty Pixel Latent"):
        ksampler(stock, model, none, none, latent)


@pytest.mark.parametrize("area", [(1, 2, 0, 0), (8, 9, 0, 0), (6, 8, 0, 0), (8, 8, 22, 0), (8, 8, 28, 0)])
def test_an_area_too_small_for_the_models_levels_or_not_of_whole_patches_is_refused(pixel, stock, model, area):
    ((embedding, options),) = label(pixel, model, "3")
    none, latent = label(pixel, model, "none"), pixel.EmptyPixelLatent.execute(model, 1)[0]
    with pytest.raises(ValueError, match=r"`positive` is used in an area of .*at least 8 pixels, and multiples of 2"):
        ksampler(stock, model, [[embedding, options | {"area": area}]], none, latent)
    ksampler(stock, model, [[embedding, options | {"area": (8, 10, 20, 0)}]], none, latent)


def test_other_models_are_refused(pixel):
    other = SimpleNamespace(model=object())
    for node, argument in ((pixel.ClassLabel, "1"), (pixel.EmptyPixelLatent, 1)):
        with pytest.raises(ValueError, match="not a pixel model: connect Load Pixel Model"):
            node.execute(other, argument)


def test_missing_weights_name_the_file_and_the_remedy(pixel, tmp_path, monkeypatch):
    monkeypatch.setattr(pixel, "shipped_denoisers", lambda: {"mnist": tmp_path / "gone.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors.*reinstall DNG"):
        pixel.LoadPixelModel.execute("mnist")


def test_images_are_the_latent_from_0_to_1_in_three_channels(pixel):
    latent = torch.tensor([-1.5, -1.0, 0.0, 1.0]).view(1, 1, 2, 2)
    image = pixel.PixelLatentToImage.execute({"samples": latent}, 3)[0]
    assert image.shape == (1, 6, 6, 3)
    assert image[0, ::3, ::3, 1].tolist() == [[0.0, 0.0], [0.5, 1.0]]


def test_other_latents_are_no_pixels(pixel):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        pixel.PixelLatentToImage.execute({"samples": torch.zeros(1, 4, 8, 8)}, 1)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "holds NaN"), (float("inf"), "holds NaN or infinite")])
def test_a_latent_that_is_not_finite_is_no_image(pixel, value, message):
    with pytest.raises(ValueError, match=f"`samples` {message}"):
        pixel.PixelLatentToImage.execute({"samples": torch.full((1, 1, 4, 4), value)}, 1)


def test_images_that_would_fill_the_memory_are_refused_before_they_are_made(pixel):
    """The largest batch and the largest factor would ask for 150 GB."""
    with pytest.raises(ValueError, match=r"4096 images at `upscale` 64 .*lower `upscale`"):
        pixel.PixelLatentToImage.execute({"samples": torch.zeros(4096, 1, 28, 28)}, 64)


def test_report_sees_upscaled_images_as_they_were(pixel):
    latent = torch.rand(3, 1, 28, 28) * 2 - 1
    image = pixel.PixelLatentToImage.execute({"samples": latent}, 4)[0]
    assert torch.allclose(pixel.to_classifier_images(image, 28, 1, "images"), latent, atol=1e-6)


@pytest.mark.parametrize("size", [(30, 30), (28, 56), (14, 14)])
def test_report_refuses_images_of_another_size(pixel, size):
    with pytest.raises(ValueError, match=r"Class Report: images is .*28x28"):
        pixel.ClassReport.execute(torch.zeros(1, *size, 3), "x", "mnist", "0")


@pytest.mark.parametrize("which", ["images", "baseline"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_no_removal(pixel, which, value):
    """A classifier sees some class in NaN, so that a failed run would look like a perfect one."""
    images = {"images": torch.rand(3, 28, 28, 3), "baseline": torch.rand(3, 28, 28, 3)}
    images[which][1, 5, 5] = value
    with pytest.raises(ValueError, match=rf"`{which}` holds NaN or infinite values"):
        pixel.ClassReport.execute(name="x", classifier="mnist", forbidden="0", **images)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 28, 28, 3), "`images` is empty .*0x28x28x3"),
        ((28, 28, 3), "28x28x3, not a batch"),
        ((1, 28, 28, 1), "not"),
    ],
)
def test_what_is_no_batch_of_images_is_not_reported_on(pixel, shape, message):
    with pytest.raises(ValueError, match=message):
        pixel.ClassReport.execute(torch.zeros(shape), "x", "mnist", "0")


def test_reports_chain_into_one_table(pixel):
    images = torch.rand(20, 28, 28, 3, generator=torch.Generator().manual_seed(0))
    first = pixel.ClassReport.execute(images, "none", "mnist", "0", baseline=images)
    second = pixel.ClassReport.execute(images, "DNG", "mnist", "0", baseline=images, previous=first[0])
    report, table, chart, sheet = second.args
    assert [row.name for row in report.rows] == ["none", "DNG"]
    assert len(table.splitlines()) == 4
    assert second.ui["text"] == [table]
    assert json.loads(json.dumps(second.ui["figures"]))[1]["kept"] == 1.0
    for picture in (chart, sheet):
        assert picture.shape[0] == 1
        assert picture.shape[3] == 3
        assert 0 <= picture.min() <= picture.max() <= 1
    assert len(first[0].rows) == 1


def test_a_report_on_another_class_is_not_continued(pixel):
    images = torch.zeros(2, 28, 28, 3)
    first = pixel.ClassReport.execute(images, "a", "mnist", "0")[0]
    with pytest.raises(ValueError, match="previous is a report on '0'"):
        pixel.ClassReport.execute(images, "b", "mnist", "1", previous=first)


def test_report_refuses_none_as_the_forbidden_class(pixel):
    with pytest.raises(ValueError, match="forbidden must be one of"):
        pixel.ClassReport.execute(torch.zeros(1, 28, 28, 3), "a", "mnist", "none")


def test_report_refuses_a_baseline_of_another_batch_size(pixel):
    with pytest.raises(ValueError, match="one shape"):
        images = torch.zeros(2, 28, 28, 3)
        pixel.ClassReport.execute(images, "a", "mnist", "0", baseline=images[:1])


def test_every_input_has_a_tooltip(pixel):
    for node in pixel.NODES:
        schema = node.GET_SCHEMA()
        assert schema.description
        assert schema.search_aliases
        assert all(i.tooltip for i in schema.inputs), schema.node_id


def test_the_nodes_run_in_a_server_and_report_their_figures(comfyui_server):
    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    sampler = {"seed": 3, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    prompt = {
        "model": node("DNGLoadPixelModel", name="mnist"),
        "seven": node("DNGClassLabel", model=["model", 0], label="7"),
        "none": node("DNGClassLabel", model=["model", 0], label="none"),
        "latent": node("DNGEmptyPixelLatent", model=["model", 0], batch_size=3),
        "drawn": node(
            "KSampler",
            model=["model", 0],
            positive=["seven", 0],
            negative=["none", 0],
            latent_image=["latent", 0],
            **sampler,
        ),
        "image": node("DNGPixelLatentToImage", samples=["drawn", 0], upscale=2),
        "first": node("DNGClassReport", images=["image", 0], name="a", classifier="mnist", forbidden="7"),
        "second": node(
            "DNGClassReport",
            images=["image", 0],
            name="b",
            classifier="mnist",
            forbidden="7",
            baseline=["image", 0],
            previous=["first", 0],
        ),
        "sheet": node("SaveImage", images=["second", 3], filename_prefix="sheet"),
    }
    result = run_workflow(comfyui_server, prompt)
    figures = result.ui["second"]["figures"]
    assert [(row["name"], row["images"]) for row in figures] == [("a", 3), ("b", 3)]
    assert result.ui["second"]["text"][0].startswith("| method |")
    assert result.files["sheet"][0][1].startswith(b"\x89PNG")
