"""Videos: a crowd draws what each pipeline of diffusers draws alone, and clients get a file that plays."""

import copy
import io
from functools import cache
from pathlib import Path
from typing import Any

import av
import httpx2
import numpy as np
import pytest
import torch
from diffusers import LTXImageToVideoPipeline
from PIL import Image
from torch import Tensor

from app.jobs import complete
from app.local import LocalService
from app.schemas import GenerationRequest, OutputFormat, Parameters
from models.catalog import CARDS, read_cards
from models.program import Inputs, generator
from models.video import Video
from tests import tiny
from tests.conftest import local_settings
from tests.test_journal import resumed_with_the_same_bytes
from tests.test_stable_diffusion import as_image, run_out
from workers.curve import warm_up
from workers.engine import Engine, Pass
from workers.videos import encode_video

ALL = {card.name: card for card in read_cards(CARDS) if card.video}
MAKERS: dict[str, Any] = {"wan21": tiny.wan, "ltx-video": tiny.ltx}
TOLERANCES = {"wan21": 6e-8, "ltx-video": 2e-6}  # of a pixel in [0, 1]; LTX reckons positions in float32
CASES = [(name, task) for name, card in ALL.items() for task in card.tasks]


@cache
def model(name: str) -> Video:
    """With random weights, in double precision, and of an ordinary size that is small."""
    card = ALL[name]
    size = card.size.model_copy(update={"width": 32, "height": 32, "minimum": 32})
    video = card.video and card.video.model_copy(update={"num_frames": card.video.multiple_of + 1})
    limits = card.limits.model_copy(update={"prompt_tokens": 16})
    pipeline: Any = MAKERS[name]()
    return Video(
        card.model_copy(update={"size": size, "video": video, "limits": limits}), pipeline.to(torch.float64), {}
    )


def asked(name: str, task: str = "text-to-video", **given: Any) -> tuple[Parameters, Inputs]:
    begins = task == "image-to-video"
    request = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 0, "task": task}
    r = GenerationRequest.model_validate(request | ({"image": "given"} if begins else {}) | given)
    return complete(r, model(name).card), Inputs(as_image(torch.rand(3, 32, 32)) if begins else None)


def alone(r: Parameters, inputs: Inputs) -> Tensor:
    pipeline: Any = model(r.model).pipelines["whole"]
    if r.kind == "image-to-video":
        pipeline = LTXImageToVideoPipeline.from_pipe(pipeline)
    pipeline = copy.copy(pipeline)
    pipeline.__dict__["scheduler"] = copy.deepcopy(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    own = {"image": inputs.image} if inputs.image else {}
    own |= {"frame_rate": r.fps} if r.model == "ltx-video" else {}
    output = pipeline(
        prompt=r.prompt,
        negative_prompt=r.negative_prompt or None,
        num_inference_steps=r.num_inference_steps,
        guidance_scale=r.guidance_scale,
        width=r.width,
        height=r.height,
        num_frames=r.num_frames,
        max_sequence_length=16,
        generator=generator(r.seed),
        output_type="pt",
        **own,
    )
    return output.frames[0].float()


@pytest.mark.parametrize(("name", "task"), CASES)
def test_a_crowd_draws_what_each_would_alone(name: str, task: str):
    passes, tickets = list[Pass](), list[Any]()
    engine = Engine(passes.append)
    longer = 2 * ALL[name].video.multiple_of + 1  # pyright: ignore[reportOptionalMemberAccess]
    mixed = (
        {},
        {"num_inference_steps": 5, "negative_prompt": "a dog"},
        {"guidance_scale": 1.0},
        {"num_frames": longer},
    )
    wanted = [asked(name, task, seed=seed, **given) for seed, given in enumerate(mixed)]
    for r, inputs in wanted:
        tickets.append(engine.submit(model(name).draw(r, r.seed, inputs)))
        engine.step()
    run_out(engine, *tickets)
    for ticket, (r, inputs) in zip(tickets, wanted, strict=True):
        expected = alone(r, inputs)
        assert expected.shape == (r.num_frames, 3, 32, 32)
        assert expected.std() > 0.01
        assert (ticket.result - expected).abs().max() <= TOLERANCES[name]
    assert max(one.calls for one in passes if one.net is model(name).denoiser) > 1


@pytest.mark.parametrize(("name", "task"), CASES)
def test_it_goes_on_with_the_same_bytes(name: str, task: str):
    resumed_with_the_same_bytes(model(name), *asked(name, task, reproducible=True))


@pytest.mark.parametrize("name", ALL)
def test_it_is_measured_before_its_first_request(name: str):
    assert len(warm_up(model(name), 2)) == 2


@pytest.mark.parametrize("name", ALL)
def test_steps_are_counted_and_the_middle_of_a_video_is_shown(name: str):
    engine = Engine()
    r, inputs = asked(name)
    ticket = engine.submit(model(name).draw(r, r.seed, inputs))
    seen, shown = list[Any](), list[Any]()
    while engine:
        seen.append(ticket.at)
        if ticket.estimate and (estimate := ticket.estimate()) is not None:
            shown.append(model(name).colours.paint(estimate).shape)
        engine.step()
    run_out(engine, ticket)
    assert [at for i, at in enumerate(seen) if at and at not in seen[:i]] == [(i, 3) for i in range(4)]
    assert name == "ltx-video" or set(shown) == {(4, 4, 3)}  # LTX holds its latents as a sequence


MOVING = np.zeros((9, 32, 48, 3), np.uint8)
for i in range(9):
    MOVING[i, :, 4 * i : 4 * i + 12] = (250, 200, 40)


def test_an_mp4_plays_what_was_drawn():
    data = encode_video(MOVING, "mp4", 12, "a lemon rolls")
    assert data == encode_video(MOVING, "mp4", 12, "a lemon rolls")
    with av.open(io.BytesIO(data)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate, stream.pix_fmt) == ("h264", 12, "yuv420p")
        assert file.metadata["comment"] == "a lemon rolls"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
    assert frames.shape == MOVING.shape
    assert np.abs(frames.astype(float) - MOVING).mean() < 12  # colour has half the resolution


@pytest.mark.parametrize("output_format", ["webp", "png", "avif"])
def test_an_animation_plays_what_was_drawn(output_format: OutputFormat):
    with Image.open(io.BytesIO(encode_video(MOVING, output_format, 10, "a lemon rolls"))) as image:
        assert image.n_frames == 9
        image.seek(8)
        image.load()
        assert image.info["duration"] == 100
        shown = np.asarray(image.convert("RGB")).astype(float)
    assert np.abs(shown - MOVING[8]).mean() < 12


@pytest.mark.parametrize(
    ("model", "given", "problem"),
    [
        ("wan21", {}, None),
        ("wan21", {"num_frames": 17, "fps": 8, "output_format": "webp"}, None),
        ("wan21", {"num_frames": 16}, ("num_frames", "must be one more than a multiple of 4 for wan21, not 16")),
        ("wan21", {"num_frames": 85}, ("num_frames", "85 is more than wan21 allows (81)")),
        ("wan21", {"output_format": "jpeg"}, ("output_format", "wan21 draws videos, which no jpeg holds")),
        ("wan21", {"image": "x"}, ("image", "wan21 does not do image-to-video")),
        ("wan21", {"task": "text-to-image"}, ("task", "wan21 does not do text-to-image")),
        ("ltx-video", {"image": "x"}, None),
        ("sdxl", {"num_frames": 9}, ("num_frames", "sdxl draws single pictures")),
        ("sdxl", {"fps": 9}, ("fps", "sdxl draws single pictures")),
        (
            "sdxl",
            {"output_format": "mp4"},
            ("output_format", "sdxl draws single pictures, and mp4 is for videos"),
        ),
        ("sdxl", {"task": "text-to-video"}, ("task", "sdxl does not do text-to-video")),
    ],
)
def test_what_goes_with_videos(model: str, given: Any, problem: tuple[str, str] | None):
    card = {card.name: card for card in read_cards(CARDS)}[model]
    request = GenerationRequest.model_validate({"prompt": "a cat", **given})
    assert list(card.problems(request)) == ([problem] if problem else [])


def test_what_is_left_open_of_a_video_is_decided():
    r = complete(GenerationRequest(prompt="a cat"), ALL["wan21"])
    assert (r.kind, r.num_frames, r.fps, r.output_format) == ("text-to-video", 81, 16, "mp4")


def test_a_client_gets_a_video_and_previews_of_it(tmp_path: Path):
    tiny.save(tiny.wan(), tmp_path / "weights")
    card = (CARDS / "wan21.toml").read_text()
    repository = 'kind = "hub"\nrepository = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"\nrevision = "main"'
    changes = {
        repository: f'kind = "folder"\npath = "{tmp_path / "weights"}"',
        'name = "wan21"': 'name = "tiny-video"',
        "width = 832": "width = 64",
        "height = 480": "height = 32",
        "minimum = 256": "minimum = 32",
        "num_frames = 81": "num_frames = 9",
        "prompt_tokens = 512": "prompt_tokens = 16",
        "memory_mib = 24000": "memory_mib = 100",
    }
    for before, after in changes.items():
        assert card.count(before) == 1, before
        card = card.replace(before, after)
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "tiny-video.toml").write_text(card)
    settings = local_settings(tmp_path / "data", models=("tiny-video",), cards_dir=tmp_path / "cards")
    with LocalService(settings) as service, httpx2.Client(base_url=service.url, timeout=60) as http:
        request = {"prompt": "a cat", "num_inference_steps": 4, "preview_every": 2, "seed": 3}
        wait = {"Prefer": "wait=60"}
        done = http.post("/v1/generations", json=request, headers=wait).json()
        assert done["status"] == "succeeded", done
        assert (done["parameters"]["task"], done["parameters"]["num_frames"]) == ("text-to-video", 9)
        (image,) = done["images"]
        assert (image["frames"], image["width"], image["height"]) == (9, 64, 32)
        file = http.get(image["url"])
        assert file.headers["content-type"] == "video/mp4"
        with av.open(io.BytesIO(file.content)) as video:
            assert len([*video.decode(video=0)]) == 9
            assert "Steps: 4" in video.metadata["comment"]
        preview = http.get(f"/v1/generations/{done['id']}/previews/0/2")
        assert Image.open(io.BytesIO(preview.content)).size == (64, 32)
        animated = http.post("/v1/generations", json=request | {"output_format": "webp"}, headers=wait).json()
        with Image.open(io.BytesIO(http.get(animated["images"][0]["url"]).content)) as animation:
            assert (animation.format, animation.n_frames) == ("WEBP", 9)
