"""Settings are read once; what is wrong stops the start, and says which it was."""

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app import settings
from app.settings import PREFIX, Settings, read_settings, unknown_variables

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch):
    for name in os.environ:
        if name.startswith(PREFIX) or name == "REDIS_URL":
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["DARKROOM_MODLES", "DARKROOM_", "DARKROOM_REDIS_URL", "darkroom_port"])
def test_an_unknown_variable_stops_the_start_and_is_named(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "x")
    with pytest.raises(SystemExit, match=f"unknown setting: {name}$"):
        read_settings()


def test_variables_of_others_do_not_matter():
    assert unknown_variables({"PORT": "x", "DARKROOMS": "x", "DARKROOM_URL": "x", "DARKROOM_API_KEY": "x"}) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("MODELS", " , "),
        ("PINNED_MODELS", "sdxl"),
        ("DEVICE", "gpu"),
        ("MEMORY_MIB", "-1"),
        ("MAX_BODY_MIB", "0"),
        ("MAX_BODY_MIB", "inf"),
        ("MAX_BODY_MIB", "nan"),
        ("API_KEYS", "ann"),
        ("API_KEYS", "ann=the key itself"),
        ("API_KEYS", f"={DIGEST}"),
        ("CARDS_DIR", "/no/such/folder"),
        ("JOB_TIMEOUT", "0"),
        ("RESULT_TTL", "-1"),
        ("RESULT_TTL", "an hour"),
        ("MAX_WAIT", "-1"),
        ("MAX_ATTEMPTS", "0"),
        ("LEASE", "2.5"),
        ("LOG_LEVEL", "INFO"),
        ("LOG_FORMAT", "xml"),
        ("FSYNC", "no"),
        ("STEP_TIMEOUT", "-1"),
        ("WEBHOOK_SECRET", "the key itself"),
        ("WEBHOOK_SECRET", "whsec_c2hvcnQ="),
        ("WEBHOOK_SECRET", "c2VjcmV0" * 4),
        ("WEBHOOK_ALLOW", "10.0.0.1/8"),
        ("WEBHOOK_ALLOW", "10.0.0.0/8,*"),
        ("WEBHOOK_ALLOW", "10.0.0"),
    ],
)
def test_a_wrong_value_stops_the_start_and_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(SystemExit, match=f"wrong setting: {PREFIX}{name}: ") as stopped:
        read_settings()
    assert "the key itself)" in str(stopped.value) or "the key itself" not in str(stopped.value)


def test_all_wrong_values_are_named_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DARKROOM_PORT", "x")
    monkeypatch.setenv("DARKROOM_LEASE", "1")
    with pytest.raises(SystemExit, match=r"DARKROOM_PORT: .*; DARKROOM_LEASE: "):
        read_settings()


def test_an_empty_variable_is_no_value(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DARKROOM_PORT", "")
    monkeypatch.setenv("DARKROOM_MODELS", "")
    assert read_settings() == Settings()


def test_what_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DARKROOM_PORT", "1")
    monkeypatch.setenv("DARKROOM_HOST", "0.0.0.0")
    read = read_settings(port=2, host=None)
    assert (read.port, read.host) == (2, "0.0.0.0")


def test_the_url_of_redis_has_its_usual_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REDIS_URL", "redis://elsewhere")
    assert read_settings().redis_url == "redis://elsewhere"


@pytest.mark.parametrize("text", ["90", "90.0", "PT1M30S", "00:01:30"])
def test_a_duration_is_seconds_or_iso_8601(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("DARKROOM_RESULT_TTL", text)
    assert read_settings().result_ttl == timedelta(seconds=90)


def test_names_and_keys_are_lists_with_commas(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DARKROOM_MODELS", "emoji-sd, sdxl,")
    monkeypatch.setenv("DARKROOM_API_KEYS", f"ann={DIGEST.upper()},bob = {DIGEST}")
    read = read_settings()
    assert read.models == ("emoji-sd", "sdxl")
    assert read.api_keys == (("ann", DIGEST), ("bob", DIGEST))


EVERY_KIND: dict[str, Any] = {
    "data_dir": Path("elsewhere"),
    "blob_url": "s3://bucket/prefix",
    "fsync": "always",
    "cards_dir": Path(__file__).parent,
    "models": ("emoji-sd", "sdxl"),
    "pinned_models": ("sdxl",),
    "device": "cuda:1",
    "dtype": "float32",
    "memory_mib": 1000,
    "graphs": False,
    "torch_threads": 2,
    "journal_interval": 0.5,
    "journal_mib": 8.0,
    "stop_grace": 5.0,
    "host": "0.0.0.0",
    "port": 0,
    "api_processes": 2,
    "api_keys": (("ann", DIGEST), ("bob", DIGEST)),
    "max_body_mib": 0.5,
    "max_image_pixels": 1,
    "webhook_secret": "whsec_" + "c2VjcmV0" * 4,
    "webhook_allow": ("10.0.0.0/8", "::1", "hooks.internal"),
    "max_wait": timedelta(seconds=1.5),
    "max_listeners": 7,
    "max_decodes": 1,
    "client_timeout": timedelta(seconds=2),
    "redis_timeout": 0.1,
    "max_queued": 1,
    "max_queued_seconds": timedelta(minutes=1),
    "job_timeout": timedelta(days=2),
    "result_ttl": timedelta(seconds=1),
    "max_attempts": 1,
    "judge": Path("/"),
    "lease": 2,
    "step_timeout": 2.0,
    "warm_bonus": 0.0,
    "max_rows": 4,
    "overbooking": 1.5,
    "preview_size": 16,
    "worker_port": 9000,
    "log_format": "json",
    "log_level": "debug",
}


def test_every_setting_reaches_another_process(monkeypatch: pytest.MonkeyPatch):
    assert EVERY_KIND.keys() == Settings.model_fields.keys() - {"redis_url"}  # that one is passed on by itself
    given = Settings(**EVERY_KIND)
    for name, value in given.environment().items():
        monkeypatch.setenv(name, value)
    assert read_settings() == given


def test_what_was_not_set_is_not_passed_on(monkeypatch: pytest.MonkeyPatch):
    assert Settings().environment() == {}
    assert Settings(blob_url=None, api_keys=()).environment() == {"DARKROOM_API_KEYS": ""}
    monkeypatch.setenv("DARKROOM_LEASE", "5")
    assert read_settings().environment() == {"DARKROOM_LEASE": "5"}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_has_a_comment_with_its_reason(name: str):
    source = Path(settings.__file__ or "").read_text()
    assert re.search(rf"^    {name}: .*  # \S.{{10,}}$", source, re.M)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("part", ["api", "worker", "up"])
def test_each_part_refuses_to_start(part: str):
    environment = os.environ | {"DARKROOM_MODLES": "x", "REDIS_URL": "redis://localhost:1"}
    ended = subprocess.run([sys.executable, "-m", "app.cli", part], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip() == "unknown setting: DARKROOM_MODLES"
