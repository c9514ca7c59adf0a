"""What is told of a generation on its way, and how often."""

import time
from collections.abc import Iterator

import pytest
from redis import Redis

from app.events import Event, parse, stream
from workers.reporter import PAUSE, Reporter


@pytest.fixture
def reporter(connection: "Redis") -> Iterator[Reporter]:
    reporter = Reporter(connection)
    yield reporter
    reporter.close()


def told(connection: "Redis", generation: str = "g") -> list[Event]:
    return parse(connection.xrange(stream(generation)))


def test_of_the_steps_of_a_while_the_newest_is_told(
    reporter: Reporter, connection: "Redis", monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("workers.reporter.PAUSE", 600)
    for step in range(1, 101):
        for generation in ("g", "h"):
            reporter.report(generation, "progress", {"step": step, "steps": 100})
        time.sleep(0.001)
    reporter.catch_up()
    for generation in ("g", "h"):
        steps = [event.data["step"] for event in told(connection, generation)]
        assert steps[-1] == 100
        assert len(steps) <= 2  # what came first, and the newest when somebody waited for it


def test_what_comes_after_silence_is_told_at_once(reporter: Reporter, connection: "Redis"):
    reporter.report("g", "progress", {"step": 1, "steps": 4})
    reporter.catch_up()
    time.sleep(2 * PAUSE)
    reporter.report("g", "progress", {"step": 2, "steps": 4})
    deadline = time.monotonic() + 10
    while len(told(connection)) < 2:
        assert time.monotonic() < deadline
    assert [event.data["step"] for event in told(connection)] == [1, 2]


def test_every_stage_and_every_preview_is_told(reporter: Reporter, connection: "Redis"):
    for step, stage in enumerate(("prior", "prior", "decoder", "decoder"), 1):
        reporter.report("g", "progress", {"step": step, "steps": 4, "stage": stage})
        reporter.report("g", "preview", {"step": step})
    reporter.catch_up()
    heard = told(connection)
    assert {event.data["stage"] for event in heard if event.name == "progress"} == {"prior", "decoder"}
    assert [event.data["step"] for event in heard if event.name == "preview"] == [1, 2, 3, 4]


def test_a_preview_does_not_wait(reporter: Reporter, connection: "Redis", monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workers.reporter.PAUSE", 600)
    reporter.report("g", "progress", {"step": 1, "steps": 4})
    reporter.catch_up()
    deadline = time.monotonic() + 60
    for step in range(20):
        reporter.report("g", "preview", {"step": step})
        while len(told(connection)) < step + 2:
            assert time.monotonic() < deadline
    assert [event.data["step"] for event in told(connection) if event.name == "preview"] == list(range(20))


def test_the_last_words_are_sent_when_it_closes(connection: "Redis"):
    reporter = Reporter(connection)
    reporter.report("g", "progress", {"step": 1, "steps": 4})
    reporter.report("g", "progress", {"step": 2, "steps": 4})
    reporter.close()
    assert told(connection)[-1].data["step"] == 2
