"""Real parts: a Valkey for whoever asks, and one whole service, with the shipped model, for all tests that share it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import Redis

from app.local import EmbeddedRedis, LocalService
from app.settings import Settings

# Two processes of tests, and the workers they start, share the cores. With more OpenMP threads than cores, each barrier
# of a pass waits for a thread that another process keeps from running: a pass of 40 ms took seconds.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """No test leaves gradients off for those after it, as a program dropped half-way can."""
    yield
    if torch := sys.modules.get("torch"):
        on = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        assert on, "gradients were left off"


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture
def connection(valkey: EmbeddedRedis) -> Iterator["Redis"]:
    """An empty database."""
    with Redis.from_url(valkey.url) as connection:
        connection.flushall()
        yield connection


def local_settings(data_dir: Path, **given: Any) -> Settings:
    """Workers that warm up with few rows: a pass of 28 takes a core a second, and each worker tries it four times."""
    brief = {"port": 0, "log_level": "warning", "log_format": "json", "max_rows": 4}
    return Settings(data_dir=data_dir, **(brief | given))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """API and one worker with the shipped model."""
    with LocalService(local_settings(tmp_path_factory.mktemp("service"))) as service:
        yield service


@pytest.fixture
def http(service: LocalService) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=service.url, timeout=60) as client:
        yield client
