"""The AUTOMATIC1111 web UI's API with `webuiapi`, unmodified, against a real server and model."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import webuiapi
from PIL import Image

from app.fronts.a1111 import facts
from app.local import LocalService


def api_of(service: LocalService) -> webuiapi.WebUIApi:
    host, _, port = service.url.removeprefix("http://").partition(":")
    return webuiapi.WebUIApi(host=host, port=int(port))


@pytest.fixture
def api(service: LocalService) -> Iterator[webuiapi.WebUIApi]:
    api = api_of(service)
    yield api
    api.set_options({"sd_model_checkpoint": "emoji-sd"})


def generation(service: LocalService, id: str) -> dict[str, Any]:
    return httpx2.get(f"{service.url}/v1/generations/{id}").json()


def test_a_prompt_becomes_pictures(api: webuiapi.WebUIApi, service: LocalService):
    made: Any = api.txt2img(
        prompt="a red apple", negative_prompt="blue", seed=7, batch_size=2, steps=6, cfg_scale=4, sampler_name="Euler a"
    )
    assert [image.size for image in made.images] == [(128, 128)] * 2  # it asks for 512, which the model does not draw
    assert (
        made.images[0].info["parameters"].startswith("a red apple\nNegative prompt: blue\nSteps: 6, Sampler: Euler a")
    )
    assert (made.info["all_seeds"], made.info["width"], made.info["sampler_name"]) == ([7, 8], 128, "Euler a")
    assert made.info["infotexts"][1].count("Seed: 8") == 1
    ours = generation(service, made.info["job_id"])["parameters"]
    assert (ours["guidance_scale"], ours["scheduler"], ours["num_inference_steps"]) == (4.0, "euler_a", 6)
    assert made.info["unheeded"] == []


def test_what_cannot_be_honoured_is_listed(api: webuiapi.WebUIApi):
    made: Any = api.txt2img(
        prompt="a [dog:cat:0.5] on a (red:1.3) \\(big\\) table",
        steps=2,
        tiling=True,
        restore_faces=True,
        enable_hr=True,
        styles=["mine"],
        subseed_strength=0.5,
        override_settings={"CLIP_stop_at_last_layers": 2},
        alwayson_scripts={"ADetailer": {"args": [True]}, "Quiet": {"args": []}},
    )
    assert made.info["prompt"] == "a dog:cat on a (red:1.3) \\(big\\) table"
    assert {
        "tiling",
        "restore_faces",
        "enable_hr",
        "styles",
        "subseed_strength",
        "override_settings.CLIP_stop_at_last_layers",
        "alwayson_scripts.ADetailer",
        "prompt editing",
    } <= set(made.info["unheeded"])
    assert "alwayson_scripts.Quiet" not in made.info["unheeded"]
    assert "hr_scale" not in api.txt2img(prompt="a dog", steps=1).info["unheeded"]


def test_words_have_weights_where_the_model_has_them(api: webuiapi.WebUIApi, service: LocalService):
    asked = {"prompt": "a (red:1.3) [apple] \\(ripe\\)", "negative_prompt": "((blue))", "steps": 2, "seed": 1}
    made: Any = api.txt2img(**asked)
    assert made.info["unheeded"] == []
    assert (made.info["prompt"], made.info["negative_prompt"]) == (asked["prompt"], asked["negative_prompt"])
    assert made.info["infotexts"][0].startswith(f"{asked['prompt']}\nNegative prompt: {asked['negative_prompt']}\n")
    ours = generation(service, made.info["job_id"])["parameters"]
    assert (ours["prompt"], ours["prompt_weights"]) == (asked["prompt"], True)
    plain: Any = api.txt2img(**asked | {"prompt": "a red apple", "negative_prompt": ""})
    assert generation(service, plain.info["job_id"])["parameters"]["prompt_weights"] is False
    without: Any = api.txt2img(**asked, override_settings={"sd_model_checkpoint": "emoji-glide"})
    assert without.info["unheeded"] == ["weights in the prompt"]
    assert (without.info["prompt"], without.info["negative_prompt"]) == ("a red apple (ripe)", "blue")


def test_a_picture_is_drawn_anew_and_only_where_the_mask_is_white(api: webuiapi.WebUIApi, service: LocalService):
    picture, mask = Image.new("RGB", (128, 128), "blue"), Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))
    anew: Any = api.img2img(images=[picture], prompt="a dog", denoising_strength=0.4, steps=5, seed=3)
    assert generation(service, anew.info["job_id"])["parameters"]["strength"] == 0.4
    for inverted, kept in ((0, (4, 100)), (1, (124, 100))):
        made: Any = api.img2img(
            images=[picture],
            mask_image=mask,
            inpainting_mask_invert=inverted,
            prompt="a red background",
            steps=8,
            seed=3,
        )
        assert generation(service, made.info["job_id"])["parameters"]["task"] == "inpaint"
        red, green, blue = made.image.convert("RGB").getpixel(kept)
        assert blue > 200
        assert max(red, green) < 60


def test_another_model_is_set_or_named(api: webuiapi.WebUIApi):
    titles = api.util_get_model_names()
    assert "emoji-glide" in " ".join(titles)
    assert api.util_get_current_model().startswith("emoji-sd [")
    api.util_set_model("emoji-glide")
    assert api.util_get_current_model().startswith("emoji-glide [")
    assert api.txt2img(prompt="a dog", steps=2).info["sd_model_name"] == "emoji-glide"
    named: Any = api.txt2img(prompt="a dog", steps=2, override_settings={"sd_model_checkpoint": "emoji-sd"})
    assert named.info["sd_model_name"] == "emoji-sd"


def test_what_there_is_is_listed(api: webuiapi.WebUIApi):
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(api.util_get_sampler_names())
    assert api.util_get_scheduler_names() == ["automatic"]
    assert "emoji-glide" in {one["name"] for one in api.get_upscalers()}
    assert api.get_scripts() == {"txt2img": [], "img2img": []}
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.refresh_checkpoints() is None
    for nothing in (
        api.get_loras,
        api.get_face_restorers,
        api.get_hypernetworks,
        api.get_sd_vae,
        api.get_prompt_styles,
    ):
        assert nothing() == []


def test_a_picture_is_enlarged_and_says_how_it_was_made(api: webuiapi.WebUIApi):
    made: Any = api.txt2img(prompt='a "red" apple, big', steps=2, seed=5)
    said = api.png_info(made.image)
    assert said.info.startswith('a "red" apple, big\nSteps: 2')
    assert said.parameters["Seed"] == "5"
    enlarged: Any = api.extra_single_image(Image.new("RGB", (64, 64), "teal"), upscaler_1="emoji-glide")
    assert enlarged.image.size == (128, 128)


def test_progress_is_seen_and_an_interruption_gives_what_there_is(api: webuiapi.WebUIApi, service: LocalService):
    answers = list[Any]()
    slow = {"prompt": "a dog", "steps": 100, "width": 256, "height": 256, "batch_size": 2, "seed": 1}
    asking = threading.Thread(target=lambda: answers.append(api_of(service).txt2img(**slow)))
    asking.start()
    deadline = time.monotonic() + 60
    while not (seen := api.get_progress())["current_image"]:
        assert time.monotonic() < deadline, seen
        time.sleep(0.1)
    assert 0 < seen["progress"] < 1
    assert seen["state"]["job_count"] == 1
    assert seen["state"]["sampling_steps"] == 100
    assert api.interrupt() is None
    asking.join(60)
    assert [image.size for image in answers[0].images] == [(256, 256)]
    assert generation(service, answers[0].info["job_id"])["status"] == "canceled"
    api.util_wait_for_ready(check_interval=0.1)
    assert api.skip() is None  # nothing to skip is no error


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"sampler_name": "nope"}, "sampler_name"),
        ({"batch_size": 1000}, "batch_size"),
        ({"override_settings": {"sd_model_checkpoint": "nope"}}, "override_settings.sd_model_checkpoint"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a (dog:5)"}, "prompt"),
        ({"negative_prompt": "a (dog:-1)"}, "negative_prompt"),
        ({"prompt": "a dog <lora:nope:0.5>"}, "loras.0.name"),
        ({"width": -1}, "width"),
        ({"steps": -1}, "steps"),
    ],
)
def test_a_wrong_field_is_named(api: webuiapi.WebUIApi, given: dict[str, Any], field: str):
    with pytest.raises(RuntimeError) as refused:
        api.txt2img(**{"prompt": "a dog", "steps": 1, **given})
    status, text = refused.value.args
    assert status == 422
    assert json.loads(text)["errors"].startswith(f"{field}: ")


def test_other_mistakes_are_told_in_the_web_uis_way(api: webuiapi.WebUIApi, service: LocalService):
    url = f"{service.url}/sdapi/v1"
    assert httpx2.get(f"{url}/artists").json()["error"] == "not-found"
    assert httpx2.post(f"{url}/img2img", json={"prompt": "a dog"}).json()["errors"] == "init_images: needs a picture"
    assert httpx2.post(f"{url}/img2img", json={"init_images": ["x"], "mask": "y"}).status_code == 422
    assert httpx2.post(f"{url}/options", json={"samples_format": "webp"}).json()["errors"].startswith("samples_format")
    assert httpx2.post(f"{url}/png-info", json={"image": "eA=="}).status_code == 422
    assert httpx2.post(f"{url}/txt2img", json=[]).status_code == 400
    for odd in ([], {"args": 7}, {"args": ["x"]}):
        asked = {"prompt": "a dog <lora:a:1.2.3>", "steps": 1, "alwayson_scripts": {"ControlNet": odd}}
        assert httpx2.post(f"{url}/txt2img", json=asked, timeout=60).status_code == 200


def test_a_text_that_is_no_infotext_is_given_as_it_stands():
    assert facts('a dog\nSteps: 2, Note: "\\q", Seed: 5') == {"Steps": "2", "Note": '"\\q"', "Seed": "5"}
