"""Whatever a client sends, the answer is one that the OpenAPI document lists: schemathesis asks, over HTTP.

Of each operation it sends what the document allows and what it forbids, first systematically ("coverage"), then at
random ("fuzzing"), and checks each answer: no 5xx, a documented status, media type, headers and body; what is forbidden
is refused, what is allowed is not; other methods get 405; without a key nothing is told.

It never sees a full queue (a documented 503) or a body above the limit (413): test_bad_input.py does. Nor does it
listen to generations that have not ended: their streams do not end either.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CheckContext
from schemathesis.config import SchemathesisConfig
from schemathesis.core.transport import Response
from schemathesis.schemas import BaseSchema

from app.local import LocalService
from app.main import create_app
from app.schemas import Guidance
from tests.conftest import local_settings
from tests.test_bad_input import GOOD, NOBODY, URL, picture

BEARER = {"Authorization": "Bearer the only key"}
KEYS = (("ann", hashlib.sha256(b"the only key").hexdigest()),)

CANCELED, EXPIRED, PNG, AVIF = "ca" * 16, "e0" * 16, "d0" * 16, "af" * 16  # stand for ids that services give
ETAG = "the etag of a picture"

Names = dict[str, str]  # what a service calls what it has: put into the cases for the words above
Service = tuple[str, Names]  # its URL and its names


def document(**given: object) -> dict[str, Any]:
    """As a service of these settings serves it; schemathesis needs it before any test has started one."""
    with TemporaryDirectory() as nowhere:
        return create_app(local_settings(Path(nowhere), **given), "redis://nobody").openapi()


def asking(document: dict[str, Any], ids: list[str]) -> BaseSchema:
    """What to ask: mostly with ids that there are, of sizes that the model can draw."""
    mostly: dict[str, list[str | int | float]] = {
        "path.id": [*ids, *ids, NOBODY],
        "path.number": [0],
        "path.step": [2],
        "path.name": ["emoji-sd"],
        "query.cursor": [*ids, NOBODY],
        "query.model": ["emoji-sd"],
        "header.Idempotency-Key": ["first", "second"],
        "header.Range": ["bytes=0-9", "bytes=-9", "bytes=9999999-", "lines=1-2"],
        "header.If-None-Match": ['"other"', '"another"', f'W/"other", {ETAG}'],
        "header.If-Range": [ETAG],
        "header.Last-Event-ID": ["0-0", "9999999999999-0"],
        "body.model": ["emoji-sd"],
        "body.n": [1, 8],
        "body.width": [64, 128],
        "body.height": [64, 128],
        "body.num_inference_steps": [1, 100],
        "body.guidance_scale": [0, 3.5],
        "body.scheduler": ["dpmpp_2m", "ddim"],
        "body.image": [picture(), f"data:image/png;base64,{picture()}"],
        "body.mask": [picture(), picture((64, 48))],
        "body.url": ["https://example.com/", "http://127.0.0.1/"],
    }
    words = {name.partition(".")[2].lower(): {"values": values} for name, values in mostly.items()}
    chosen = {name: {"dictionary": name.partition(".")[2].lower(), "probability": 0.8} for name in mostly}
    # Each costs the second that the service is told to wait at most.
    words["prefer"] = {"values": ["wait=1", "respond-async, wait=60"]}
    chosen["header.prefer"] = {"dictionary": "prefer", "probability": 0.05}
    config = {
        "request-timeout": 20,
        "generation": {"deterministic": True},
        "dictionaries": words,
        "parameters": chosen,
        # What the schema allows, the card of a model may not: `what_a_model_narrows` looks which fields it refuses.
        "operations": [
            {"include-name": f"POST {URL}", "checks": {"positive_data_acceptance": also(422)}},
            {"include-name": "POST /v1/evaluations", "checks": {"positive_data_acceptance": also(422)}},
            {"include-path-regex": "images|previews", "checks": {"positive_data_acceptance": also(416)}},
            # It reads each event of a stream by the schema of the stream, as in OpenAPI 3.2; ours is 3.1.
            {"include-path-regex": "events$", "checks": {"response_schema_conformance": {"enabled": False}}},
        ],
    }
    return schemathesis.openapi.from_dict(document, config=SchemathesisConfig.from_dict(config))


def also(status: int) -> dict[str, list[str]]:
    return {"expected-statuses": ["2xx", "304", "401", "404", "409", str(status)]}


locked = asking(document(api_keys=KEYS), [CANCELED, EXPIRED])
drawn = asking(document(), [PNG, AVIF]).exclude(method="POST")  # nothing new: a worker would draw it


# -- the services, and what there is in them


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of one key, without workers; its queue is never full."""
    given = local_settings(tmp_path_factory.mktemp("with keys"), api_keys=KEYS, max_wait=1, max_queued=100_000)
    with (
        LocalService(given, workers=0) as service,
        httpx2.Client(base_url=service.url, headers=BEARER, timeout=30) as client,
    ):
        assert client.get("/openapi.json").json() == locked.raw_schema
        canceled = client.post(URL, json=GOOD).json()["id"]
        client.delete(f"{URL}/{canceled}")
        expired = client.post(URL, json=GOOD | {"expires_in": 1}).json()["id"]
        sleep(1.1)
        yield service.url, {CANCELED: canceled, EXPIRED: expired}


@pytest.fixture(scope="module")
def with_pictures(service: LocalService) -> Service:
    """A service without keys that has drawn something."""
    with httpx2.Client(base_url=service.url, headers={"Prefer": "wait=30"}, timeout=60) as client:
        assert client.get("/openapi.json").json() == drawn.raw_schema
        request = GOOD | {"n": 2, "num_inference_steps": 6, "preview_every": 2}
        png, avif = (client.post(URL, json=request | {"output_format": kind}).json() for kind in ("png", "avif"))
        etag = client.get(png["images"][0]["url"]).headers["etag"]
    return service.url, {PNG: png["id"], AVIF: avif["id"], ETAG: etag}


# -- asking


reached: dict[str, set[int]] = defaultdict(set)  # the statuses that each operation has answered
asked = 0

BY_TASK = (
    "task",
    "image",
    "mask",
    "strength",
    "end_prompt",
    "end_image",
    "mix",
    "control_image",
    "control_scale",
    "ip_adapter_image",
    "ip_adapter_scale",
    "guidance",
)
"""What goes together or does not: a random pick of them is nearly always refused."""


def is_positive(case: schemathesis.Case) -> bool:
    return bool(case.meta and case.meta.generation.mode.is_positive)


def what_a_model_narrows(ctx: CheckContext, response: Response, case: schemathesis.Case) -> None:
    """A well-formed request is refused for what its model cannot do, or what does not go together."""
    if is_positive(case) and response.status_code == 422 and case.method == "POST":
        fields = {error["field"] for error in response.json().get("errors", [{"field": "Idempotency-Key"}])}
        narrowed = {"model", "n", "best_of", "width", "height", "num_inference_steps", "guidance_scale", "scheduler"}
        narrowed |= {
            "num_frames",
            "fps",
            "output_format",
            "webhook.url",
            "suite",
            "prompts",
            *(f"models.{i}" for i in range(16)),
        }
        together = {*BY_TASK, "prompt", "negative_prompt"}
        steering = {f"guidance.{name}" for name in Guidance.model_fields}
        worn = {f"loras.{i}.name" for i in range(4)} | {f"prompts.{i}.prompt" for i in range(100)}  # of spaces only
        assert fields <= narrowed | together | steering | worn | {"Idempotency-Key"}, fields


def ask(case: schemathesis.Case, service: Service, headers: dict[str, str] | None = None) -> int:
    """Send it, check the answer, and return its status."""
    global asked
    url, names = service
    for values in (case.path_parameters, case.query, case.headers):
        for name, value in values.items():
            for word, meant in names.items() if isinstance(value, str) else ():
                values[name] = value = value.replace(word, meant)
    if asked % 2 and case.method == "POST" and is_positive(case) and isinstance(case.body, dict):
        kept = {name: value for name, value in case.body.items() if name not in (*BY_TASK, "loras")}
        case.body = kept | {"prompt": "a dog"}
    answer = case.call(url, headers=headers)
    if (answer.status_code, answer.content) == (400, b"Invalid HTTP request received."):
        return 400  # such as an empty Content-Length: no HTTP, and nothing that the application sees
    case.validate_response(answer, headers=headers, additional_checks=[what_a_model_narrows])
    reached[case.operation.label].add(answer.status_code)
    asked += 1
    return answer.status_code


def times(examples: int) -> Callable[..., Any]:
    """The same cases each time: `reached` must not depend on luck. What took how long is no concern of these tests."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


FEW, MANY = times(40), times(400)


@locked.parametrize()
@FEW
def test_every_answer_is_one_that_the_document_lists(case: schemathesis.Case, with_keys: Service):
    ask(case, with_keys, BEARER)


@locked.parametrize()
@times(5)
def test_without_a_known_key_nothing_is_told(case: schemathesis.Case, with_keys: Service):
    assert ask(case, with_keys) >= 400 or not case.operation.path.startswith("/v1")


@drawn.parametrize()
@FEW
def test_of_what_has_been_drawn_every_answer_is_listed(case: schemathesis.Case, with_pictures: Service):
    ask(case, with_pictures)


@pytest.mark.long
@pytest.mark.timeout(900)
@locked.parametrize()
@MANY
def test_every_answer_is_listed_however_often_one_asks(case: schemathesis.Case, with_keys: Service):
    ask(case, with_keys, BEARER)


@pytest.mark.long
@pytest.mark.timeout(900)
@locked.parametrize()
@times(100)
def test_without_a_known_key_nothing_is_told_however_often_one_asks(case: schemathesis.Case, with_keys: Service):
    assert ask(case, with_keys) >= 400 or not case.operation.path.startswith("/v1")


@pytest.mark.long
@pytest.mark.timeout(900)
@drawn.parametrize()
@MANY
def test_of_what_has_been_drawn_every_answer_is_listed_however_often_one_asks(
    case: schemathesis.Case, with_pictures: Service
):
    ask(case, with_pictures)


@pytest.mark.parametrize(
    ("operation", "statuses"),
    [
        (f"POST {URL}", {202, 400, 401, 415, 422}),
        (f"GET {URL}", {200, 401, 422}),
        (f"GET {URL}/{{id}}", {200, 401, 404, 405}),
        (f"DELETE {URL}/{{id}}", {200, 401, 404, 409}),
        (f"GET {URL}/{{id}}/events", {200, 401, 404, 422}),
        (f"GET {URL}/{{id}}/images/{{number}}", {200, 206, 401, 404, 422}),  # 304 and 416 are asked for below
        (f"GET {URL}/{{id}}/previews/{{number}}/{{step}}", {200, 401, 404, 422}),
        ("GET /v1/models/{name}", {200, 401, 404}),
        ("GET /v1/webhooks/secret", {200, 401}),
        ("GET /metrics", {200, 405}),
    ],
)
def test_all_that_has_come_this_far(operation: str, statuses: set[int]):
    """The tests above: a fuzzer that is refused at the door finds nothing."""
    if not reached:
        pytest.skip("none of the tests above ran")
    assert statuses <= reached[operation], f"{asked} cases reached {reached}"
