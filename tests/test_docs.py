"""The documentation says what the code does."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

import darkroom
from app.cli import cli
from app.fronts import a1111_request, fal, openai, replicate
from app.local import LocalService
from app.main import ROUTES
from app.schemas import PICTURES, GenerationRequest, Guidance, Problem
from app.settings import Settings, as_text
from models.catalog import CARDS, read_cards

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
FRONTS = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("openai", "replicate", "a1111", "fal")}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented_with_its_default(name: str):
    variable = "REDIS_URL" if name == "redis_url" else f"DARKROOM_{name.upper()}"
    row = re.search(rf"^\| `{variable}` \| (.*?) \| (.+) \|$", SETTINGS, re.M)
    assert row, f"{variable} is not in docs/settings.md"
    default = as_text(Settings.model_fields[name].default)
    assert row.group(1) == (f"`{default}`" if default else "")


def test_no_setting_is_documented_that_does_not_exist():
    named = set(re.findall(r"DARKROOM_([A-Z_]+[A-Z])", README + SETTINGS + (ROOT / "docker-compose.yml").read_text()))
    assert named <= {name.upper() for name in Settings.model_fields} | {"URL", "API_KEY"}


def test_every_endpoint_is_in_the_readme_or_on_its_fronts_page():
    routes = [route for module in ROUTES for route in module.router.routes if isinstance(route, APIRoute)]
    assert len(routes) > 20
    for route in routes:
        for method in route.methods:
            assert f"{method} {route.path}" in README + "".join(FRONTS.values())


@pytest.mark.parametrize("card", list(read_cards(CARDS)), ids=lambda card: card.name)
def test_every_model_is_in_the_readme(card):
    row = re.search(rf"^\| `{card.name}` .*$", README, re.M)
    assert row
    assert all(task in row.group() for task in card.tasks)


@pytest.mark.parametrize("field", [*GenerationRequest.model_fields, *Guidance.model_fields])
def test_every_field_of_a_request_is_in_the_readme(field: str):
    assert f"`{field}`" in README


def test_every_field_of_a_front_is_on_its_page():
    theirs = [*openai.ImageRequest.model_fields]
    assert [name for name in theirs if f"`{name}`" not in FRONTS["openai"]] == []
    theirs = [*replicate.OURS, *replicate.UNHEEDED, *replicate.PredictionRequest.model_fields]
    assert [name for name in theirs if f"`{name}`" not in FRONTS["replicate"]] == ["model", "stream"]
    assert [name for name in a1111_request.Drawing.model_fields if f"`{name}`" not in FRONTS["a1111"]] == []
    assert [name for name in (*fal.OURS, *fal.UNHEEDED, *fal.SHAPES) if f"`{name}`" not in FRONTS["fal"]] == []


# fal's client speaks HTTPS only
@pytest.mark.parametrize("page", ["openai", "replicate", "a1111", "quickstart", "recipes", "client"])
def test_the_code_on_a_page_runs(page: str, service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    blocks = re.findall(r"^```(.*?)\n(.*?)^```$", (ROOT / "docs" / f"{page}.md").read_text(), re.S | re.M)
    assert blocks
    names: dict[str, Any] = {}
    for language, block in blocks:
        assert language in ("python", "sh")
        code = block.replace("http://127.0.0.1:8000", service.url)
        if language == "python":
            exec(code, names)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)


def test_all_of_the_client_is_on_its_page():
    page = (ROOT / "docs" / "client.md").read_text()
    methods = [name for name in vars(darkroom.Darkroom) if not name.startswith("_")]
    assert sorted(re.findall(r"^\| `([a-z]+)\(", page, re.M)) == sorted(methods)
    fields = {name for method in ("submit", "list", "save", "image") for name in signature_of(method)}
    refused = vars(darkroom.Refused(Problem(type="", title="", status=0, detail="", errors=None)))
    for name in (
        *darkroom.__all__,
        *darkroom.Event._fields,
        "ends",
        *darkroom.Preview._fields[1:],
        *refused,
        *PICTURES,
    ):
        assert re.search(rf"`(darkroom\.)?{name}[`(]", page), name
    assert all(name in page for name in fields)


def signature_of(method: str) -> list[str]:
    return [name for name in inspect.signature(getattr(darkroom.Darkroom, method)).parameters if name != "self"]


@pytest.mark.parametrize("command", [c.name or c.callback.__name__ for c in cli.registered_commands if c.callback])
def test_every_command_is_in_the_readme(command: str):
    assert f"darkroom {command}" in README


def test_the_commands_of_the_makefile_are_the_ones_that_are_named():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", README + (ROOT / "CONTRIBUTING.md").read_text(), re.M))
    assert named <= targets
