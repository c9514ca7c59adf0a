"""The Python client, against a real service behind networks that break."""

import asyncio
import inspect
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from app.local import EmbeddedRedis, LocalService
from app.schemas import GenerationRequest
from darkroom import AsyncDarkroom, Darkroom, Fields, NotDrawn, Refused, Unreachable, exchange
from darkroom.exchange import Exchanges
from tests.conftest import local_settings
from tests.lab import until
from tests.proxy import Proxy

ROOT = Path(__file__).parent.parent
BRIEF: Fields = {"width": 64, "height": 64, "num_inference_steps": 2}
LONG: Fields = {"width": 64, "height": 64, "num_inference_steps": 50}
SUBMISSION = b"POST /v1/generations"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The service's way to its Valkey."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("valkey"))
    proxy = Proxy(server.url)
    yield proxy
    proxy.close()
    server.stop()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, redis: Proxy) -> Iterator[LocalService]:
    """A service that these tests may stop and cut off."""
    folder = tmp_path_factory.mktemp("service")
    given = local_settings(folder, models=("emoji-sd",), redis_url=redis.redis_url)
    with LocalService(given) as service:
        yield service


@pytest.fixture(scope="module")
def network(own: LocalService) -> Iterator[Proxy]:
    """The client's way to the service."""
    proxy = Proxy(own.url.removeprefix("http://"))
    yield proxy
    proxy.close()


@pytest.fixture
def client(network: Proxy) -> Iterator[Darkroom]:
    network.heal()
    with Darkroom(f"http://{network.address}") as client:
        yield client


def later(seconds: float, what: Any) -> threading.Thread:
    timer = threading.Timer(seconds, what)
    timer.start()
    return timer


# -- drawing


def test_generate_waits_for_pictures_and_save_writes_them(client: Darkroom, tmp_path: Path):
    made = client.generate("a red apple", seed=0, n=2, **BRIEF)
    assert [image.seed for image in made.images] == [0, 1]
    paths = client.save(made, tmp_path / "apple.png")
    assert [path.name for path in paths] == ["apple-1.png", "apple-2.png"]
    with Image.open(paths[1]) as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    (only,) = client.save(client.generate("a red apple", seed=1, output_format="webp", **BRIEF), tmp_path / "one.webp")
    assert Image.open(only).format == "WEBP"


def test_watch_tells_steps_shows_previews_and_ends_with_the_generation(client: Darkroom):
    fields: Fields = {**BRIEF, "num_inference_steps": 6, "preview_every": 2}
    heard = list(client.watch(client.submit("a dog", **fields)))
    assert [event.name for event in heard if event.name not in ("progress", "preview")] == [
        "queued",
        "running",
        "succeeded",
    ]
    steps = [event.step or 0 for event in heard if event.name == "progress"]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6
    previews = [event.preview for event in heard if event.preview]
    assert len(previews) == 2
    assert Image.open(io.BytesIO(client.image(previews[0]))).format == "WEBP"
    assert heard[-1].ends
    assert heard[-1].generation == client.get(heard[-1].generation or "")


def test_a_picture_may_be_a_path_bytes_base64_or_of_pillow(client: Darkroom, tmp_path: Path):
    green = Image.new("RGB", (64, 64), (10, 200, 10))
    green.save(path := tmp_path / "green.png")
    given = (path, path.read_bytes(), exchange.as_json(None, {"image": path})["image"], green)
    made = [client.submit("a pear", image=one, mask=one, **BRIEF) for one in given]
    assert len({(one.parameters.image, one.parameters.mask) for one in made}) == 1
    for one in made:
        client.cancel(one)


def test_what_is_none_is_as_if_it_were_not_given(client: Darkroom):
    made = client.submit("a dog", seed=None, guidance={"rescale": 0.5, "clip": None}, loras=[], **BRIEF)
    assert made.parameters.guidance.asked == ["rescale"]
    client.cancel(made)


def test_cancel_ends_it_once(client: Darkroom):
    made = client.submit("a dog", **LONG)
    assert client.cancel(made).status == "canceled"
    assert client.cancel(made.id).status == "canceled"
    with pytest.raises(NotDrawn, match="canceled"):
        exchange.drawn(client.wait(made))
    done = client.generate("a dog", **BRIEF)
    with pytest.raises(Refused) as refused:
        client.cancel(done)
    assert refused.value.status == 409


def test_list_goes_through_all_pages(client: Darkroom, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exchange, "PAGE", 2)
    made = [client.submit("a dog", seed=i, **BRIEF).id for i in range(5)]
    for id in made:
        client.wait(id)
    listed = [one.id for one in client.list(status="succeeded", model="emoji-sd")]
    assert listed[:5] == made[::-1]
    assert listed == sorted(set(listed), reverse=True)


def test_models_says_what_there_is(client: Darkroom):
    (model,) = client.models()
    assert "inpaint" in model.tasks


def test_twenty_at_once_are_all_drawn(network: Proxy):
    async def all_at_once() -> list[bytes]:
        async with AsyncDarkroom(f"http://{network.address}") as client:
            made = await asyncio.gather(*[client.generate("a dog", seed=i, **BRIEF) for i in range(20)])
            files = await asyncio.gather(*[client.image(one.images[0]) for one in made])
            assert [one.parameters.seed for one in made] == [*range(20)]
            assert {one.id for one in made} <= {one.id async for one in client.list()}
            return files

    assert len(set(asyncio.run(all_at_once()))) == 20


# -- refused


def test_what_is_wrong_is_named(client: Darkroom):
    with pytest.raises(Refused) as refused:
        client.submit("a dog", scheduler="magic", num_inference_steps=0)
    assert refused.value.status == 422
    assert [error.field for error in refused.value.errors] == ["num_inference_steps"]
    with pytest.raises(Refused, match="scheduler"):
        client.submit("a dog", scheduler="magic")
    with pytest.raises(Refused, match="image"):
        client.submit("a dog", image="apple.png")
    with pytest.raises(Refused, match="404"):
        client.get("0" * 32)
    with pytest.raises(Refused, match="404"):
        next(client.watch("0" * 32))


def test_one_key_is_one_generation(client: Darkroom):
    first = client.submit("a dog", idempotency_key="of mine", **BRIEF)
    assert client.submit("a dog", idempotency_key="of mine", **BRIEF).id == first.id
    with pytest.raises(Refused, match="Idempotency"):
        client.submit("a cat", idempotency_key="of mine", **BRIEF)


# -- broken


def test_an_answer_lost_after_submission_draws_nothing_twice(client: Darkroom, network: Proxy):
    before = {one.id for one in client.list()}
    network.lose_answer_to(SUBMISSION)
    made = client.generate("a dog", **BRIEF)
    assert network.deaf is None
    assert {one.id for one in client.list()} - before == {made.id}


def test_a_request_that_never_arrived_is_sent_again(client: Darkroom, network: Proxy):
    before = {one.id for one in client.list()}
    network.cut_at(SUBMISSION)
    healing = later(0.5, network.heal)
    made = client.generate("a dog", **BRIEF)
    healing.join()
    assert {one.id for one in client.list()} - before == {made.id}


def assert_nothing_missed(steps: list[int | None]) -> None:
    """None twice, to the last; a busy worker may tell of some steps at once."""
    heard = [step for step in steps if step]
    assert heard == sorted(set(heard))
    assert heard[-1] == LONG["num_inference_steps"]


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_restart_of_the_server_in_the_middle_is_not_noticed(client: Darkroom, own: LocalService, how: str):
    api, steps = own.parts["api"], list[int | None]()
    for event in client.watch(made := client.submit("a dog", **LONG)):
        steps += [event.step] if event.name == "progress" else []
        if event.step == 5:
            api.stop() if how == "stop" else api.process.kill()
            api.process.wait()
            api.start()
    assert_nothing_missed(steps)
    assert client.get(made).status == "succeeded"
    api.wait(30)


def test_connections_that_break_again_and_again_are_not_noticed(client: Darkroom, network: Proxy):
    async def watched() -> list[int | None]:
        async with AsyncDarkroom(f"http://{network.address}") as client:
            steps, healing = list[int | None](), later(0, lambda: None)
            async for event in client.watch(await client.submit("a dog", **LONG)):
                steps += [event.step] if event.name == "progress" else []
                if event.step in (5, 20, 21, 40):
                    healing.join()
                    network.cut()
                    healing = later(0.2, network.heal)
            return steps

    steps = asyncio.run(watched())
    assert_nothing_missed(steps)


def test_a_busy_service_is_asked_again_when_it_says(client: Darkroom, redis: Proxy):
    redis.cut()
    healing = later(0.5, redis.heal)
    began = time.monotonic()
    made = client.submit("a dog", **BRIEF)
    assert 2 <= time.monotonic() - began < 5  # its Retry-After is 2
    healing.join()
    assert client.wait(made).status == "succeeded"


def test_patience_has_an_end(client: Darkroom, network: Proxy, redis: Proxy):
    redis.cut()
    with Darkroom(f"http://{network.address}", patience=1) as hasty, pytest.raises(Refused) as refused:
        hasty.submit("a dog", **BRIEF)
    redis.heal()
    assert (refused.value.status, refused.value.retry_after) == (503, 2)
    network.cut()
    with Darkroom(f"http://{network.address}", patience=1) as hasty, pytest.raises(Unreachable, match=network.address):
        hasty.submit("a dog", **BRIEF)
    with pytest.raises(Unreachable, match="protocol"), Darkroom("localhost:8000") as wrong:
        wrong.models()
    network.heal()
    until(lambda: client.generate("a dog", **BRIEF).status == "succeeded")


# -- what it is


def test_of_a_newer_service_what_is_not_known_is_left_out(client: Darkroom):
    made = json.loads(client.submit("a dog", **BRIEF).model_dump_json())
    made["parameters"]["guidance"]["gravity"] = made["parameters"]["weight"] = made["weight"] = 1.0
    asking = Exchanges(httpx2.Client(base_url="http://nobody"), 0).get(made["id"])
    next(asking)
    with pytest.raises(StopIteration) as answered:
        asking.send(httpx2.Response(200, json=made))
    assert answered.value.value.id == made["id"]


def test_who_is_somebody_else_is_not_believed():
    asking = Exchanges(httpx2.Client(base_url="http://nobody"), 0).get("0" * 32)
    request = next(asking).request
    with pytest.raises(Unreachable, match="does not answer as Darkroom does"):
        asking.send(httpx2.Response(200, html="<h1>Welcome</h1>", request=request))


def test_the_environment_says_where_and_who(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DARKROOM_URL", "http://darkroom.example")
    monkeypatch.setenv("DARKROOM_API_KEY", "secret")
    with Darkroom() as client:
        request = next(client._exchanges.models()).request
    assert (str(request.url), request.headers["authorization"]) == (
        "http://darkroom.example/v1/models",
        "Bearer secret",
    )


def test_every_field_of_a_request_may_be_given():
    assert {"prompt", *Fields.__annotations__} == set(GenerationRequest.model_fields)


def test_both_clients_have_the_same_methods():
    def methods(of: type) -> dict[str, list[inspect.Parameter]]:
        found = inspect.getmembers(of, inspect.isfunction)
        return {name: [*inspect.signature(it).parameters.values()] for name, it in found if not name.startswith("_")}

    assert methods(Darkroom) == methods(AsyncDarkroom)


def test_it_needs_nothing_of_the_service():
    heavy = ("torch", "fastapi", "rq", "redis", "PIL", "typer", "app.settings", "models")
    code = f"import sys, darkroom; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_type_checker_knows_what_may_be_asked_and_what_comes(tmp_path: Path):
    (tmp_path / "user.py").write_text(
        "from darkroom import AsyncDarkroom, Darkroom\n"
        "reveal_type(Darkroom().generate('a dog', seed=7).images[0].seed)\n"
        "reveal_type([event.step for event in Darkroom().watch('id')])\n"
        "Darkroom().submit('a dog', sead=7)\n"
        "Darkroom().submit('a dog', task='dream')\n"
        "async def main() -> None:\n"
        "    reveal_type(await AsyncDarkroom().get('id'))\n"
    )
    config = {
        "include": [str(tmp_path), str(ROOT / "darkroom")],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    checker = [str(Path(sys.executable).parent / "basedpyright"), "--outputjson", "-p", str(tmp_path)]
    checked = subprocess.run([*checker, "--pythonpath", sys.executable], capture_output=True, text=True)
    said = [
        (Path(it["file"]).name, it["severity"], it["message"])
        for it in json.loads(checked.stdout)["generalDiagnostics"]
    ]
    assert [message.rpartition(" is ")[2] for _, severity, message in said if severity == "information"] == [
        '"int"',
        '"list[int | None]"',
        '"Generation"',
    ]
    wrong = [(file, message) for file, severity, message in said if severity == "error"]
    assert [file for file, _ in wrong] == ["user.py", "user.py"]
    assert "sead" in wrong[0][1]
    assert "dream" in wrong[1][1]
