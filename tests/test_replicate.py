"""Replicate's API with Replicate's own client, unmodified, against a real server and model."""

import io
import time
from typing import Any

import httpx2
import pytest
from PIL import Image
from replicate.client import Client
from replicate.exceptions import ModelError, ReplicateError

from app.local import LocalService

BRIEF = {"prompt": "a red apple", "num_inference_steps": 4, "seed": 7}
MODEL = "darkroom/emoji-sd"


@pytest.fixture
def client(service: LocalService) -> Client:
    return Client(api_token="none", base_url=service.url)


def opened(url: Any) -> Image.Image:
    return Image.open(io.BytesIO(httpx2.get(str(url)).content))


def ended(prediction: Any) -> Any:
    deadline = time.monotonic() + 60
    while prediction.status in ("starting", "processing"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
        prediction.reload()
    return prediction


def test_run_draws_with_another_base_url(client: Client):
    output: Any = client.run(MODEL, input={**BRIEF, "num_outputs": 2, "aspect_ratio": "16:9", "output_format": "webp"})
    assert [opened(url).size for url in output] == [(176, 96)] * 2
    assert opened(output[0]).format == "WEBP"


def test_a_version_is_run_as_well(client: Client):
    model = client.models.get(MODEL)
    version = model.latest_version
    assert version is not None
    assert model.versions.get(version.id).id == version.id
    assert [one.id for one in model.versions.list()] == [version.id]
    assert "prompt" in version.openapi_schema["components"]["schemas"]["Input"]["properties"]
    (url,) = client.run(f"{MODEL}:{version.id}", input=BRIEF)  # pyright: ignore[reportGeneralTypeIssues]
    assert opened(url).size == (128, 128)


def test_a_prediction_is_polled_and_says_how_far_it_is(client: Client, service: LocalService):
    prediction = client.predictions.create(model=MODEL, input={**BRIEF, "num_inference_steps": 30})
    assert prediction.status == "starting"
    seen = set[int]()
    while prediction.status in ("starting", "processing"):
        if (progress := prediction.progress) is not None:
            seen.add(progress.current)
            assert progress.total == 30
        time.sleep(0.02)
        prediction.reload()
    assert prediction.status == "succeeded"
    assert seen
    assert prediction.metrics
    assert prediction.metrics["predict_time"] > 0
    assert (prediction.input or {})["seed"] == 7
    ours = httpx2.get(f"{service.url}/v1/generations/{prediction.id}").json()
    assert ours["status"] == "succeeded"
    assert prediction.id in {one.id for one in client.predictions.list()}


def test_a_wait_that_is_over_leaves_it_to_be_polled(client: Client):
    prediction = client.predictions.create(
        model=MODEL, input={**BRIEF, "num_inference_steps": 100, "width": 256, "height": 256}, wait=1
    )
    assert prediction.status == "starting"
    prediction.cancel()
    assert ended(prediction).status == "canceled"
    prediction.cancel()  # again is no error


def test_a_stream_tells_how_it_goes(client: Client):
    prediction = client.predictions.create(model=MODEL, input={**BRIEF, "num_inference_steps": 20}, stream=True)
    told = [(str(event.event), event.data) for event in prediction.stream()]
    names = [name.rpartition(".")[2].lower() for name, _ in told]
    assert names[-1] == "done"
    assert names[-2] == "output"
    assert opened(told[-2][1]).size == (128, 128)


def test_a_picture_is_uploaded_and_repainted(client: Client, service: LocalService):
    out = io.BytesIO()
    Image.new("RGB", (128, 128), "teal").save(out, "PNG")
    out.seek(0)
    out.name = "teal.png"  # pyright: ignore[reportAttributeAccessIssue]
    output: Any = client.run(
        MODEL, input={**BRIEF, "image": out, "prompt_strength": 0.4}, file_encoding_strategy="base64"
    )
    assert len(output) == 1
    out.seek(0)
    file = client.files.create(out)
    assert httpx2.get(file.urls["get"]).content == out.getvalue()
    prediction = ended(client.predictions.create(model=MODEL, input={**BRIEF, "image": file.urls["get"]}))
    assert prediction.status == "succeeded"
    ours = httpx2.get(f"{service.url}/v1/generations/{prediction.id}").json()["parameters"]
    assert ours["task"] == "image-to-image"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"num_outputs": 1000}, "input.num_outputs"),
        ({"num_outputs": "many"}, "input.num_outputs"),
        ({"colour": "red"}, "input.colour"),
        ({"aspect_ratio": "wide"}, "input.aspect_ratio"),
        ({"aspect_ratio": "9" * 5000 + ":1"}, "input.aspect_ratio"),
        ({"image": "https://elsewhere.example/a.png"}, "input.image"),
        ({"image": "/v1/files/../../secret"}, "input.image"),
        ({"prompt_strength": 0.5}, "input.prompt_strength"),
    ],
)
def test_a_wrong_input_is_named(client: Client, given: dict[str, Any], field: str):
    with pytest.raises(ReplicateError) as refused:
        client.run(MODEL, input={**BRIEF, **given})
    assert refused.value.status == 422
    assert refused.value.detail is not None
    assert refused.value.detail.startswith(field)


def test_what_is_not_there_is_said(client: Client):
    with pytest.raises(ReplicateError, match="there is no model darkroom/nope"):
        client.run("darkroom/nope", input=BRIEF)
    with pytest.raises(ReplicateError, match="there is no"):
        client.predictions.create(version="0" * 64, input=BRIEF)


def test_what_is_not_heeded_is_in_the_logs(client: Client):
    prediction = client.predictions.create(model=MODEL, input={**BRIEF, "go_fast": True, "output_quality": 80})
    assert "input.go_fast is not heeded" in (prediction.logs or "")


def test_what_has_expired_is_an_error_to_their_client(client: Client, service: LocalService):
    held = httpx2.post(
        f"{service.url}/v1/generations",
        json={"prompt": "slow", "num_inference_steps": 100, "n": 8, "width": 256, "height": 256},
    ).json()
    with pytest.raises(ModelError):
        client.run(MODEL, input={**BRIEF, "num_inference_steps": 100, "expires_in": 1, "n": 8}, wait=False)
    httpx2.delete(f"{service.url}/v1/generations/{held['id']}")
