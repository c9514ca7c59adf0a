"""The whole service under a mixed load: two models, every task, cancels; API and two workers as processes."""

import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from PIL import Image, ImageChops
from redis import Redis

from app.local import LocalService
from tests import tiny
from tests.conftest import local_settings

CARD = """
name = "tiny"
title = "Random weights"
description = "Draws noise, quickly."
family = "diffusers"
licence = "none"
licence_url = "about:blank"
tasks = ["text-to-image", "image-to-image"]
schedulers = ["ddim", "euler", "unipc"]
memory_mib = 20
source = {{ kind = "folder", path = "{folder}" }}
size = {{ width = 32, height = 32, minimum = 16, maximum = 64, multiple_of = 8 }}
limits = {{ n = 4, num_inference_steps = 50, guidance_scale = 20.0, prompt_tokens = 77 }}
defaults = {{ num_inference_steps = 5, guidance_scale = 3.0, scheduler = "ddim", strength = 0.6 }}
"""


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save(tiny.stable_diffusion(), folder / "weights")
    (folder / "tiny.toml").write_text(CARD.format(folder=folder / "weights"))
    settings = local_settings(
        tmp_path_factory.mktemp("two"), models=("emoji-sd", "tiny"), cards_dir=folder, torch_threads=1, warm_bonus=2
    )
    with LocalService(settings, workers=2) as service:
        yield service


def picture(size: tuple[int, int], colour: str, mode: str = "RGB") -> str:
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, "png")
    return base64.b64encode(data.getvalue()).decode()


def mixed(i: int, rng: random.Random) -> dict:
    """One of many kinds of request."""
    steps, seed = rng.choice([2, 3, 4, 6]), rng.randrange(1000)
    request = {"prompt": f"a dog, number {i}", "num_inference_steps": steps, "seed": seed}
    request["guidance_scale"] = rng.choice([1.0, 3.0, 4.5])
    request["priority"] = rng.choice(["high", "normal", "low"])
    request["output_format"] = rng.choice(["png", "jpeg", "webp", "avif"])
    if rng.random() < 0.4:
        request["model"] = "tiny"
        request["scheduler"] = rng.choice(["ddim", "euler", "unipc"])
        if rng.random() < 0.3:
            request |= {"image": picture((32, 32), "blue"), "strength": 0.7}
        return request
    request["scheduler"] = rng.choice(["dpmpp_2m", "dpmpp_2m_sde", "ddim", "euler", "euler_a", "heun", "deis", "unipc"])
    request["width"] = rng.choice([64, 96, 128])
    request["reproducible"] = rng.random() < 0.1
    request["n"] = rng.choice([1, 1, 1, 2])
    if rng.random() < 0.2:
        request |= {"image": picture((128, 128), "green"), "strength": 0.6}
        if rng.random() < 0.5:
            request["mask"] = picture((128, 128), "white", "L")
    return request


def finished(http: httpx2.Client, body: dict) -> dict:
    """The generation when it has ended, however busy this machine is."""
    answer = http.post("/v1/generations", json=body, headers={"Prefer": "wait=60"})
    assert not answer.is_error, answer.text
    generation = answer.json()
    while generation["status"] in ("queued", "running"):
        time.sleep(0.2)
        generation = http.get(f"/v1/generations/{generation['id']}").json()
    return generation


def test_a_burst_of_mixed_requests_ends_with_every_id_in_a_right_state(two_models: LocalService):
    count, rng = 100, random.Random(2)
    requests = [mixed(i, rng) for i in range(count)]
    cancels = set(rng.sample(range(count), 15))

    with httpx2.Client(base_url=two_models.url, timeout=120) as http, ThreadPoolExecutor(8) as clients:

        def submit(i: int) -> str:
            answer = http.post("/v1/generations", json=requests[i])
            assert answer.status_code == 202, answer.text
            return answer.json()["id"]

        ids = list(clients.map(submit, range(count)))
        canceled = {i: http.delete(f"/v1/generations/{ids[i]}").status_code for i in cancels}
        for i in range(count):
            with http.stream("GET", f"/v1/generations/{ids[i]}/events", timeout=180) as events:
                for _ in events.iter_lines():
                    pass
        ended = [http.get(f"/v1/generations/{id}").json() for id in ids]

        for i, generation in enumerate(ended):
            if canceled.get(i) == 200:
                assert generation["status"] == "canceled"
                continue
            assert generation["status"] == "succeeded", (requests[i], generation["error"])
            assert generation["attempts"] == 1
            assert len(generation["images"]) == requests[i].get("n", 1)
            for shown in generation["images"]:
                data = http.get(shown["url"])
                with Image.open(io.BytesIO(data.content)) as image:
                    image.load()
                    assert image.size == (shown["width"], shown["height"])
                    assert image.format == requests[i]["output_format"].upper()
        assert Counter(g["status"] for g in ended)["canceled"] > 0
    with Redis.from_url(two_models.redis_url) as redis:
        left = {key for key in redis.scan_iter("rq:wip:*") if redis.zcard(key)} | set(redis.scan_iter("rq:queue:*"))
    assert not left, "leases or queued jobs are left over"


def test_both_models_were_drawn_in_one_process(two_models: LocalService):
    """Each worker serves whatever is asked for: the cold model is loaded beside the warm one."""
    with httpx2.Client(base_url=two_models.url, timeout=120) as http:
        for model in ("tiny", "emoji-sd", "tiny"):
            body = {"model": model, "prompt": "a dog", "num_inference_steps": 2}
            done = finished(http, body)
            assert done["status"] == "succeeded", done


def test_the_same_request_gives_the_same_bytes_alone_and_under_load(service: LocalService):
    """End to end: the exact lane, through processes, queue and file."""
    exact = {"prompt": "a penguin", "num_inference_steps": 6, "seed": 3, "reproducible": True}
    other = {"prompt": "a car on a yellow background", "num_inference_steps": 9, "guidance_scale": 4}

    with httpx2.Client(base_url=service.url, timeout=120) as http, ThreadPoolExecutor(8) as clients:

        def draw(body: dict) -> bytes:
            return http.get(finished(http, body)["images"][0]["url"]).content

        alone = draw(exact)
        crowd = [clients.submit(draw, other | {"seed": seed}) for seed in range(4)]
        again = clients.submit(draw, exact)
        crowd += [clients.submit(draw, other | {"seed": 9 + seed, "scheduler": "euler_a"}) for seed in range(3)]
        assert again.result() == alone
        assert len({future.result() for future in crowd}) == len(crowd)


def test_every_model_that_ships_draws_what_it_is_for(service: LocalService):
    """A picture by its class, varied, and on the way to another: three models, one service, one schema."""
    with httpx2.Client(base_url=service.url, timeout=120) as http:
        pulled = {
            "model": "emoji-classes",
            "prompt": "apple",
            "num_inference_steps": 6,
            "guidance": {"classifier": 2.0},
        }
        apple = finished(http, pulled)
        assert apple["status"] == "succeeded", apple
        picture = base64.b64encode(http.get(apple["images"][0]["url"]).content).decode()
        by_clip = {"model": "emoji-unclip", "num_inference_steps": 3}
        varied = finished(http, by_clip | {"task": "variation", "image": picture})
        between = finished(http, by_clip | {"image": picture, "end_prompt": "a penguin", "mix": 0.25})
        assert (varied["status"], between["status"]) == ("succeeded", "succeeded"), (varied, between)
        assert between["parameters"]["task"] == "interpolate"
        assert between["parameters"]["end_prompt"] == "a penguin"
        assert between["progress"] == {"step": 11, "steps": 11, "stage": None}  # eight of them the prior's
        drawn = finished(http, by_clip | {"prompt": "a penguin"})
        stages = [
            json.loads(line.partition(": ")[2]).get("stage")
            for line in http.get(f"/v1/generations/{drawn['id']}/events").text.splitlines()
            if line.startswith("data") and "steps" in line
        ]
        assert "prior" in stages
        assert stages[-1] is None


def test_a_language_model_reads_and_transformers_write(service: LocalService):
    with httpx2.Client(base_url=service.url, timeout=240) as http:
        dog = finished(http, {"model": "emoji-imagen", "prompt": "a pooch", "num_inference_steps": 4})
        assert dog["status"] == "succeeded", dog
        for model, given in (("emoji-dalle", {"best_of": 2}), ("emoji-parti", {"preview_every": 100})):
            apple = finished(http, {"model": model, "prompt": "a red apple", "guidance_scale": 1.0} | given)
            assert apple["status"] == "succeeded", apple
            assert apple["progress"] == {"step": 256, "steps": 256, "stage": None}
            assert Image.open(io.BytesIO(http.get(apple["images"][0]["url"]).content)).size == (128, 128)


def test_pixel_models_draw_repaint_and_enlarge(service: LocalService):
    with httpx2.Client(base_url=service.url, timeout=120) as http:
        by_glide = {"model": "emoji-glide", "num_inference_steps": 4, "seed": 1}
        apple = finished(
            http, by_glide | {"prompt": "a red apple", "guidance": {"clip": 1.0, "dynamic_threshold": 0.99}}
        )
        assert apple["status"] == "succeeded", apple
        assert apple["progress"] == {"step": 12, "steps": 12, "stage": None}  # eight of them the upsampler's

        def fetched(generation: dict) -> Image.Image:
            return Image.open(io.BytesIO(http.get(generation["images"][0]["url"]).content)).convert("RGB")

        def sent(image: Image.Image) -> str:
            file = io.BytesIO()
            image.save(file, "PNG")
            return base64.b64encode(file.getvalue()).decode()

        before = fetched(apple)
        mask = Image.new("L", before.size, 0)
        mask.paste(255, (40, 40, 90, 90))
        repainted = finished(http, by_glide | {"prompt": "a lemon", "image": sent(before), "mask": sent(mask)})
        enlarged = finished(http, by_glide | {"task": "upscale", "image": sent(before.resize((64, 64)))})
        assert (repainted["status"], enlarged["status"]) == ("succeeded", "succeeded"), (repainted, enlarged)
        after = fetched(repainted)
        left, top, right, bottom = ImageChops.difference(before, after).getbbox()
        assert left >= 40 and top >= 40 and right <= 90 and bottom <= 90  # noqa: PT018
        assert fetched(enlarged).size == (128, 128)
        assert enlarged["progress"]["steps"] == 8


def test_what_a_model_cannot_do_is_refused_before_the_queue(service: LocalService):
    asked = {"model": "emoji-sd", "prompt": "a dog", "task": "variation", "guidance": {"classifier": 1, "clip": 2}}
    with httpx2.Client(base_url=service.url, timeout=30) as http:
        refused = http.post("/v1/generations", json=asked)
        assert refused.status_code == 422
        wrong = {error["field"]: error["detail"] for error in refused.json()["errors"]}
        assert wrong.keys() == {"image", "task", "guidance.clip", "guidance.classifier"}
        assert wrong["task"] == "emoji-sd does not do variation"
        shown = http.get("/v1/models/emoji-classes").json()
        assert "classifier" in shown["guidance"]
        assert "owl" in shown["classes"]


def test_bytes_never_go_through_redis(service: LocalService, tmp_path: Path):
    body = {"prompt": "a dog", "num_inference_steps": 2, "image": picture((128, 128), "red"), "strength": 1.0}
    with httpx2.Client(base_url=service.url, timeout=120) as http, Redis.from_url(service.redis_url) as redis:
        done = finished(http, body)
        assert done["status"] == "succeeded", done
        for key in redis.scan_iter(f"*{done['id']}*"):
            dumped = redis.dump(key) or b""
            assert b"PNG" not in dumped
            assert len(dumped) < 20_000
