"""`/v1/evaluations`: a suite of prompts over several models, through the queue, judged by a process of its own."""

import io
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from app.local import LocalService
from tests.conftest import local_settings

URL = "/v1/evaluations"
BRIEF = {"models": ["emoji-sd"], "num_inference_steps": 6}
TWO = [
    {"category": "colours", "prompt": "a red apple on a blue background"},
    {"category": "things", "prompt": "a penguin"},
]


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    settings = local_settings(tmp_path_factory.mktemp("evaluating"), models=("emoji-sd", "emoji-classes"))
    with LocalService(settings, evaluates=True) as service:
        yield service


@pytest.fixture
def http(evaluating: LocalService) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=evaluating.url, timeout=60) as client:
        yield client


def submitted(http: httpx2.Client, **given: Any) -> str:
    answer = http.post(URL, json=BRIEF | given)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"{URL}/{answer.json()['id']}"
    return answer.json()["id"]


def until(http: httpx2.Client, id: str, seconds: float, *statuses: str, done: int = 0) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        shown = http.get(f"{URL}/{id}").json()
        if shown["status"] in statuses and shown["pictures"]["done"] >= done:
            return shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.1)


def generations(http: httpx2.Client, prompt: str) -> list[dict[str, Any]]:
    found = http.get("/v1/generations", params={"limit": 100}).json()["data"]
    return [one for one in found if one["parameters"]["prompt"] == prompt]


def test_a_suite_is_drawn_judged_and_shown(http: httpx2.Client):
    id = submitted(http, prompts=TWO)
    done = until(http, id, 120, "succeeded", "failed")
    assert done["status"] == "succeeded", done
    assert done["pictures"] == {"done": 2, "of": 2}
    assert [(one["model"], one["category"]) for one in done["scores"]] == [
        ("emoji-sd", category) for category in ("colours", "things", "all")
    ]
    assert all(one["found"] == 1.0 for one in done["scores"])
    assert {one["priority"] for one in (it["parameters"] for it in generations(http, "a penguin"))} == {"low"}

    sheet = http.get(done["sheet"])
    assert sheet.headers["content-type"].startswith("text/html")
    assert "script" not in sheet.headers["content-security-policy"]
    assert 'src="emoji-sd-001.png"' in sheet.text
    picture = http.get(done["sheet"].replace("index.html", "emoji-sd-001.png"))
    assert Image.open(io.BytesIO(picture.content)).size == (128, 128)
    assert http.get(done["sheet"].replace("index.html", "scores.json")).json() == done["scores"]
    assert http.get(done["sheet"].replace("index.html", "emoji-sd-007.png")).status_code == 404


@pytest.mark.parametrize(
    ("given", "field", "what"),
    [
        ({"suite": "nope"}, "suite", "there is no suite 'nope'"),
        ({"suite": "../../etc/passwd.toml"}, "suite", "there is no suite"),
        ({"prompts": TWO, "models": ["emoji-sd", "nope"]}, "models.1", "there is no 'nope'"),
        ({"prompts": TWO, "models": ["emoji-classes"]}, "models.0", "classes, such as"),
        ({"prompts": TWO, "num_inference_steps": 100_000}, "num_inference_steps", "more than emoji-sd allows"),
        ({"prompts": [{"category": "a"}]}, "prompts.0.prompt", "required"),
        ({"prompts": [{"category": "a", "prompt": " "}]}, "prompts.0.prompt", "at least 1 character"),
        ({}, "prompts", "give either"),
        ({"prompts": TWO, "suite": "emoji"}, "prompts", "give either"),
    ],
)
def test_a_wrong_field_is_named(http: httpx2.Client, given: dict[str, Any], field: str, what: str):
    answer = http.post(URL, json=BRIEF | given)
    assert answer.status_code == 422, answer.text
    (error,) = answer.json()["errors"]
    assert error["field"] == field
    assert what in error["detail"]


def test_what_nobody_asked_for_is_not_found(http: httpx2.Client):
    generation = http.post("/v1/generations", json={"prompt": "a cat", "num_inference_steps": 1}).json()["id"]
    for id in ("0" * 32, "nope", generation):  # a generation is none
        assert http.get(f"{URL}/{id}").status_code == 404
        assert http.delete(f"{URL}/{id}").status_code == 404
    assert http.get(f"/v1/generations/{submitted(http, prompts=TWO)}").status_code == 404


def test_it_is_canceled_with_what_it_draws(http: httpx2.Client):
    many = [{"category": "many", "prompt": f"a boat, the {i}th"} for i in range(40)]
    id = submitted(http, prompts=many, num_inference_steps=50)
    until(http, id, 60, "running", done=1)
    assert http.delete(f"{URL}/{id}").json()["status"] == "canceled"
    assert http.delete(f"{URL}/{id}").json()["status"] == "canceled"
    deadline = time.monotonic() + 30
    while statuses := {one["status"] for i in range(40) for one in generations(http, many[i]["prompt"])}:
        if not statuses & {"queued", "running"}:
            break
        assert time.monotonic() < deadline, statuses
        time.sleep(0.2)
    assert "canceled" in statuses
    shown = http.get(f"{URL}/{id}").json()
    assert (shown["status"], shown["scores"], shown["sheet"]) == ("canceled", [], None)


def interrupted(evaluating: LocalService, http: httpx2.Client, how: signal.Signals, prompt: str) -> None:
    """Its process ends in the middle; the next goes on, and nothing is drawn twice."""
    many = [{"category": "many", "prompt": f"{prompt}, the {i}th"} for i in range(12)]
    id = submitted(http, prompts=many)
    until(http, id, 60, "running", done=2)
    part = evaluating.parts["evaluator"]
    part.process.send_signal(how)
    part.process.wait(30)
    part.start()
    done = until(http, id, 200, "succeeded", "failed")
    assert done["status"] == "succeeded", done
    assert [len(generations(http, one["prompt"])) for one in many] == [1] * 12
    assert http.delete(f"{URL}/{id}").status_code == 409


def test_it_goes_on_when_its_process_is_stopped(evaluating: LocalService, http: httpx2.Client):
    interrupted(evaluating, http, signal.SIGTERM, "a tree")


@pytest.mark.long
def test_it_goes_on_when_its_process_is_killed(evaluating: LocalService, http: httpx2.Client):
    interrupted(evaluating, http, signal.SIGKILL, "a lemon")
