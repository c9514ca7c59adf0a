"""OpenAI's Images API with OpenAI's own clients, unmodified, against a real server and model."""

import base64
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from PIL import Image

from app.local import LocalService
from tests.conftest import local_settings

OLDER = Path(__file__).parents[1] / ".venv" / "openai-1"  # where `make setup` puts the last client of the first version
BRIEF = {"num_inference_steps": 4}


@pytest.fixture
def client(service: LocalService) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def decoded(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def png(colour: Any = "red", size: tuple[int, int] = (128, 128), mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, "PNG")
    return out.getvalue()


def generation(service: LocalService, id: str) -> dict[str, Any]:
    return httpx2.get(f"{service.url}/v1/generations/{id}").json()


# -- generations


def test_a_script_for_openai_draws_with_another_base_url(client: OpenAI, service: LocalService):
    made: Any = client.images.generate(
        model="gpt-image-1",
        prompt="a red apple",
        n=2,
        size="1024x1024",
        quality="low",
        user="ada",
        extra_body={"seed": 7},
    )
    assert [decoded(one.b64_json).size for one in made.data] == [(128, 128)] * 2
    assert (made.size, made.quality, made.output_format, made.background) == ("128x128", "low", "png", "opaque")
    assert [one.seed for one in made.data] == [7, 8]
    ours = generation(service, made.data[0].job_id)
    assert ours["parameters"]["metadata"] == {"user": "ada"}
    assert ours["parameters"]["num_inference_steps"] == 10  # half of the usual


def test_the_same_seed_gives_the_picture_that_our_own_api_gives(client: OpenAI, service: LocalService):
    request = {"seed": 11, "negative_prompt": "blue", "reproducible": True, **BRIEF}
    made = client.images.generate(prompt="a dog", size="64x64", extra_body=request)
    ours = httpx2.post(
        f"{service.url}/v1/generations",
        json={"prompt": "a dog", "width": 64, "height": 64, **request},
        headers={"Prefer": "wait=60"},
        timeout=90,
    ).json()
    picture = httpx2.get(service.url + ours["images"][0]["url"]).content
    assert sha256(base64.b64decode(made.data[0].b64_json or "")).digest() == sha256(picture).digest()  # pyright: ignore[reportOptionalSubscript]


def test_a_url_is_fetched_by_whoever_has_it(client: OpenAI):
    made: Any = client.images.generate(model="dall-e-3", prompt="a dog", output_format="webp", extra_body=BRIEF)
    file = httpx2.get(made.data[0].url)
    assert Image.open(io.BytesIO(file.content)).format == "WEBP"


@pytest.mark.parametrize(
    ("asked", "drawn"), [("auto", (128, 128)), ("1536x1024", (160, 112)), ("64x96", (64, 96)), ("1x4000", (64, 256))]
)
def test_a_size_becomes_one_that_the_model_draws(client: OpenAI, asked: Any, drawn: tuple[int, int]):
    made: Any = client.images.generate(prompt="a dog", size=asked, extra_body={"num_inference_steps": 1})
    assert decoded(made.data[0].b64_json).size == drawn
    assert made.size == f"{drawn[0]}x{drawn[1]}"


def test_what_is_not_heeded_is_said(client: OpenAI):
    made: Any = client.images.generate(prompt="a dog", style="vivid", moderation="low", extra_body=BRIEF)
    assert made.warnings == ["style is not heeded", "moderation is not heeded"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"model": "midjourney"}, "model"),
        ({"n": 1000}, "n"),
        ({"n": 0}, "n"),
        ({"size": "large"}, "size"),
        ({"size": "0x64"}, "size"),
        ({"background": "transparent"}, "background"),
        ({"quality": "superb"}, "quality"),
        ({"extra_body": {"colour": "red"}}, "colour"),
        ({"extra_body": {"seed": "seven"}}, "seed"),
        ({"extra_body": {"guidance": {"classifier": 3}}}, "guidance.classifier"),
        ({"extra_body": {"image": "x"}}, "image"),
        ({"extra_body": {"metadata": "x"}, "user": "ada"}, "metadata"),
        ({"extra_body": {"num_inference_steps": "x"}, "stream": True, "partial_images": 1}, "quality"),
        ({"partial_images": -1, "stream": True}, "partial_images"),
    ],
)
def test_a_wrong_field_is_told_in_openais_way(client: OpenAI, given: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(**{"prompt": "a dog", **given})
    assert (refused.value.param, refused.value.code, refused.value.type) == (
        param,
        "invalid_value",
        "invalid_request_error",
    )


@pytest.mark.parametrize(
    ("body", "kind"), [(b"{", "application/json"), (b"[]", "application/json"), (b"a=b", "text/plain")]
)
def test_a_body_that_is_none_is_told_in_openais_way(service: LocalService, body: bytes, kind: str):
    url = f"{service.url}/v1/images/generations"
    answer = httpx2.post(url, content=body, headers={"Content-Type": kind})
    assert answer.status_code in (400, 415)
    assert answer.json()["error"]["message"]


def test_a_second_try_gets_what_the_first_one_began(service: LocalService):
    """The client's own retries: it sends the same body again, and says that it does."""
    url, body = f"{service.url}/v1/images/generations", {"prompt": "a penguin", "size": "64x64", **BRIEF}
    tries = [
        httpx2.post(url, json=body, headers={"x-stainless-retry-count": count}, timeout=90).json()["data"][0]["job_id"]
        for count in ("0", "1", "2", "0")
    ]
    assert tries[0] == tries[1] == tries[2] != tries[3]


def test_a_client_whose_wait_is_over_asks_again_and_nothing_is_drawn_twice(tmp_path: Path):
    settings = local_settings(tmp_path, max_wait=1, models=("emoji-sd",))
    with LocalService(settings) as slow, OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=20) as patient:
        made: Any = patient.images.generate(prompt="a dog", n=2, size="128x128", extra_body={"num_inference_steps": 50})
        assert len(made.data) == 2
        assert len(httpx2.get(f"{slow.url}/v1/generations").json()["data"]) == 1


# -- streams


def test_a_stream_shows_it_on_its_way(client: OpenAI):
    stream = client.images.generate(
        prompt="a red apple", stream=True, partial_images=2, size="128x128", extra_body={"num_inference_steps": 12}
    )
    *partial, last = list(stream)
    assert [one.type for one in partial] == ["image_generation.partial_image"] * 2
    assert [one.partial_image_index for one in partial] == [0, 1]  # pyright: ignore[reportAttributeAccessIssue]
    assert last.type == "image_generation.completed"
    assert last.size == "128x128"
    shown = [decoded(one.b64_json).resize((128, 128)).convert("RGB") for one in (*partial, last)]
    assert len({picture.tobytes() for picture in shown}) == 3


def test_a_stream_without_partial_images_has_the_last_one(client: OpenAI):
    (only,) = list(client.images.generate(prompt="a dog", stream=True, extra_body=BRIEF))
    assert only.type == "image_generation.completed"


def test_a_generation_that_is_canceled_ends_its_stream_with_an_error(client: OpenAI, service: LocalService):
    stream = client.images.generate(
        prompt="a slow one", stream=True, partial_images=3, size="256x256", extra_body={"num_inference_steps": 100}
    )
    next(iter(stream))
    listed = httpx2.get(f"{service.url}/v1/generations").json()["data"]
    id = next(one["id"] for one in listed if one["parameters"]["prompt"] == "a slow one")
    httpx2.delete(f"{service.url}/v1/generations/{id}")
    with pytest.raises(openai.APIError, match="canceled"):
        list(stream)


# -- edits and variations


def test_an_edit_repaints_what_is_transparent(client: OpenAI):
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (64, 0, 128, 128))
    out = io.BytesIO()
    mask.save(out, "PNG")
    made = client.images.edit(
        image=("a.png", png("blue"), "image/png"),
        mask=("m.png", out.getvalue(), "image/png"),
        prompt="a red background",
        extra_body={"seed": 3, "num_inference_steps": 12},
    )
    picture = decoded(made.data[0].b64_json).convert("RGB")  # pyright: ignore[reportOptionalSubscript]
    kept = [picture.getpixel((x, y)) for x in (4, 50) for y in (4, 100)]
    assert all(b > 200 and r < 60 and g < 60 for r, g, b in kept)  # pyright: ignore[reportGeneralTypeIssues]
    assert any(picture.getpixel((x, y)) != (0, 0, 255) for x in (80, 120) for y in (10, 64, 110))


def test_an_edit_without_a_mask_starts_from_the_picture(client: OpenAI, service: LocalService):
    made: Any = client.images.edit(
        image=[("a.png", png("green"), "image/png")], prompt="a dog", n=2, extra_body={"strength": 0.5, **BRIEF}
    )
    ours = generation(service, made.data[0].job_id)["parameters"]
    assert (ours["task"], ours["strength"], ours["n"]) == ("image-to-image", 0.5, 2)


def test_an_edit_streams_too(client: OpenAI):
    stream = client.images.edit(
        image=("a.png", png("green"), "image/png"),
        prompt="a dog",
        stream=True,
        partial_images=1,
        extra_body={"num_inference_steps": 20},
    )
    assert [one.type for one in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_variation_is_drawn_by_a_model_that_can(client: OpenAI, service: LocalService):
    made: Any = client.images.create_variation(
        image=("a.png", png("red"), "image/png"), n=2, response_format="b64_json"
    )
    assert len(made.data) == 2
    assert made.model == "emoji-unclip"
    assert generation(service, made.data[0].job_id)["parameters"]["task"] == "variation"


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({}, "image"),
        ({"image": ("a.txt", b"not a picture", "text/plain")}, "image"),
        (
            {
                "image": ("a.png", png(), "image/png"),
                "mask": ("m.png", png(size=(64, 64), mode="L", colour=255), "image/png"),
            },
            "mask",
        ),
    ],
)
def test_a_wrong_upload_is_told_in_openais_way(service: LocalService, files: dict[str, Any], param: str):
    url = f"{service.url}/v1/images/edits"
    answer = httpx2.post(url, files={"prompt": (None, "a dog"), **files})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_two_pictures_at_once_are_refused(client: OpenAI):
    with pytest.raises(openai.BadRequestError, match="one picture can be worked on, not 2"):
        client.images.edit(image=[("a.png", png(), "image/png"), ("b.png", png(), "image/png")], prompt="a dog")


# -- models and keys


def test_models_are_listed_for_openais_client_as_well(client: OpenAI):
    assert [one.id for one in client.models.list()][:2] == ["emoji-sd", "emoji-unclip"]
    assert client.models.retrieve("emoji-sd").id == "emoji-sd"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")


# -- the client of yesterday

SCRIPT = """
import base64, sys
from openai import OpenAI, VERSION
assert VERSION == "1.109.1", VERSION
client = OpenAI(base_url=sys.argv[1], api_key="none")
made = client.images.generate(model="dall-e-3", prompt="a red apple", size="1024x1024", response_format="b64_json")
picture = base64.b64decode(made.data[0].b64_json)
kinds = [e.type for e in client.images.generate(prompt="a dog", stream=True, partial_images=1)]
varied = client.images.create_variation(image=("a.png", picture, "image/png"), n=1)
edited = client.images.edit(image=("a.png", picture, "image/png"), prompt="a dog", response_format="b64_json")
print(len(picture) > 1000, kinds[-1], bool(varied.data[0].b64_json), bool(edited.data[0].b64_json))
"""


def test_the_last_client_of_the_first_version_works_as_well(service: LocalService):
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, f"{service.url}/v1"],
        env=os.environ | {"PYTHONPATH": str(OLDER)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.stdout.split() == ["True", "image_generation.completed", "True", "True"], ran.stderr
