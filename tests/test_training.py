"""The recipes of the small models run, go on where they were stopped, and leave models that load."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from safetensors.torch import save_file
from torch import Tensor

from models.catalog import WEIGHTS, Catalog
from models.ear import Ear
from models.noised_clip import NoisedCLIP
from models.scoring import Judge
from models.token_transformer import TokenTransformer
from models.training import base, classes, decoder, ear, encode, judge, noised_clip, prior, tokens, upsampler, vq
from models.training.scenes import World
from models.unclip import ImageProjection
from tests.test_stable_diffusion import threads

CAPTIONS = """
def sample_scene(rng, sprites):
    item = {"index": int(rng.integers(len(sprites))), "cx": 0.5, "cy": 0.5, "scale": 0.8}
    return {"caption": "a disc", "background": (0, 0, 255), "items": [item]}
"""
LOAD = """
import numpy as np
def load_sprites(folder):
    disc = np.zeros((2, 4, 128, 128), np.uint8)
    y, x = np.mgrid[:128, :128] - 63.5
    disc[:, :, x * x + y * y < 40 * 40] = np.array([255, 0, 0, 255], np.uint8)[:, None]
    return disc, [{"concept": 0}, {"concept": 1}]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A world of red discs on blue."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "captions.py").write_text(CAPTIONS)
    (folder / "load.py").write_text(LOAD)
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Encoded scenes of noise."""
    folder = tmp_path / "work"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(2, 640, 256, generator=rng), dim=-1).half()
    scenes = {
        "tokens": torch.randint(0, 4096, (640, 32), generator=rng).short(),
        "text": unit[0].clone(),
        "image": unit[1].clone(),
        "latents": torch.randn(640, 8, 16, 16, generator=rng).half(),
    }
    save_file(scenes, folder / "000001.safetensors")
    return folder


def run(main: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments), "--threads", "1"])
    with threads(torch.get_num_threads()):
        main()
    torch.set_default_device(None)


def test_a_scene_is_drawn_where_its_caption_says(data: Path):
    world = World(data)
    (picture,) = world.render(world.scenes(1, seed=1))
    assert picture[:, 64, 64].tolist() == pytest.approx([1, 0, 0], abs=0.02)
    assert picture[:, 2, 2].tolist() == pytest.approx([0, 0, 1], abs=0.02)


def test_scenes_are_encoded_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(encode, "SHARD", 4)
    monkeypatch.setattr(encode, "BATCH", 2)
    arguments = (data, tmp_path / "encoded", "--scenes", 8, "--latents")
    run(encode.main, monkeypatch, *arguments)
    run(encode.main, monkeypatch, *arguments)
    assert capsys.readouterr().out.count("4 scenes") == 2
    latents, image = encode.read(tmp_path / "encoded", "latents", "image")
    assert latents.shape == (8, 8, 16, 16)
    assert image.shape == (8, 256)
    assert latents.float().std() == pytest.approx(1, abs=0.8)


def test_the_prior_learns_and_goes_on(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(prior.main, monkeypatch, work, tmp_path / "prior", "--minutes", 0.02)
    steps = torch.load(work / "prior.state.pt", weights_only=True)["steps"]
    run(prior.main, monkeypatch, work, tmp_path / "prior", "--minutes", 0.02)
    assert torch.load(work / "prior.state.pt", weights_only=True)["steps"] > steps > 0
    assert prior.PriorTransformer.from_pretrained(tmp_path / "prior").config.num_layers == 4


def test_the_noised_clip_begins_with_what_clip_sees(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(noised_clip, "EXAMPLES", 20)
    run(noised_clip.main, monkeypatch, work, tmp_path / "noised", "--minutes", 0.02)
    trained = NoisedCLIP.from_pretrained(tmp_path / "noised")
    assert trained(torch.randn(2, 8, 16, 16), torch.tensor([10.0, 900.0])).shape == (2, 256)


def test_the_decoder_trains_nothing_but_its_projection(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoder, "HEAD_START", 2)
    monkeypatch.setattr(decoder, "BATCH", 4)
    run(decoder.main, monkeypatch, work, tmp_path / "projection", "--minutes", 0.02)
    trained = ImageProjection.from_pretrained(tmp_path / "projection")
    assert trained(torch.zeros(1, 256)).equal(trained.nothing[None])


# -- of pixels


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    """Encoded scenes, of noise, for the models that draw pixels."""
    folder = tmp_path / "pixels"
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    scenes = {
        "pixels": torch.randint(0, 256, (130, 3, 128, 128), generator=rng).byte(),
        "text": torch.nn.functional.normalize(torch.randn(130, 256, generator=rng), dim=-1).half(),
        "context": torch.randn(130, 32, 256, generator=rng).half(),
        "meaning": torch.randn(130, 32, 384, generator=rng).half(),
        "tokens": torch.randint(0, 4096, (130, 32), generator=rng).short(),
        "latents": torch.randn(130, 8, 16, 16, generator=rng).half(),
    }
    save_file(scenes, folder / "000001.safetensors")
    return folder


def test_scenes_are_encoded_as_pixels_and_what_their_captions_mean(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(encode, "SHARD", 2)
    monkeypatch.setattr(encode, "BATCH", 2)
    run(encode.main, monkeypatch, data, tmp_path / "encoded", "--scenes", 2, "--pixels")
    pixels, context, meaning = encode.read(tmp_path / "encoded", "pixels", "context", "meaning")
    assert pixels[0, :, 64, 64].tolist() == pytest.approx([255, 0, 0], abs=5)
    assert context.shape == (2, 32, 256)
    assert meaning.shape == (2, 32, 384)
    assert not meaning[:, -1].any()  # no caption is as long as that


def test_the_pixel_model_begins_with_the_latent_one(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "EXAMPLES", 20)
    monkeypatch.setattr(base, "BATCH", 2)
    run(base.main, monkeypatch, pixels, tmp_path / "glide", "--minutes", 0.02)
    run(base.main, monkeypatch, pixels, tmp_path / "more", "--begin", tmp_path / "glide", "--minutes", 0.02)
    first, second = (UNet2DConditionModel.from_pretrained(tmp_path / name) for name in ("glide", "more"))
    assert first.config.in_channels == second.config.in_channels == 112


def test_the_judge_learns_from_drawings_that_a_class_names(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    classes = Catalog.read(["emoji-classes"])["emoji-classes"].classes
    sprites = [{"name": f"red {name}", "synonyms": [], "colors": ["red"]} for name in classes[1:]]
    sprites.append({"name": "hound", "synonyms": [classes[0]], "colors": []})
    own = judge.drawings(SimpleNamespace(sprites=sprites), classes)
    assert own[0] == [len(classes) - 1]
    assert own[1:] == [[i] for i in range(len(classes) - 1)]
    monkeypatch.setattr(judge, "BATCH", 4)
    monkeypatch.setattr(judge, "drawings", lambda world, classes: [[0, 1]] * len(classes))
    (tmp_path / "work").mkdir()
    run(judge.main, monkeypatch, data, tmp_path / "work", tmp_path / "judge", "--minutes", 0.02)
    assert Judge(tmp_path / "judge").classes == classes


def test_the_class_conditional_denoiser_is_told_classes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classes, "EACH", 1)
    monkeypatch.setattr(classes, "BATCH", 2)
    monkeypatch.setattr(classes, "drawings", lambda world, names: [[0, 1]] * len(names))
    (tmp_path / "work").mkdir()
    run(classes.main, monkeypatch, data, tmp_path / "work", tmp_path / "classes", "--minutes", 0.02)
    trained = UNet2DConditionModel.from_pretrained(tmp_path / "classes")
    told = torch.tensor([0, 59])
    assert trained(torch.randn(2, 8, 16, 16), 500, None, class_labels=told).sample.shape == (2, 8, 16, 16)


def test_the_ear_learns_what_the_text_encoder_says(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ear, "BATCH", 4)
    monkeypatch.setattr(ear, "JUDGED", 10)
    run(ear.main, monkeypatch, pixels, tmp_path / "ear", "--minutes", 0.02)
    words = torch.randn(2, 32, 384)
    with torch.no_grad():
        assert Ear.from_pretrained(tmp_path / "ear")(words).shape == (2, 32, 256)


@pytest.mark.parametrize("kind", ["dalle", "parti"])
def test_transformers_learn_the_codes_of_the_autoencoder(
    kind: str, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vq, "CODES", 16)
    monkeypatch.setattr(vq, "BATCH", 2)
    monkeypatch.setattr(tokens, "BATCH", 2)
    for _ in range(2):  # going on, it keeps its language
        run(vq.main, monkeypatch, pixels, tmp_path / "vq", "--minutes", 0.01)
    pictures: Any = VQModel.from_pretrained(tmp_path / "vq")
    told = ["--model", kind, "--vq", tmp_path / "vq", "--minutes", 0.02]
    run(tokens.main, monkeypatch, pixels, tmp_path / kind, *told)
    writer: Any = TokenTransformer.from_pretrained(tmp_path / kind)
    assert writer.code.num_embeddings == len(pictures.quantize.embedding.weight) + 1 == 17


def test_the_codebook_stays_when_its_decoder_learns_on(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vq, "CODES", 16)
    monkeypatch.setattr(vq, "BATCH", 2)
    books = list[Tensor]()
    for _ in range(2):
        run(vq.main, monkeypatch, pixels, tmp_path / "vq", "--minutes", 0.01)
        made: Any = VQModel.from_pretrained(tmp_path / "vq")
        books.append(made.quantize.embedding.weight.clone())
    assert torch.equal(*books)


def test_the_discrete_autoencoder_sees_what_the_continuous_one_sees():
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    old: Any = AutoencoderKL.from_pretrained(WEIGHTS / "emoji-sd" / "vae")
    new: Any = vq.begin(torch.randn(16, 8))
    with torch.no_grad():
        latents = old.encode(picture).latent_dist.mean * old.config.scaling_factor
        torch.testing.assert_close(new.encode(picture).latents, latents, rtol=1e-3, atol=1e-3)
        drawn = new.decode(latents, force_not_quantize=True).sample
        torch.testing.assert_close(drawn, old.decode(latents / old.config.scaling_factor).sample, rtol=1e-3, atol=1e-3)


def test_each_code_is_the_mean_of_the_latents_that_it_is_nearest_to():
    latents = torch.randn(3, 2).repeat(100, 1) * 10 + 0.1 * torch.randn(300, 2)
    found = vq.means(latents, 3)
    own = vq.nearest_of(latents, found)
    for code in own.unique():
        torch.testing.assert_close(found[code], latents[own == code].mean(0), rtol=1e-3, atol=1e-3)


def test_the_upsampler_learns_windows(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(upsampler, "BATCH", 2)
    run(upsampler.main, monkeypatch, pixels, tmp_path / "upsampler", "--minutes", 0.02)
    assert UNet2DModel.from_pretrained(tmp_path / "upsampler").config.in_channels == 96


def test_what_a_small_picture_shows_is_the_same_part(pixels: Path):
    (pictures,) = encode.read(pixels, "pixels")
    large, blurred = upsampler.windows(pictures[:3])
    assert large.shape == blurred.shape == (3, 3, 64, 64)
    shrunk, expected = (torch.nn.functional.avg_pool2d(x, 8) for x in (blurred, large))
    assert (shrunk - expected).abs().mean() < 0.1 * expected.std()


def test_the_noised_clip_of_pixels_sees_what_clip_sees(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(noised_clip.main, monkeypatch, pixels, tmp_path / "noised", "--pixels", "--minutes", 0.02)
    trained = NoisedCLIP.from_pretrained(tmp_path / "noised")
    assert trained(torch.randn(2, 3, 64, 64), torch.tensor([10.0, 900.0])).shape == (2, 256)
