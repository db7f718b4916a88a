"""The picture book in a real ComfyUI: its weights in ComfyUI's own U-Net, the stock graph, and bad input.

All of it runs on random weights; what the shipped ones draw is measured by `dng figures picture_book`.
"""

import importlib
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dng_core.baselines import NormalizedAttention
from dng_core.models.picture_book.networks import CrossUNet, CrossUNetConfig, PictureBook, fold
from dng_core.models.picture_book.prompting import contexts, denoised
from dng_core.models.picture_book.training import TEXT
from dng_core.models.picture_book.weights import PictureBookInfo, save_picture_book
from dng_core.models.picture_book.words import EMPTY, END, MOST_WORDS, START, split, tokens
from dng_core.schedules import DDPMSchedule
from dng_core.studies.picture_book.cases import Case
from dng_core.studies.picture_book.methods import EVIDENCE, Method, guided

DEEP = CrossUNetConfig(
    48, 32, (1, 2, 3), (1, 0, 2), (1, 0, 2), (1, 2, 0, 1, 2, 1), transformer_depth_middle=2, context_dim=24
)
SMALL = CrossUNetConfig(model_channels=32)


def randomised(module: torch.nn.Module) -> Any:
    """All parameters random, for many layers begin at 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return module.eval().requires_grad_(False)


@pytest.mark.parametrize("config", [CrossUNetConfig(), DEEP, replace(DEEP, num_head_channels=16)])
def test_comfyuis_own_unet_takes_the_weights_and_predicts_the_same(nodes, config):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    ours, theirs = randomised(CrossUNet(config)), UNetModel(**config.comfyui())
    nodes.fit_last_layer(theirs)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, config.in_channels, 16, 16, generator=generator)
    context = torch.randn(3, 7, config.context_dim, generator=generator)
    timestep = torch.tensor([0.0, 400.0, 999.0])
    expected = ours(x, timestep, context)
    with torch.no_grad():
        found = theirs(x, timestep, context)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (ours(x, timestep, context.flip(0)) - expected).abs().max() > 1e-3  # the text matters


@pytest.fixture(scope="module")
def nodes(pack: ModuleType) -> ModuleType:
    return importlib.import_module(pack.__name__ + ".nodes.picture_book")


@pytest.fixture(scope="module")
def book() -> PictureBook:
    return randomised(PictureBook(TEXT, SMALL))


@pytest.fixture(scope="module")
def weights(book: PictureBook, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "picture_book.safetensors"
    save_picture_book(path, book.state_dict(), PictureBookInfo(TEXT, SMALL))
    return path


@pytest.fixture
def loaded(nodes: ModuleType, weights: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE, from the node."""
    monkeypatch.setattr(nodes, "SHIPPED_PICTURE_BOOK", weights)
    return nodes.LoadPictureBook.execute().args


class Graph:
    """The stock graph around a model: prompts go in, pictures come out."""

    def __init__(self, bench: Any, loaded: tuple[Any, Any, Any]) -> None:
        self.bench, (self.model, self.clip, self.vae) = bench, loaded

    def text(self, prompt: str) -> list:
        """CLIP Text Encode."""
        return self.bench.stock.CLIPTextEncode().encode(self.clip, prompt)[0]

    def empty(self, batch: int = 2, side: int = 64) -> dict:
        """Empty Latent Image."""
        return self.bench.stock.EmptyLatentImage().generate(side, side, batch)[0]

    def options(self, **changes: Any) -> dict[str, Any]:
        given = {"positive": self.text("a park by day"), "cfg": 3.0, "steps": 2, "latent": self.empty()}
        return given | changes

    def draw(self, model: Any = None, **changes: Any) -> Tensor:
        """KSampler's latents."""
        return self.bench.sample(model or self.model, **self.options(**{"negative": self.text("")} | changes))

    def avoid(self, what: str, model: Any = None, settings: Any = None, **changes: Any) -> tuple[Tensor, Any]:
        """KSampler (DNG)'s latents and trace."""
        concept = self.bench.concept(self.text(what), **settings or {})
        return self.bench.dng(
            model or self.model, concept, **self.options(**{"unconditional": self.text("")} | changes)
        )

    def decode(self, samples: Tensor) -> Tensor:
        """VAE Decode."""
        return self.bench.stock.VAEDecode().decode(self.vae, {"samples": samples})[0]


@pytest.fixture
def graph(bench: Any, loaded: tuple[Any, Any, Any]) -> Graph:
    return Graph(bench, loaded)


def test_the_stock_graph_draws_pictures(graph):
    samples = graph.draw()
    assert samples.shape == (2, 48, 16, 16)
    pictures = graph.decode(samples)
    assert pictures.shape == (2, 64, 64, 3)
    assert pictures.min() >= 0 and pictures.max() <= 1 and pictures.std() > 0.05
    assert not torch.equal(samples, graph.draw(positive=graph.text("the sea at night")))


def test_comfyui_denoises_as_the_studies_do(graph, book):
    chain = DDPMSchedule.named("linear")
    prompts = ["a park by day", ""]
    sigmas = graph.model.get_model_object("model_sampling").sigmas
    assert ((sigmas - chain.sigmas) / chain.sigmas).abs().max() < 1e-6
    for timestep in (0, 300, 999):
        sigma = chain.sigmas[timestep]
        x = 0.5 + sigma.float() * torch.randn(2, 48, 16, 16, generator=torch.Generator().manual_seed(timestep))
        ours = denoised(book, chain, x, float(sigma), contexts(book, prompts).split(1))
        for prompt, wanted in zip(prompts, ours, strict=True):
            context = graph.text(prompt)[0][0].expand(2, -1, -1)
            found = graph.model.model.apply_model(x, sigma.float().expand(2), c_crossattn=context)
            torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


def test_clip_text_encode_gives_the_text_encoders_context(graph, book):
    ((context, options),) = graph.text("A park, by day!")
    torch.testing.assert_close(context, contexts(book, ["a park by day"]))
    assert options["pooled_output"] is None


def test_weights_in_a_prompt_move_words_as_comfyui_does(graph, book):
    ((weighted, _),) = graph.text("a (red cat:1.5) in a (park)")
    plain, empty = contexts(book, ["a red cat in a park", ""])
    weight = torch.ones(len(plain), 1)
    weight[2:4], weight[6] = 1.5, 1.1
    torch.testing.assert_close(weighted[0], empty + weight * (plain - empty))
    ((same, _),) = graph.text("a (red cat:1.0) in a park")
    torch.testing.assert_close(same[0], plain)


def test_the_tokenizer_numbers_words(graph):
    (row,) = graph.clip.tokenize("a (tree:1.2)", return_word_ids=True)["picture_book"]
    assert [token for token, _, _ in row] == tokens(split("a tree"))
    assert row[:4] == [(START, 1.0, 0), (row[1][0], 1.0, 1), (row[2][0], 1.2, 2), (END, 1.0, 0)]
    assert row[4] == (EMPTY, 1.0, 0)


FAMILIES = [
    *("euler", "euler_ancestral", "heun", "dpm_2", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2m", "dpmpp_3m_sde"),
    *("ddpm", "lcm", "ipndm", "deis", "res_multistep_cfg_pp", "gradient_estimation", "er_sde", "seeds_2"),
    *("sa_solver", "ddim", "uni_pc"),
]


def test_samplers_of_every_family_draw(graph):
    for sampler in FAMILIES:
        samples = graph.draw(sampler_name=sampler, latent=graph.empty(1))
        assert samples.shape == (1, 48, 16, 16) and bool(samples.isfinite().all()), sampler


def test_dngs_nodes_agree_on_the_book(graph):
    """KSampler (DNG) and the patch beside a stock KSampler; at scale 0 both are the stock KSampler."""
    guided, trace = graph.avoid("a flower", settings={"temperature": 0.01})
    assert trace.posterior.shape == (2, 1, 2) and bool(trace.posterior.isfinite().all())
    patched = graph.bench.patch(graph.model, graph.text("a flower"), temperature=0.01)
    torch.testing.assert_close(graph.draw(patched), guided)
    unguided = graph.draw()
    assert not torch.equal(guided, unguided)
    assert torch.equal(graph.avoid("a flower", settings={"guidance_scale": 0.0})[0], unguided)


def test_the_shipped_calibration_is_of_the_book_and_of_no_other_model(graph, bench, pack):
    calibrations = importlib.import_module(pack.__name__ + ".nodes.calibrations")
    measured = calibrations.load("shipped: picture_book")
    measured.check(calibrations.model_name(graph.model), tuple(graph.draw().shape[1:]), "")
    with pytest.raises(ValueError, match="the calibration is of the model 'picture book', and this is"):
        measured.check(calibrations.model_name(bench.model("epsilon")), (48, 16, 16), "")


def test_a_joint_negative_holds_both_prompts(graph, pack, book):
    joint = importlib.import_module(pack.__name__ + ".nodes.concepts").JointNegative
    positive, negative = joint.execute(graph.clip, "a park by day", "a flower").args
    torch.testing.assert_close(positive[0][0], contexts(book, ["a park by day"]))
    torch.testing.assert_close(negative[0][0], contexts(book, ["a park by day, a flower"]))


def test_a_joint_negative_is_compared_with_the_prompt(graph, bench, pack):
    """By `reference` auto. The same words from CLIP Text Encode are compared with the empty prompt."""
    joint = importlib.import_module(pack.__name__ + ".nodes.concepts").JointNegative
    _, negative = joint.execute(graph.clip, "a park by day", "a flower").args

    def drawn(conditioning: list, reference: str) -> Tensor:
        unconditional = graph.text("")
        concept = bench.concept(conditioning, reference, guidance_scale=20.0)
        return bench.dng(graph.model, concept, **graph.options(unconditional=unconditional))[0]

    same_words = graph.text("a park by day, a flower")
    assert torch.equal(drawn(negative, "auto"), drawn(same_words, "positive"))
    assert not torch.equal(drawn(negative, "auto"), drawn(same_words, "auto"))
    assert torch.equal(drawn(negative, "cfg"), drawn(same_words, "cfg"))


def test_the_studys_evidence_is_what_the_nodes_call_exact(graph, pack):
    inputs = importlib.import_module(pack.__name__ + ".nodes.inputs")
    sampling = graph.model.get_model_object("model_sampling")
    settings = inputs.concepts_from([], {})[0].settings_on(sampling)
    assert settings.evidence_above == pytest.approx(EVIDENCE.evidence_above, rel=1e-2)
    assert asdict(settings) | {"evidence_above": 0} == asdict(EVIDENCE) | {"evidence_above": 0}


def test_perp_neg_runs(graph):
    custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
    node = importlib.import_module("comfy_extras.nodes_perpneg").PerpNegGuider
    texts = graph.text("a park by day"), graph.text("a flower"), graph.text("")
    guider = node.execute(graph.model, *texts, 3.0, 1.0)[0]
    noise, sampler = custom.RandomNoise.execute(1)[0], custom.KSamplerSelect.execute("euler_ancestral")[0]
    sigmas = custom.BasicScheduler.execute(graph.model, "karras", 2, 1.0)[0]
    out = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, graph.empty())[0]
    assert bool(out["samples"].isfinite().all())
    assert not torch.equal(out["samples"], graph.draw(negative=graph.text("a flower")))


def test_the_studys_attention_guidance_is_comfyuis_nag_node(graph, book):
    """The prompt's prediction in a batch with the negative prompt's, by the node's patch of ComfyUI's network."""
    chain, case = DDPMSchedule.named("linear"), Case("related", "a park by day", ("flower",))
    node = importlib.import_module("comfy_extras.nodes_nag").NAGuidance
    patched = node.execute(graph.model, 3.5, 0.6, 1.2)[0]
    options = {**patched.model_options["transformer_options"], "cond_or_uncond": [0, 1]}
    sigma = chain.sigmas[500]
    x = 0.5 + sigma.float() * torch.randn(2, 48, 16, 16, generator=torch.Generator().manual_seed(0))
    context = torch.cat([graph.text(prompt)[0][0].expand(2, -1, -1) for prompt in ("a park by day", "flower")])
    inputs = {"c_crossattn": context, "transformer_options": options}
    positive, negative = patched.model.apply_model(x.repeat(2, 1, 1, 1), sigma.float().expand(4), **inputs).chunk(2)
    wanted = negative + 3 * (positive - negative)
    found = {}
    for scale in (2.5, 0.0):
        method = Method(NormalizedAttention(scale, tau=1.2, alpha=0.6))
        found[scale] = guided(book, chain, case, method, 3.0, [float(sigma), 1.0])(x, float(sigma))
    torch.testing.assert_close(found[2.5], wanted, atol=1e-3, rtol=1e-3)
    assert (found[2.5] - found[0.0]).abs().max() > 0.02


PATCHES = {
    "nodes_nag.NAGuidance": (5.0, 0.5, 1.5),
    "nodes_pag.PerturbedAttentionGuidance": (3.0,),
    "nodes_sag.SelfAttentionGuidance": (0.5, 2.0),
    "nodes_freelunch.FreeU": (1.2, 1.4, 0.8, 0.3),
    "nodes_model_advanced.RescaleCFG": (0.7,),
}


@pytest.mark.parametrize("name", PATCHES)
def test_comfyuis_patches_of_a_unet_work_on_it(graph, name):
    """They change the picture, and DNG runs beside them."""
    module, node = name.split(".")
    found = getattr(importlib.import_module(f"comfy_extras.{module}"), node)
    run = found.execute if hasattr(found, "execute") else found().patch
    patched = run(graph.model, *PATCHES[name])[0]
    out = graph.draw(patched)
    assert bool(out.isfinite().all())
    assert not torch.allclose(out, graph.draw(), rtol=1e-3)
    guided, _ = graph.avoid("a flower", patched, {"temperature": 0.01})
    assert bool(guided.isfinite().all()) and not torch.equal(guided, out)


def test_the_vae_loses_nothing(graph):
    pictures = torch.rand(3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    latent = graph.bench.stock.VAEEncode().encode(graph.vae, pictures)[0]["samples"]
    assert torch.equal(latent, fold(2 * pictures.movedim(-1, 1) - 1))
    torch.testing.assert_close(graph.decode(latent), pictures, atol=1e-6, rtol=0)


def test_tiles_are_joined_without_a_seam(graph):
    pictures = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(0))
    tiled = graph.bench.stock.VAEEncodeTiled().encode(graph.vae, pictures, 64, 16)[0]["samples"]
    torch.testing.assert_close(tiled, graph.vae.encode(pictures), atol=1e-5, rtol=0)
    again = graph.bench.stock.VAEDecodeTiled().decode(graph.vae, {"samples": tiled}, 64, 16)[0]
    torch.testing.assert_close(again, pictures, atol=1e-5, rtol=0)


def test_image_to_image_and_masks_work(graph):
    pictures = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    latent = graph.bench.stock.VAEEncode().encode(graph.vae, pictures)[0]
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1.0
    masked = graph.bench.stock.SetLatentNoiseMask().set_mask(latent, mask)[0]
    out = graph.decode(graph.draw(latent=masked, denoise=0.6, steps=3))
    torch.testing.assert_close(out[:, :, :28], pictures[:, :, :28], atol=1e-4, rtol=0)
    assert (out[:, :, 36:] - pictures[:, :, 36:]).abs().mean() > 0.05


def test_previews_show_the_picture(graph, monkeypatch):
    preview = importlib.import_module("latent_preview")
    monkeypatch.setattr(preview.args, "preview_method", preview.LatentPreviewMethod.Latent2RGB)
    previewer = preview.get_previewer(torch.device("cpu"), graph.model.model.latent_format)
    picture = torch.full((1, 3, 64, 64), -1.0)
    picture[0, 1, 3, 6] = 1.0
    _, image, _ = previewer.decode_latent_to_preview_image("JPEG", fold(picture))
    assert image.size == (64, 64)
    assert image.getpixel((6, 3)) == (0, 255, 0) and image.getpixel((3, 6)) == (0, 0, 0)


def test_a_batch_of_256_with_both_its_prompts_is_one_batch(graph):
    """ComfyUI's own estimate would be some 40 MiB a picture; measured are 0.6 to 1.0."""
    assert graph.model.model.memory_required([512, 48, 16, 16]) == 512 * 2**20


def test_multigpu_nodes_can_load_another_copy(graph):
    factory, arguments = graph.model.cached_patcher_init[:2]
    assert factory(*arguments).model is not graph.model.model


def test_unknown_words_are_named_and_the_known_ones_listed(graph):
    with pytest.raises(ValueError, match=r"does not know 'dragon', 'purple'; it knows the words a, the.*whale.*tent"):
        graph.text("a (dragon:1.3) and a purple cat")


def test_an_empty_prompt_is_no_caption(graph, book):
    for prompt in ("", " ", ",.()"):
        torch.testing.assert_close(graph.text(prompt)[0][0], contexts(book, [""]))


def test_a_prompt_of_hundreds_of_words_is_refused(graph):
    with pytest.raises(ValueError, match=rf"has 400 words; the picture book reads at most {MOST_WORDS}: shorten it"):
        graph.text("a tree " * 200)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e999"])
def test_a_weight_that_is_no_number_is_refused(graph, weight):
    with pytest.raises(ValueError, match=r"the weight of 'red cat' is -?(nan|inf): give a number"):
        graph.text(f"a (red cat:{weight})")


def test_other_encoding_nodes_and_fewer_layers_are_refused(graph):
    with pytest.raises(ValueError, match="has one prompt: use the node CLIP Text Encode"):
        graph.clip.encode_from_tokens({"l": [[(0, 1.0)]], "g": [[(0, 1.0)]]})
    last = graph.bench.stock.CLIPSetLastLayer().set_last_layer
    (same,) = last(graph.clip, -1)
    assert torch.equal(Graph(graph.bench, (None, same, None)).text("a park")[0][0], graph.text("a park")[0][0])
    (fewer,) = last(graph.clip, -2)
    with pytest.raises(ValueError, match=r"all layers of its text encoder: remove CLIP Set Last Layer \(-2\)"):
        Graph(graph.bench, (None, fewer, None)).text("a park")


@pytest.mark.parametrize("side", [32, 128, 512])
def test_other_sizes_are_refused(graph, side):
    with pytest.raises(ValueError, match=rf"`latent_image` is of {side}x{side} pixels.*draws 64x64: set width and"):
        graph.draw(latent=graph.empty(1, side))


def test_latents_of_another_model_are_refused(graph):
    foreign = {"samples": torch.ones(1, 4, 16, 16)}
    with pytest.raises(ValueError, match="`latent_image` has 4 channels, and the picture book's have 48: start from"):
        graph.draw(latent=foreign)
    with pytest.raises(ValueError, match=r"latent has 4 channels.*decode it with the VAE of the model that drew it"):
        graph.decode(foreign["samples"])


def test_text_of_another_clip_is_refused_by_name(graph):
    foreign = [[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 768)}]]
    with pytest.raises(ValueError, match=r"conditioning `negative` .*is 768 wide and not 128.*CLIP of Load Picture"):
        graph.draw(negative=foreign)
    with pytest.raises(ValueError, match="conditioning `positive` holds no text, so that it is not of the picture"):
        graph.draw(positive=[[None, {"pooled_output": None}]])


def test_missing_weights_name_the_file_and_the_remedy(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "SHIPPED_PICTURE_BOOK", tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors: reinstall DNG, or train it with `dng train`"):
        nodes.LoadPictureBook.execute()


def test_weights_of_another_version_are_refused(nodes, book, tmp_path, monkeypatch):
    info = PictureBookInfo(TEXT, SMALL, words=("a", "dragon"))
    save_picture_book(tmp_path / "other.safetensors", book.state_dict(), info)
    monkeypatch.setattr(nodes, "SHIPPED_PICTURE_BOOK", tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other words than this version of DNG has \(a, dragon\): take the weights"):
        nodes.LoadPictureBook.execute()
