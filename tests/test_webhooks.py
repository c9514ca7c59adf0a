"""Webhooks: a real receiver is told, by a process of its own, of all that it asked for; whoever dies meanwhile."""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis.exceptions import ConnectionError
from replicate.client import Client
from replicate.webhook import Webhooks
from rq.job import Job
from standardwebhooks import Webhook
from typer.testing import CliRunner

from app import postman, webhooks
from app.cli import cli
from app.connection import connect
from app.errors import NotFound, QueueFull
from app.jobs import Jobs
from app.local import LocalService
from app.parts import die_with_parent
from app.postman import Postman
from app.settings import Settings
from app.storage import open_store
from app.webhooks import DUE, Outbox, key_of
from models.catalog import Catalog
from tests.conftest import local_settings
from tests.lab import OWNER, PROCESSES, Lab, Server, until

URL = "/v1/generations"
BRIEF = {"prompt": "a red apple", "num_inference_steps": 2, "width": 64, "height": 64}
LONG = BRIEF | {"num_inference_steps": 100, "n": 4}
HERE = ("127.0.0.1/32",)
ENDS = ["succeeded", "failed", "canceled", "expired"]
KEYS = {name: f"the key of {name}" for name in ("ann", "bob")}


@dataclass
class Told:
    path: str
    headers: dict[str, str]
    text: str
    at: float = field(default_factory=time.monotonic)

    @property
    def body(self) -> Any:
        return json.loads(self.text)


class Receiver(ThreadingHTTPServer):
    """Keeps what it is told; answers 200, or what the test has put there by path."""

    daemon_threads = True

    def __init__(self) -> None:
        self.told = list[Told]()
        self.answers = dict[str, Callable[[], int]]()
        super().__init__(("127.0.0.1", 0), Heard)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def at(self, path: str) -> list[Told]:
        return [one for one in self.told if one.path == path]

    def wait(self, path: str, count: int = 1, seconds: float = 40) -> list[Told]:
        until(lambda: len(self.at(path)) >= count, seconds, lambda: str([one.text for one in self.at(path)]))
        return self.at(path)


class Heard(BaseHTTPRequestHandler):
    server: Receiver  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["content-length"])).decode()
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.told.append(Told(self.path, headers, text))
        answer = self.server.answers.get(self.path)
        self.send_response(answer() if answer else 200)
        self.send_header("Location", self.server.url("/secret"))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.shutdown()
    receiver.server_close()


# -- the whole service: the API, a worker with the shipped model, the postman


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    digests = tuple((name, hashlib.sha256(key.encode()).hexdigest()) for name, key in KEYS.items())
    given = {"models": ("emoji-sd",), "webhook_allow": HERE, "api_keys": digests, "max_rows": 4}
    with LocalService(local_settings(tmp_path_factory.mktemp("telling"), **given), delivers=True) as service:
        yield service


@pytest.fixture
def http(telling: LocalService) -> Iterator[httpx2.Client]:
    headers = {"Authorization": f"Bearer {KEYS['ann']}"}
    with httpx2.Client(base_url=telling.url, headers=headers, timeout=60) as client:
        yield client


def asked(http: httpx2.Client, webhook: dict[str, Any], **given: Any) -> dict[str, Any]:
    answer = http.post(URL, json=BRIEF | given | {"webhook": webhook})
    assert answer.status_code == 202, answer.text
    return answer.json()


def test_who_asked_is_told_of_the_end_with_what_get_shows_signed(receiver: Receiver, http: httpx2.Client):
    id = asked(http, {"url": receiver.url("/end")})["id"]
    (told,) = receiver.wait("/end")
    body = told.body
    assert body.keys() == {"type", "timestamp", "data"}
    assert body["type"] == "generation.succeeded"
    shown = http.get(f"{URL}/{id}").json()
    assert body["data"] == shown
    assert shown["parameters"]["webhook"] == {"url": receiver.url("/end"), "events": ENDS}
    assert http.get(body["data"]["images"][0]["url"]).content.startswith(b"\x89PNG")
    assert told.headers["content-type"] == "application/json"
    assert told.headers["webhook-id"] == f"{id}_succeeded"
    secret = http.get("/v1/webhooks/secret").json()["secret"]
    assert Webhook(secret).verify(told.text, told.headers) == body
    with pytest.raises(Exception, match="No matching signature"):
        Webhook(secret).verify(told.text.replace("apple", "pear"), told.headers)


def test_each_owner_has_a_secret_and_nobody_that_of_another(telling: LocalService, http: httpx2.Client):
    ours = http.get("/v1/webhooks/secret").json()["secret"]
    bobs = httpx2.get(f"{telling.url}/v1/webhooks/secret", headers={"Authorization": f"Bearer {KEYS['bob']}"}).json()
    assert re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", ours)
    assert bobs["secret"] != ours
    assert httpx2.get(f"{telling.url}/v1/webhooks/secret").status_code == 401


def test_only_the_events_that_were_asked_for_are_told_as_they_stood_then(receiver: Receiver, http: httpx2.Client):
    events = ["queued", "running", "succeeded"]
    id = asked(http, {"url": receiver.url("/course"), "events": events})["id"]
    asked(http, {"url": receiver.url("/nothing"), "events": ["failed"]})
    told = {one.headers["webhook-id"]: one.body for one in receiver.wait("/course", 3)}
    assert [told[f"{id}_{event}"]["data"]["status"] for event in events] == events
    assert [told[f"{id}_{event}"]["type"] for event in events] == [f"generation.{event}" for event in events]
    assert told[f"{id}_running"]["data"]["attempts"] == 1
    assert receiver.at("/nothing") == []


def test_a_canceled_and_an_expired_one_are_told(receiver: Receiver, http: httpx2.Client):
    id = asked(http, {"url": receiver.url("/canceled")}, **LONG)["id"]
    http.delete(f"{URL}/{id}")
    assert receiver.wait("/canceled")[0].body["type"] == "generation.canceled"
    asked(http, {"url": receiver.url("/expired")}, **LONG, expires_in=1)
    assert receiver.wait("/expired")[0].body["data"]["status"] == "expired"


@pytest.mark.parametrize(
    ("webhook", "where", "what"),
    [
        ({"url": "ftp://example.com/"}, "webhook.url", "must begin with https:// or http://"),
        ({"url": "http://10.0.0.1/"}, "webhook.url", "10.0.0.1 is a private address"),
        ({"url": "http://169.254.169.254/latest"}, "webhook.url", "a cloud's metadata service"),
        ({"url": "http://127.0.0.2/"}, "webhook.url", "a loopback address"),
        ({"url": "https://example.com:25/"}, "webhook.url", "port 25 is not allowed"),
        ({"url": "https://example.com/" + "a" * 2048}, "webhook.url", "at most 2048"),
        ({"events": ["succeeded"]}, "webhook.url", "required"),
        ({"url": "https://example.com/", "events": ["done"]}, "webhook.events.0", "'succeeded'"),
        ({"url": "https://example.com/", "events": []}, "webhook.events", "at least 1"),
        ({"url": "https://example.com/", "secret": "x"}, "webhook.secret", "not permitted"),
    ],
)
def test_a_webhook_that_cannot_be_is_refused_by_name(
    http: httpx2.Client, webhook: dict[str, Any], where: str, what: str
):
    answer = http.post(URL, json=BRIEF | {"webhook": webhook})
    assert answer.status_code == 422, answer.text
    (error,) = answer.json()["errors"]
    assert error["field"] == where
    assert what in error["detail"]


def test_the_code_on_the_page_verifies_what_comes(
    receiver: Receiver, telling: LocalService, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DARKROOM_API_KEY", KEYS["ann"])
    page = (Path(__file__).parent.parent / "docs" / "webhooks.md").read_text()
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        block = block.replace("http://127.0.0.1:8000", telling.url)
        exec(block.replace("https://you.example/pictures", receiver.url("/page")), names)
    (told,) = receiver.wait("/page")
    assert names["heard"](told.headers, told.text) == "generation.succeeded"
    assert names["heard"](told.headers, told.text) is None  # it has come before
    forged = told.headers | {"webhook-signature": "v1," + "A" * 43 + "="}
    with pytest.raises(Exception, match="No matching signature"):
        names["heard"](forged, told.text)


def test_replicates_own_client_validates_what_comes(receiver: Receiver, telling: LocalService):
    client = Client(api_token=KEYS["ann"], base_url=telling.url)
    prediction = client.predictions.create(
        model="darkroom/emoji-sd",
        input=BRIEF,
        webhook=receiver.url("/replicate"),
        webhook_events_filter=["start", "logs", "completed"],
    )
    assert "webhook_events_filter: logs is not heeded" in (prediction.logs or "")
    told = {one.body["status"]: one for one in receiver.wait("/replicate", 2)}
    assert told.keys() == {"processing", "succeeded"}
    secret = client.webhooks.default.secret()
    for one in told.values():
        Webhooks.validate(headers=one.headers, body=one.text, secret=secret, tolerance=60)
        assert one.body["id"] == prediction.id
    prediction.reload()
    (url,) = told["succeeded"].body["output"]
    assert url == prediction.output[0]
    assert httpx2.get(url).content.startswith(b"\x89PNG")  # without a key: it is signed
    with pytest.raises(ValueError, match="signature is invalid"):
        Webhooks.validate(headers=one.headers, body=one.text + " ", secret=secret)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"webhook": "http://10.0.0.1/"}, "webhook: 10.0.0.1 is a private address"),
        (
            {"webhook": "https://a.example/", "webhook_events_filter": ["end"]},
            "webhook_events_filter: there is no 'end'",
        ),
        ({"webhook_events_filter": ["start"]}, "webhook_events_filter: needs a `webhook`"),
    ],
)
def test_replicates_words_are_refused_by_name(telling: LocalService, given: dict[str, Any], field: str):
    client = Client(api_token=KEYS["ann"], base_url=telling.url)
    with pytest.raises(Exception, match=re.escape(field)):
        client.predictions.create(model="darkroom/emoji-sd", input=BRIEF, **given)


def test_fals_webhook_has_fals_shape(receiver: Receiver, http: httpx2.Client):
    def posted(path: str, **given: Any) -> dict[str, Any]:
        query = {"fal_webhook": receiver.url(path)}
        return http.post("/fal/queue/darkroom/emoji-sd", params=query, json=BRIEF | given).json()

    request = posted("/fal", sync_mode=True)
    (told,) = receiver.wait("/fal")
    assert told.body.keys() == {"request_id", "gateway_request_id", "status", "payload", "error"}
    assert (told.body["request_id"], told.body["status"], told.body["error"]) == (request["request_id"], "OK", None)
    asked = http.get(request["response_url"]).json()
    assert asked["images"][0]["url"].startswith("data:image/png;base64,")  # which is no size for a webhook
    assert http.get(told.body["payload"]["images"][0].pop("url")).status_code == 200
    assert told.body["payload"] == asked | {"images": [told.body["payload"]["images"][0]]}
    request = posted("/fal/error", **LONG)
    http.put(request["cancel_url"])
    (told,) = receiver.wait("/fal/error")
    assert (told.body["status"], told.body["error"]) == ("ERROR", "it was canceled")
    assert told.body["payload"] == http.get(request["response_url"]).json()
    refused = http.post("/fal/queue/darkroom/emoji-sd?fal_webhook=http://10.0.0.1/", json=BRIEF)
    assert refused.json()["detail"][0]["loc"] == ["body", "fal_webhook"]


def test_the_metrics_say_what_waits_and_what_was_told(telling: LocalService, http: httpx2.Client):
    text = http.get("/metrics").text
    assert "darkroom_webhooks_pending 0.0" in text
    assert "darkroom_webhooks_dead 0.0" in text
    assert "darkroom_webhooks_overdue_seconds 0.0" in text
    delivered = re.search(r"^darkroom_webhooks_delivered_total (\S+)", text, re.M)
    assert delivered
    assert float(delivered[1]) >= 5
    assert "darkroom_webhooks_failed_tries_total 0.0" in text


# -- what becomes of it: a lab whose workers only sleep, and postmen of our own


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("webhooks"))
    yield server
    server.stop()


@pytest.fixture
def lab(server: Server, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(server, tmp_path, {"max_attempts": 2, "webhook_allow": HERE})
    yield lab
    lab.close()


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postman, "PAUSES", (0.1,) * 7)
    monkeypatch.setattr(postman, "LOOK", 0.02)


@pytest.fixture
def delivering(lab: Lab, hurried: None) -> Iterator[Postman]:
    with delivered_by(one := Postman(lab.connection, lab.jobs)):
        yield one


@contextmanager
def delivered_by(one: Postman) -> Generator[None]:
    """By a postman in a thread."""
    thread = threading.Thread(target=one.run)
    thread.start()
    try:
        yield
    finally:
        one.stopping.set()
        thread.join()


def hook(receiver: Receiver, path: str, *events: str) -> dict[str, Any]:
    return {"webhook": {"url": receiver.url(path), "events": [*(events or ENDS)]}}


def nothing_is_left(lab: Lab) -> bool:
    return not lab.connection.exists(DUE) and not [*lab.connection.scan_iter("darkroom:webhook:*")]


@pytest.mark.usefixtures("delivering")
def test_it_is_tried_until_it_is_taken_and_is_the_same_each_time(receiver: Receiver, lab: Lab):
    answers = iter([500, 302, 404, 200])
    receiver.answers["/third"] = lambda: next(answers)
    (id,) = lab.put(**hook(receiver, "/third"))
    lab.jobs.cancel(id, OWNER)
    told = receiver.wait("/third", 4)
    until(lambda: nothing_is_left(lab))
    assert {(one.headers["webhook-id"], one.text) for one in told} == {(f"{id}_canceled", told[0].text)}
    secret = webhooks.secret_for(lab.connection, lab.jobs.settings, OWNER)
    for one in told:
        Webhook(secret).verify(one.text, one.headers)
    assert Outbox(lab.connection).standing()[2:] == (0, 1, 3)
    assert len(receiver.at("/third")) == 4


@pytest.mark.usefixtures("delivering")
def test_what_nobody_takes_is_a_dead_letter_and_is_sent_again_on_command(
    receiver: Receiver, lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("REDIS_URL", lab.server.url)
    receiver.answers["/never"] = lambda: 503
    (id,) = lab.put(**hook(receiver, "/never"))
    lab.jobs.cancel(id, OWNER)
    outbox = Outbox(lab.connection)
    until(lambda: [*outbox.dead()])
    (dead,) = outbox.dead()
    assert (dead.id, dead.url, dead.tries) == (f"{id}_canceled", receiver.url("/never"), 8)
    assert dead.reason == "answered 503"
    assert len(receiver.at("/never")) == 8
    assert 0 < lab.connection.ttl(key_of(dead.id)) <= webhooks.KEPT.total_seconds()
    lab.connection.delete(Job.key_for(id))  # its result has been forgotten; the letter has all
    listed = CliRunner().invoke(cli, ["webhooks"], env={"COLUMNS": "200"})
    assert dead.id in listed.stdout
    assert "answered 503" in listed.stdout
    del receiver.answers["/never"]
    assert CliRunner().invoke(cli, ["webhooks", "--resend", dead.id]).exit_code == 0
    receiver.wait("/never", 9)
    until(lambda: nothing_is_left(lab))
    assert [*outbox.dead()] == []
    assert "there is no dead letter" in str(CliRunner().invoke(cli, ["webhooks", "--resend", dead.id]).exception)
    with pytest.raises(NotFound):
        outbox.resend("nonsense")


@pytest.mark.usefixtures("delivering")
def test_who_has_gone_is_not_asked_again(receiver: Receiver, lab: Lab):
    receiver.answers["/gone"] = lambda: 410
    (id,) = lab.put(**hook(receiver, "/gone"))
    lab.jobs.cancel(id, OWNER)
    until(lambda: [*Outbox(lab.connection).dead()])
    assert len(receiver.at("/gone")) == 1


@pytest.mark.usefixtures("delivering")
def test_a_redirect_to_where_we_do_not_go_is_not_followed(receiver: Receiver, lab: Lab):
    receiver.answers["/redirect"] = lambda: 307
    (id,) = lab.put(**hook(receiver, "/redirect"))
    lab.jobs.cancel(id, OWNER)
    until(lambda: [*Outbox(lab.connection).dead()])
    (dead,) = Outbox(lab.connection).dead()
    assert dead.reason == "answered 307: redirects are not followed"
    assert receiver.at("/secret") == []


def test_a_name_that_leads_to_our_own_network_is_told_nothing(receiver: Receiver, lab: Lab):
    (id,) = lab.put(webhook={"url": f"http://localhost:{receiver.server_port}/name", "events": ["canceled"]})
    lab.jobs.cancel(id, OWNER)
    strict = Postman(lab.connection, lab.with_settings(webhook_allow=()))
    (parcel,) = strict.take(9)
    refused = strict.refusal_of(parcel)
    assert refused
    assert re.fullmatch(r"localhost has (127\.0\.0\.1|::1), a loopback address", refused[0])
    assert receiver.at("/name") == []
    named = Postman(lab.connection, lab.with_settings(webhook_allow=("localhost",)))
    assert named.refusal_of(parcel) is None
    receiver.wait("/name")


def test_a_slow_receiver_holds_up_nobody_else(
    receiver: Receiver, lab: Lab, delivering: Postman, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(postman, "TAKES", 1.0)
    slow = Receiver()
    slow.answers["/slow"] = lambda: time.sleep(3) or 200
    many, (quick,) = lab.put(2 * postman.AT_ONCE, **hook(slow, "/slow")), lab.put(**hook(receiver, "/quick"))
    for id in many:
        lab.jobs.cancel(id, OWNER)
    until(lambda: len(slow.told) == postman.OF_A_HOST)
    began = time.monotonic()
    lab.jobs.cancel(quick, OWNER)
    assert receiver.wait("/quick")[0].at - began < 1
    until(lambda: lab.connection.hget(key_of(f"{many[0]}_canceled"), "reason"))
    assert b"Timeout" in (lab.connection.hget(key_of(f"{many[0]}_canceled"), "reason") or b"")
    slow.shutdown()
    slow.server_close()


def test_a_long_queue_for_a_host_that_hangs_holds_up_nobody_else(
    receiver: Receiver, lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(postman, "TAKES", 1.0)
    slow = Receiver()
    slow.answers["/slow"] = lambda: time.sleep(2) or 200
    many, (quick,) = lab.put(250, **hook(slow, "/slow")), lab.put(**hook(receiver, "/behind"))
    for id in [*many, quick]:
        lab.jobs.cancel(id, OWNER)
    with delivered_by(Postman(lab.connection, lab.jobs)):
        began = time.monotonic()
        assert receiver.wait("/behind")[0].at - began < 10
        for (burst,) in (lab.put(**hook(receiver, "/burst")) for _ in range(40)):
            lab.jobs.cancel(burst, OWNER)
        assert len(receiver.wait("/burst", 40)) == 40
    slow.shutdown()
    slow.server_close()


def test_a_redis_that_hiccups_between_two_deliveries_blocks_no_host(
    receiver: Receiver, lab: Lab, monkeypatch: pytest.MonkeyPatch
):
    ids = lab.put(2 * postman.OF_A_HOST, **hook(receiver, "/hiccup"))
    for id in ids:
        lab.jobs.cancel(id, OWNER)
    carrying, broken = Postman(lab.connection, lab.jobs), threading.Event()

    def postpone(id: str, seconds: float) -> None:
        if not broken.is_set():
            broken.set()
            raise ConnectionError("gone")
        Outbox.postpone(carrying.outbox, id, seconds)

    monkeypatch.setattr(carrying.outbox, "postpone", postpone)
    monkeypatch.setattr(webhooks, "LEASE", timedelta(seconds=2))
    with delivered_by(carrying):
        until(lambda: nothing_is_left(lab), 20)
    assert broken.is_set()
    assert len({one.headers["webhook-id"] for one in receiver.at("/hiccup")}) == len(ids)
    assert not carrying.busy


@pytest.mark.usefixtures("delivering")
def test_one_that_cannot_be_read_keeps_no_other_from_being_told(receiver: Receiver, lab: Lab):
    odd, good = lab.put(2, **hook(receiver, "/odd"))
    lab.connection.hset(Job.key_for(odd), "webhook", json.dumps({"url": "x", "events": ["canceled"], "newer": 1}))
    for id in (odd, good):
        lab.jobs.cancel(id, OWNER)
    assert receiver.wait("/odd")[0].body["data"]["id"] == good
    until(lambda: lab.connection.hget(key_of(f"{odd}_canceled"), "reason") == b"it cannot be read")


@pytest.mark.usefixtures("delivering")
def test_what_expires_in_the_queue_is_told_though_nobody_looks(receiver: Receiver, lab: Lab):
    (id,) = lab.put(expires_in=1, **hook(receiver, "/expires"))
    (told,) = receiver.wait("/expires")
    assert told.body["type"] == "generation.expired"
    assert told.headers["webhook-id"] == f"{id}_expired"
    assert lab.connection.zcard(webhooks.EXPIRING) == 0


def test_with_too_many_undelivered_a_generation_that_wants_more_is_not_accepted(
    lab: Lab, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(webhooks, "MOST_PENDING", 2)
    for id in lab.put(2, **hook(receiver, "/full")):
        lab.jobs.cancel(id, OWNER)
    with pytest.raises(QueueFull, match="2 webhooks wait to be delivered; nothing was accepted"):
        lab.put(**hook(receiver, "/full"))
    assert lab.put()


def test_of_dead_letters_the_oldest_go(lab: Lab, receiver: Receiver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(webhooks, "MOST_DEAD", 1)
    outbox, ids = Outbox(lab.connection), lab.put(2, **hook(receiver, "/dead"))
    for id in ids:
        lab.jobs.cancel(id, OWNER)
        outbox.failed(f"{id}_canceled", 1, "why", None)
        time.sleep(1)  # their order is by the second
    assert [one.id for one in outbox.dead()] == [f"{ids[1]}_canceled"]
    assert not lab.connection.exists(key_of(f"{ids[0]}_canceled"))


@pytest.mark.usefixtures("delivering")
def test_one_whose_worker_is_killed_is_told_of_each_event_once(receiver: Receiver, lab: Lab):
    lab.worker(step=0.1)
    path, events = "/killed", ("queued", "running", "succeeded")
    (id,) = lab.put(kill=1, **hook(receiver, path, *events))
    until(lambda: not lab.workers[0].is_alive())
    lab.worker()
    told = receiver.wait(path, 3)
    lab.wait([id])
    assert lab.get(id).attempts == 2
    assert sorted(one.headers["webhook-id"] for one in told) == sorted(f"{id}_{event}" for event in events)
    until(lambda: nothing_is_left(lab))
    assert len(receiver.at(path)) == 3


@pytest.mark.usefixtures("delivering")
def test_every_way_to_end_is_told(receiver: Receiver, lab: Lab):
    """By its worker, by those who take over from it, and by whoever looks after one that has expired."""
    (late,), (later,) = (lab.put(expires_in=1, **hook(receiver, "/late")) for _ in range(2))
    time.sleep(1.1)
    assert lab.get(late).status == "expired"
    lab.worker(step=0.1, max_attempts=2)
    (crashed,) = lab.put(crash=1, **hook(receiver, "/crashed"))
    assert receiver.wait("/crashed")[0].body["data"]["error"]["type"] == "error"
    assert {one.body["data"]["id"] for one in receiver.wait("/late", 2)} == {late, later}
    lab.requeue(crashed)
    assert [one.headers["webhook-id"] for one in receiver.wait("/crashed", 2)] == [
        f"{crashed}_failed",
        f"{crashed}_failed_2",
    ]
    (poison,) = lab.put(kill=9, **hook(receiver, "/poison"))
    for _ in range(2):
        until(lambda: not any(worker.is_alive() for worker in lab.workers))
        lab.worker(max_attempts=2)
    assert receiver.wait("/poison")[0].body["data"]["error"]["type"] == "worker-died"
    assert receiver.at("/poison")[0].body["data"]["id"] == poison


def deliver_for_ever(url: str, folder: Path) -> None:
    """A postman's process, and a short lease."""
    die_with_parent(os.getppid())
    postman.PAUSES, postman.LOOK, webhooks.LEASE = (0.1,) * 7, 0.02, timedelta(seconds=1)
    connection, settings = connect(url, 1), Settings(data_dir=folder, webhook_allow=HERE)
    jobs = Jobs(connection, open_store(settings.blobs), Catalog.read(["emoji-sd"]), settings)
    Postman(connection, jobs).run()


def test_a_postman_that_is_killed_loses_nothing(receiver: Receiver, lab: Lab):
    (id,) = lab.put(**hook(receiver, "/kept"))
    lab.jobs.cancel(id, OWNER)
    lab.connection.delete(Job.key_for(id))  # while nobody delivered it, its result has been forgotten
    receiver.answers["/kept"] = lambda: time.sleep(30) or 200

    def begun() -> Any:
        process = PROCESSES.Process(target=deliver_for_ever, args=(lab.server.url, lab.folder), daemon=True)
        process.start()
        return process

    first = begun()
    receiver.wait("/kept")
    first.kill()
    first.join()
    del receiver.answers["/kept"]
    second = begun()
    one, two = receiver.wait("/kept", 2)
    assert (one.text, one.headers["webhook-id"]) == (two.text, two.headers["webhook-id"])
    until(lambda: nothing_is_left(lab))
    second.kill()


def test_a_postman_that_is_told_to_stop_finishes_what_it_has_begun(receiver: Receiver, lab: Lab, hurried: None):
    receiver.answers["/begun"] = lambda: time.sleep(1) or 200
    one = Postman(lab.connection, lab.jobs)
    thread = threading.Thread(target=one.run)
    thread.start()
    (id,) = lab.put(**hook(receiver, "/begun"))
    lab.jobs.cancel(id, OWNER)
    receiver.wait("/begun")
    one.stopping.set()
    thread.join(10)
    assert nothing_is_left(lab)


def test_what_nobody_delivers_is_kept_for_a_week_and_no_longer(receiver: Receiver, lab: Lab):
    first, second = lab.put(2, **hook(receiver, "/nobody"))
    lab.jobs.cancel(first, OWNER)
    assert 0 < lab.connection.ttl(key_of(f"{first}_canceled")) <= webhooks.KEPT.total_seconds()
    assert Outbox(lab.connection).standing().pending == 1
    lab.connection.zadd(DUE, {f"{first}_canceled": time.time() - webhooks.KEPT.total_seconds() - 1})
    lab.jobs.cancel(second, OWNER)
    assert lab.connection.zrange(DUE, 0, -1) == [f"{second}_canceled".encode()]
    lab.connection.delete(key_of(f"{second}_canceled"))
    assert Postman(lab.connection, lab.jobs).take(9) == []
    assert not lab.connection.exists(DUE)


def test_a_secret_that_is_set_is_the_one_and_others_agree_on_one(lab: Lab):
    secret = "whsec_" + "c2VjcmV0" * 4
    assert webhooks.secret_for(lab.connection, lab.with_settings(webhook_secret=secret).settings, OWNER) == secret
    made = {webhooks.secret_for(lab.connection, lab.with_settings().settings, name) for name in (OWNER, "bob")}
    assert len(made) == 1
