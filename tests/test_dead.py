"""What failed can be read, and queued again."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rq.job import Job

from app.dead import dead, requeue, traceback_of
from app.errors import NotFound, NotRequeueable
from tests.lab import OWNER, Lab, Server, until
from tests.test_jobs import keys

NOBODY = "0" * 32


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("dead"))
    yield server
    server.stop()


@pytest.fixture
def lab(server: Server, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(server, tmp_path, {"max_attempts": 2})
    yield lab
    lab.close()


def test_those_that_failed_are_listed_whoever_owns_them_with_reason_and_attempts(lab: Lab):
    lab.worker()
    (crashed,), (unlucky,) = lab.put(crash=1), lab.put(fail=9, model="beta", priority="low", owner="bob")
    good, (expired,) = lab.put(2), lab.put(expires_in=1, age=10)
    lab.wait([crashed, unlucky], "failed")
    lab.wait(good)
    lab.connection.delete(Job.key_for(lab.put()[0]))
    letters = {letter.id: letter for letter in dead(lab.connection)}
    assert letters.keys() == {crashed, unlucky}
    assert (letters[crashed].model, letters[crashed].owner, letters[crashed].attempts) == ("alpha", OWNER, 1)
    assert letters[crashed].reason == lab.get(crashed).error
    assert letters[crashed].ended_at >= letters[crashed].created_at
    assert (letters[unlucky].model, letters[unlucky].owner, letters[unlucky].attempts) == ("beta", "bob", 2)
    assert letters[unlucky].reason.type == "out-of-luck"
    assert expired not in letters


def test_the_traceback_is_that_of_the_last_attempt(lab: Lab):
    lab.worker()
    (crashed,), (good,) = lab.put(crash=1), lab.put()
    lab.wait([crashed], "failed")
    lab.wait([good])
    until(lambda: not lab.executions(good))  # and what it ended with is written
    assert "ZeroDivisionError: of the program" in traceback_of(lab.connection, crashed)
    assert traceback_of(lab.connection, good) == ""
    for id in (NOBODY, "not an id"):
        with pytest.raises(NotFound):
            traceback_of(lab.connection, id)


def test_one_is_queued_again_under_its_id_and_ends_as_any_other(lab: Lab):
    worker = lab.worker()
    (id,) = lab.put(fail=3)
    lab.wait([id], "failed")
    before = lab.get(id)
    until(lambda: not lab.executions(id))
    worker.kill()
    lab.requeue(id)
    shown = lab.get(id)
    assert (shown.status, shown.error, shown.attempts, shown.position) == ("queued", None, 2, 0)
    assert shown.parameters == before.parameters
    assert lab.events(id) == ["queued"]
    assert lab.connection.ttl(Job.key_for(id)) == -1
    assert list(dead(lab.connection)) == []
    with pytest.raises(NotRequeueable, match="is queued"):
        requeue(lab.connection, id, max_attempts=2)
    lab.worker()
    lab.wait([id])  # the second of its two new attempts
    assert lab.get(id).attempts == 4
    assert lab.get(id).images
    lab.wait_events(id, ["queued", "running", "queued", "running", "succeeded"])
    until(lambda: not lab.left())
    assert [key for key in keys(lab.connection) if id in key and lab.connection.ttl(key) < 0] == []


def test_one_that_fails_again_is_dead_again(lab: Lab):
    lab.worker()
    (id,) = lab.put(crash=1)
    lab.wait([id], "failed")
    lab.requeue(id)
    lab.wait([id], "failed")
    lab.wait_events(id, ["queued", "running", "failed"])
    assert [letter.attempts for letter in dead(lab.connection)] == [2]


def test_only_what_has_failed_is_queued_again(lab: Lab):
    (waiting,), (canceled,) = lab.put(), lab.put()
    lab.jobs.cancel(canceled, OWNER)
    for id in (waiting, canceled):
        before = {key: lab.connection.dump(key) for key in keys(lab.connection)}
        with pytest.raises(NotRequeueable):
            requeue(lab.connection, id, max_attempts=2)
        assert {key: lab.connection.dump(key) for key in keys(lab.connection)} == before
    with pytest.raises(NotFound):
        requeue(lab.connection, NOBODY, max_attempts=2)


def test_one_whose_failure_is_not_wholly_written_yet_is_left(lab: Lab):
    (id,) = lab.put()
    lab.connection.lrem("rq:queue:alpha.normal", 0, id)
    lab.connection.hset(Job.key_for(id), "status", "failed")
    with pytest.raises(NotRequeueable):
        requeue(lab.connection, id, max_attempts=2)


@pytest.mark.parametrize("outcome", ["fail", "kill"])
def test_one_that_is_queued_again_the_moment_it_fails_goes_on(lab: Lab, outcome: str):
    """Whoever found that it failed writes down why a moment later, and must not fail it once more."""
    (id,) = lab.put(**{outcome: 2})
    if outcome == "kill":
        for _ in range(2):
            lab.worker(max_attempts=1).join(30)
    lab.worker(max_attempts=1)

    def queued_again() -> bool:
        try:
            requeue(lab.connection, id, max_attempts=2)
        except NotRequeueable:
            return False
        return True

    until(queued_again)
    lab.wait([id])
