"""One generation through all fronts: made by one, it is seen, fetched and canceled by the others, under one id."""

import base64
import json
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from typing import Any

import httpx2
import openai
import pytest
import webuiapi

from app.local import LocalService
from tests.conftest import local_settings
from tests.lab import until

KEYS = {"ada": "secret", "bob": "other"}
BRIEF = {"prompt": "a red apple", "seed": 7}


class Front:
    """What a client of one API does, with its own words for how a generation stands."""

    words: dict[str, str]  # ours to theirs

    def __init__(self, url: str, key: str):
        self.http = httpx2.Client(base_url=url, timeout=120, headers={"Authorization": self.authorization(key)})

    def authorization(self, key: str) -> str:
        return f"Bearer {key}"

    def ask(self, **given: Any) -> httpx2.Response:
        raise NotImplementedError

    def id_of(self, answer: Any) -> str:
        raise NotImplementedError

    def status(self, id: str) -> httpx2.Response:
        raise NotImplementedError

    def cancel(self, id: str) -> httpx2.Response:
        raise NotImplementedError

    def picture(self, id: str) -> bytes:
        raise NotImplementedError

    def says(self, id: str) -> str:
        """How it stands."""
        return self.status(id).raise_for_status().json()["status"]


class Native(Front):
    words = {"running": "running", "canceled": "canceled"}

    def ask(self, **given: Any) -> httpx2.Response:
        return self.http.post("/v1/generations", json=given)

    def id_of(self, answer: Any) -> str:
        return answer["id"]

    def status(self, id: str) -> httpx2.Response:
        return self.http.get(f"/v1/generations/{id}")

    def cancel(self, id: str) -> httpx2.Response:
        return self.http.delete(f"/v1/generations/{id}")

    def picture(self, id: str) -> bytes:
        return self.http.get(self.status(id).json()["images"][0]["url"]).raise_for_status().content


class Replicate(Front):
    words = {"running": "processing", "canceled": "canceled"}

    def ask(self, **given: Any) -> httpx2.Response:
        return self.http.post("/v1/models/darkroom/emoji-sd/predictions", json={"input": given})

    def id_of(self, answer: Any) -> str:
        return answer["id"]

    def status(self, id: str) -> httpx2.Response:
        return self.http.get(f"/v1/predictions/{id}")

    def cancel(self, id: str) -> httpx2.Response:
        return self.http.post(f"/v1/predictions/{id}/cancel")

    def picture(self, id: str) -> bytes:
        return httpx2.get(self.status(id).json()["output"][0]).raise_for_status().content


class Fal(Front):
    words = {"running": "IN_PROGRESS", "canceled": "COMPLETED: it was canceled"}

    def authorization(self, key: str) -> str:
        return f"Key {key}"

    def ask(self, **given: Any) -> httpx2.Response:
        return self.http.post("/fal/queue/darkroom/emoji-sd", json=given)

    def id_of(self, answer: Any) -> str:
        return answer["request_id"]

    def status(self, id: str) -> httpx2.Response:
        return self.http.get(f"/fal/queue/darkroom/emoji-sd/requests/{id}/status")

    def cancel(self, id: str) -> httpx2.Response:
        return self.http.put(f"/fal/queue/darkroom/emoji-sd/requests/{id}/cancel")

    def picture(self, id: str) -> bytes:
        result = self.http.get(f"/fal/queue/darkroom/emoji-sd/requests/{id}").raise_for_status().json()
        return httpx2.get(result["images"][0]["url"]).raise_for_status().content

    def says(self, id: str) -> str:
        said = self.status(id).raise_for_status().json()
        return f"{said['status']}: {said['error']}" if "error" in said else said["status"]


class OpenAI(Front):
    """Who asks waits for the pictures; there is nothing else to ask for."""

    def ask(self, **given: Any) -> httpx2.Response:
        return self.http.post("/v1/images/generations", json=given)

    def id_of(self, answer: Any) -> str:
        return answer["data"][0]["job_id"]


class WebUI(Front):
    """Who asks waits for the pictures; meanwhile there is a generation at present, and no other."""

    def authorization(self, key: str) -> str:
        return f"Basic {base64.b64encode(f'anybody:{key}'.encode()).decode()}"

    def ask(self, **given: Any) -> httpx2.Response:
        given["steps"] = given.pop("num_inference_steps")
        return self.http.post("/sdapi/v1/txt2img", json=given)

    def id_of(self, answer: Any) -> str:
        return json.loads(answer["info"])["job_id"]

    def cancel(self, id: str) -> httpx2.Response:
        return self.http.post("/sdapi/v1/interrupt")

    def status(self, id: str) -> httpx2.Response:
        return self.http.get("/sdapi/v1/progress")

    def says(self, id: str) -> str:
        return self.status(id).raise_for_status().json()["state"]["job"]


Fronts = dict[type[Front], Front]
WITH_IDS: list[type[Front]] = [Native, Replicate, Fal]
ALL: list[type[Front]] = [*WITH_IDS, OpenAI, WebUI]
CANCELS = [(made, by) for made in ALL for by in WITH_IDS if made is not by] + [(WebUI, WebUI)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    keys = tuple((name, sha256(key.encode()).hexdigest()) for name, key in KEYS.items())
    settings = local_settings(tmp_path_factory.mktemp("fronts"), api_keys=keys, models=("emoji-sd",))
    with LocalService(settings) as service:
        yield service


@pytest.fixture
def ada(service: LocalService) -> Iterator[Fronts]:
    with clients(service, "ada") as fronts:
        yield fronts


@pytest.fixture
def bob(service: LocalService) -> Iterator[Fronts]:
    with clients(service, "bob") as fronts:
        yield fronts


@contextmanager
def clients(service: LocalService, name: str) -> Generator[Fronts]:
    with ExitStack() as stack:
        fronts = {kind: kind(service.url, KEYS[name]) for kind in ALL}
        for front in fronts.values():
            stack.enter_context(front.http)
        yield fronts


def ids(front: Front) -> list[str]:
    return [one["id"] for one in front.http.get("/v1/generations").raise_for_status().json()["data"]]


@contextmanager
def under_way(fronts: Fronts, made: type[Front]) -> Generator[tuple[str, list[Any]]]:
    """A slow generation that this front has begun, and where its answer will be."""
    native, answers = fronts[Native], list[Any]()
    known = set(ids(native))
    slow = {**BRIEF, "num_inference_steps": 100}
    asking = threading.Thread(target=lambda: answers.append(fronts[made].ask(**slow)))
    asking.start()
    until(lambda: set(ids(native)) - known)
    (id,) = set(ids(native)) - known
    until(lambda: native.says(id) == "running")
    try:
        yield id, answers
    finally:
        native.cancel(id)
        asking.join(60)


@pytest.mark.parametrize("made", ALL)
def test_a_picture_made_by_one_front_is_fetched_by_all(ada: Fronts, bob: Fronts, made: type[Front]):
    answer = ada[made].ask(**BRIEF, num_inference_steps=2).raise_for_status().json()
    id = ada[made].id_of(answer)
    until(lambda: ada[Native].says(id) == "succeeded")
    pictures = {kind: ada[kind].picture(id) for kind in WITH_IDS}
    if made is OpenAI:
        pictures[made] = base64.b64decode(answer["data"][0]["b64_json"])
    if made is WebUI:
        pictures[made] = base64.b64decode(answer["images"][0])
    assert pictures[Native].startswith(b"\x89PNG")
    assert len(set(pictures.values())) == 1
    assert id in ids(ada[Native])
    assert id in {one["id"] for one in ada[Replicate].http.get("/v1/predictions").json()["results"]}
    assert [bob[kind].status(id).status_code for kind in WITH_IDS] == [404] * 3
    assert ids(bob[Native]) == []


@pytest.mark.parametrize(("made", "by"), CANCELS)
def test_a_generation_made_by_one_front_is_seen_and_canceled_by_another(
    ada: Fronts, bob: Fronts, made: type[Front], by: type[Front]
):
    with under_way(ada, made) as (id, answers):
        assert [ada[kind].says(id) for kind in WITH_IDS] == [kind.words["running"] for kind in WITH_IDS]
        assert ada[WebUI].says(id) == (id if made is WebUI else "")
        assert [bob[kind].cancel(id).status_code for kind in WITH_IDS] == [404] * 3
        for nobodys in (bob[WebUI], *([] if made is WebUI else [ada[WebUI]])):
            assert nobodys.cancel(id).status_code == 200  # there was nothing of theirs to interrupt
        assert ada[Native].says(id) == "running"
        assert ada[by].cancel(id).is_success
        assert [ada[kind].says(id) for kind in WITH_IDS] == [kind.words["canceled"] for kind in WITH_IDS]
        until(lambda: answers)
    (answer,) = answers
    if made is OpenAI:
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "it was canceled")
    elif made is WebUI:  # what there was of it
        assert (answer.status_code, ada[made].id_of(answer.json())) == (200, id)
    else:
        assert ada[made].id_of(answer.json()) == id


# -- with keys, by their clients


def test_the_web_uis_client_gives_its_key_as_a_password(service: LocalService):
    host, _, port = service.url.removeprefix("http://").partition(":")
    api = webuiapi.WebUIApi(host=host, port=int(port))
    with pytest.raises(RuntimeError) as refused:
        api.txt2img(prompt="a dog", steps=1)
    assert refused.value.args[0] == 401
    api.set_auth("whoever", KEYS["ada"])
    assert len(api.txt2img(prompt="a dog", steps=1).images) == 1


def test_openais_client_draws_with_a_key_and_urls_need_none(service: LocalService):
    with pytest.raises(openai.AuthenticationError) as refused:
        openai.OpenAI(base_url=f"{service.url}/v1", api_key="wrong").images.generate(prompt="a dog")
    assert refused.value.code == "invalid_api_key"
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEYS["ada"])
    made: Any = client.images.generate(
        prompt="a dog", response_format="url", extra_body={"seed": 7, "num_inference_steps": 4}
    )
    url = made.data[0].url
    assert httpx2.get(url).status_code == 200
    assert httpx2.get(url.partition("?")[0]).status_code == 401
    assert httpx2.get(url.replace("for=ada", "for=bob")).status_code == 401
    assert httpx2.get(url.partition("&")[0] + "&signature=%C3%A4").status_code == 401
    assert httpx2.get(url.replace("/images/0", "/images/1")).status_code == 401
    assert httpx2.delete(url).status_code == 401
