"""`darkroom eval`: a suite of prompts over several models, scored by what is in the pictures."""

import json
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from typer.testing import CliRunner

from app.cli import cli
from app.evaluation import SUITES, Suite, picture_name, score, sheet
from app.local import LocalService
from models.catalog import WEIGHTS
from models.scoring import NEAR, Scorer, distance_from

TWO = """
title = "Two"
colours = { blue = [44, 108, 226] }
[[prompts]]
category = "colours"
prompt = "a red apple on a blue background"
background = "blue"
[[prompts]]
category = "things"
prompt = "a penguin"
"""


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.toml")), ids=lambda path: path.stem)
def test_the_backgrounds_of_a_suite_are_colours_that_it_has(path: Path):
    suite = Suite.read(path.stem)
    assert {one.background for one in suite.prompts if one.background} <= suite.colours.keys()
    assert len({one.prompt for one in suite.prompts}) == len(suite.prompts)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PartiPrompts.tsv", "Prompt\tCategory\tChallenge\na bowl, of soup\tFood\tBasic\nbond\tAbstract\tBasic\n"),
        ("drawbench.csv", 'Prompts,Category\n"a bowl, of soup",Food\nbond,Abstract\n'),
    ],
)
def test_public_prompt_lists_are_suites_as_they_come(name: str, text: str, tmp_path: Path):
    (tmp_path / name).write_text(text)
    suite = Suite.read(str(tmp_path / name))
    assert [(one.category, one.prompt) for one in suite.prompts] == [("Food", "a bowl, of soup"), ("Abstract", "bond")]


def test_a_table_with_a_short_row_says_what_is_missing(tmp_path: Path):
    (tmp_path / "words.csv").write_text("Prompt,Category\na cat\n")
    with pytest.raises(ValueError, match=r"category"):
        Suite.read(str(tmp_path / "words.csv"))


def test_a_table_without_prompts_says_what_it_needs(tmp_path: Path):
    (tmp_path / "words.csv").write_text("Word,Category\na,b\n")
    with pytest.raises(ValueError, match=r"needs the columns Prompt and Category; it has Word, Category"):
        Suite.read(str(tmp_path / "words.csv"))


def test_a_suite_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"there is no suite 'nope'; there are emoji"):
        Suite.read("nope")


def test_a_colour_is_judged_at_the_border():
    picture = Image.new("RGB", (64, 64), (40, 110, 220))
    picture.paste((255, 0, 0), (8, 8, 56, 56))
    assert distance_from(picture, (44, 108, 226)) < NEAR
    assert distance_from(picture, (255, 0, 0)) > 200


def test_the_right_picture_scores_higher_than_the_wrong_one(tmp_path: Path):
    gallery = {"apple": "a red apple on a blue background", "penguin": "a penguin"}
    (tmp_path / "two.toml").write_text(TWO)
    suite = Suite.read(str(tmp_path / "two.toml"))
    blue, white = Image.new("RGB", (128, 128), (44, 108, 226)), Image.new("RGB", (128, 128), "white")
    right = {one.category: one for one in score(suite, "m", [blue, white])}
    swapped = {one.category: one for one in score(suite, "m", [white, blue])}
    assert right["colours"].background == 1.0
    assert swapped["colours"].background == 0.0
    assert right["all"].agreement > swapped["all"].agreement
    assert right["things"].background is None
    assert len(gallery) == right["all"].pictures


def test_the_scorer_is_the_clip_that_ships():
    scorer = Scorer(WEIGHTS / "emoji-clip")
    captions = scorer.captions(["a dog", "a dog", "a red heart"])
    assert float(captions[0] @ captions[1]) == pytest.approx(1.0, abs=1e-5)
    assert float(captions[0] @ captions[2]) < 0.9


def test_a_sheet_shows_every_picture_and_escapes_what_it_is_given(tmp_path: Path):
    suite = Suite.model_validate({"title": "<b>", "prompts": [{"category": "c", "prompt": "<script>"}]})
    page = sheet(suite, ["one", "other"], [])
    assert "<script>" not in page
    assert page.count("<img") == 2
    assert picture_name("other", 0) in page


def test_models_are_drawn_and_scored_side_by_side(service: LocalService, tmp_path: Path):
    (tmp_path / "two.toml").write_text(TWO)
    out = tmp_path / "sheet"
    arguments = [
        "eval",
        str(tmp_path / "two.toml"),
        "--models",
        "emoji-sd,emoji-unclip",
        "--steps",
        "6",
        "-o",
        str(out),
    ]
    ran = CliRunner().invoke(cli, [*arguments, "--url", service.url])
    assert ran.exit_code == 0, ran.output
    scores = json.loads((out / "scores.json").read_text())
    assert [(one["model"], one["category"]) for one in scores] == [
        (model, category) for model in ("emoji-sd", "emoji-unclip") for category in ("colours", "things", "all")
    ]
    assert all(one["found"] == 1.0 for one in scores if one["model"] == "emoji-sd")
    assert scores[0]["background"] == 1.0
    assert len(list(out.glob("*.png"))) == 4
    assert "index.html" in {path.name for path in out.iterdir()}


def test_a_model_that_is_not_served_ends_it_with_the_services_own_words(service: LocalService, tmp_path: Path):
    (tmp_path / "two.toml").write_text(TWO)
    ran = CliRunner().invoke(cli, ["eval", str(tmp_path / "two.toml"), "--models", "nope", "--url", service.url])
    assert ran.exit_code == 1
    with httpx2.Client(base_url=service.url) as http:
        assert http.get("/livez").status_code == 200
