"""fal's API with fal's own client, unmodified, over HTTPS, against a real server and model."""

import base64
import io
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trustme
from PIL import Image

from app.local import LocalService

BRIEF = {"prompt": "a red apple", "num_inference_steps": 4, "seed": 7}

SCRIPT = """
import json, sys
import fal_client
from fal_client.client import FalClientHTTPError

told = []
def say(**what): print(json.dumps(what), flush=True)

given = json.loads(sys.argv[1])
app = given.pop("app", "darkroom/emoji-sd")
how = given.pop("how", "subscribe")
try:
    if how == "subscribe":
        hear = lambda status: told.append(type(status).__name__)
        result = fal_client.subscribe(app, given, with_logs=True, on_queue_update=hear)
        say(result=result, told=told)
    elif how == "run":
        say(result=fal_client.run(app, given))
    else:
        handle = fal_client.submit(app, given, priority="low")
        if how == "cancel":
            handle.cancel()
        try:
            result = handle.get()
        except FalClientHTTPError as error:
            result = [error.error_type, str(error)]
        status = handle.status(with_logs=True)
        say(id=handle.request_id, result=result, logs=[line["message"] for line in status.logs], error=status.error)
except FalClientHTTPError as error:
    say(status=error.status_code, type=error.error_type, detail=error.response.json()["detail"])
"""


class Onward(BaseHTTPRequestHandler):
    """TLS's end: passes each request on to the service."""

    target = ""

    def pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in ("content-length", "connection")
        }
        answer = httpx2.request(
            self.command,
            self.target + self.path,
            content=body,
            headers=headers | {"X-Forwarded-Proto": "https"},
            timeout=120,
        )
        self.send_response(answer.status_code)
        for name in ("content-type", "location", "x-fal-error-type"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        self.send_header("content-length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = pass_on

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def asked(service: LocalService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What a script of fal's client says, of requests through an HTTPS server."""
    authority = trustme.CA()
    trusted: Path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(str(trusted))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("To", (Onward,), {"target": service.url}))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"localhost:{server.server_port}"
    environment = {
        "FAL_QUEUE_RUN_HOST": f"{here}/fal/queue",
        "FAL_RUN_HOST": f"{here}/fal/run",
        "FAL_KEY": "none",
        "SSL_CERT_FILE": str(trusted),
    }

    def ask(**given: Any) -> dict[str, Any]:
        command = [sys.executable, "-c", SCRIPT, json.dumps({**BRIEF, **given})]
        ran = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    yield ask
    server.shutdown()


def test_a_request_is_queued_watched_and_answered(asked: Any, service: LocalService):
    said = asked(num_images=2, image_size="landscape_16_9", output_format="jpeg", num_inference_steps=20)
    assert said["told"][-1] == "Completed"
    images = said["result"]["images"]
    assert [(one["width"], one["height"], one["content_type"]) for one in images] == [(176, 96, "image/jpeg")] * 2
    assert said["result"]["seed"] == 7
    assert images[0]["url"].startswith("https://localhost")
    path = images[0]["url"].partition("/v1/")[2]
    assert Image.open(io.BytesIO(httpx2.get(f"{service.url}/v1/{path}").content)).size == (176, 96)


def test_a_call_is_answered_when_it_is_done(asked: Any):
    (image,) = asked(how="run", sync_mode=True, image_size={"width": 64, "height": 64})["result"]["images"]
    head, _, data = image["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)


def test_it_is_a_generation_of_low_priority_whose_logs_say_what_was_not_heeded(asked: Any, service: LocalService):
    said = asked(how="submit", enable_safety_checker=True)
    assert said["logs"][0] == "enable_safety_checker is not heeded"
    assert "step 4 of 4" in said["logs"]
    ours = httpx2.get(f"{service.url}/v1/generations/{said['id']}").json()
    assert (ours["status"], ours["parameters"]["priority"]) == ("succeeded", "low")


def test_it_is_canceled(asked: Any, service: LocalService):
    said = asked(how="cancel", num_inference_steps=100, num_images=8, image_size={"width": 256, "height": 256})
    assert said["result"][0] == "generation_failed"
    assert said["error"] == "it was canceled"
    assert httpx2.get(f"{service.url}/v1/generations/{said['id']}").json()["status"] == "canceled"


def test_a_picture_is_given_as_a_data_url(asked: Any):
    out = io.BytesIO()
    Image.new("RGB", (128, 128), "teal").save(out, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    assert len(asked(image_url=url, strength=0.4)["result"]["images"]) == 1


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"num_images": 1000}, "num_images"),
        ({"colour": "red"}, "colour"),
        ({"image_size": "huge"}, "image_size"),
        ({"image_size": {"width": -1, "height": 64}}, "image_size"),
        ({"image_url": "https://elsewhere.example/a.png"}, "image_url"),
        ({"seed": "seven"}, "seed"),
        ({"metadata": "x", "sync_mode": True}, "metadata"),
        ({"image_size": {"width": 10**30, "height": 64}}, "image_size"),
    ],
)
def test_a_wrong_field_is_told_in_fals_way(asked: Any, given: dict[str, Any], field: str):
    said = asked(**given)
    assert (said["status"], said["type"]) == (422, "invalid_request")
    assert said["detail"][0]["loc"] == ["body", field]


def test_what_is_not_there_is_said(asked: Any, service: LocalService):
    said = asked(app="fal-ai/flux")
    assert (said["status"], said["type"]) == (404, "not_found")
    url = f"{service.url}/fal/queue/darkroom/emoji-sd"
    hooked = httpx2.post(f"{url}?fal_webhook=ftp://elsewhere.example", json=BRIEF)
    assert (hooked.status_code, hooked.json()["detail"][0]["loc"]) == (422, ["body", "fal_webhook"])
    running = httpx2.post(url, json={**BRIEF, "num_inference_steps": 100, "num_images": 8}).json()
    assert httpx2.get(running["response_url"]).json()["error_type"] == "unfinished"
    assert httpx2.put(running["cancel_url"]).status_code == 202
    assert httpx2.put(running["cancel_url"]).json() == {"status": "ALREADY_COMPLETED"}
