"""The recipes of the small models run, go on where they were stopped, and leave models that load."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.noised_clip import NoisedCLIP
from models.training import decoder, encode, noised_clip, prior
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
