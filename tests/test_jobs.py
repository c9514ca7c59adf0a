"""The API's side of the queue, with no worker: what Redis holds, for how long, and at what cost it is asked."""

import base64
import importlib.util
import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from redis import Redis
from redis.exceptions import OutOfMemoryError
from rq import Queue
from rq.job import Job

from app import events, jobs
from app.errors import IdempotencyConflict, InvalidRequest, NotCancelable, NotFound, QueueFull
from app.jobs import Jobs, Pace, pace_key
from app.schemas import GenerationRequest
from app.storage import input_key
from tests.lab import OWNER, QUEUES, Lab, Server, until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("jobs"))
    yield server
    server.stop()


@pytest.fixture
def lab(server: Server, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(server, tmp_path)
    yield lab
    lab.close()


def asked(text: str = "a cat", **more: Any) -> GenerationRequest:
    return GenerationRequest(**({"model": "alpha", "prompt": text} | more))


def png() -> bytes:
    data = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(data, "png")
    return data.getvalue()


def keys(connection: "Redis") -> set[str]:
    return {key.decode() for key in connection.scan_iter(count=1000)}


def commands(connection: "Redis") -> dict[str, int]:
    """How often each was called since `config_resetstat`."""
    calls = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in connection.info("commandstats").items()}
    return {name: count for name, count in calls.items() if name not in ("config|resetstat", "info")}


# -- in


def test_a_request_is_queued_in_one_round_trip(lab: Lab):
    lab.put()
    lab.connection.config_resetstat()
    lab.put()
    sent = commands(lab.connection)
    assert {name: sent[name] for name in ("evalsha", "hset", "rpush", "zadd", "xadd", "publish")} == {
        "evalsha": 1,
        "hset": 1,
        "rpush": 1,
        "zadd": 1,
        "xadd": 1,
        "publish": 1,
    }
    assert sum(sent.values()) <= 20


def test_a_submission_that_redis_has_no_room_for_leaves_nothing(lab: Lab):
    lab.jobs.connection = Redis.from_url(lab.server.url)  # a client's, not as patient as a worker's
    lab.connection.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            lab.put()
    finally:
        lab.connection.config_set("maxmemory", 0)
    assert keys(lab.connection) == set()


def test_rqs_own_tools_read_what_was_queued(lab: Lab):
    (id,) = lab.put()
    queue = Queue("alpha.normal", connection=lab.connection, serializer=jobs.JSONSerializer)
    (job,) = queue.jobs
    assert queue in Queue.all(connection=lab.connection)
    assert (job.id, job.get_status(), job.origin, job.description) == (id, "queued", queue.name, "alpha")
    assert job.enqueued_at == job.created_at == lab.get(id).created_at
    assert (job.started_at, job.worker_name, job.retries_left, job.enqueue_at_front_on_retry) == (None, None, 4, True)
    assert (job.timeout, job.result_ttl, job.failure_ttl) == (1800, 3600, 3600)


def test_the_function_that_rq_names_is_never_there_to_import(lab: Lab):
    (id,) = lab.put()
    name = Job.fetch(id, connection=lab.connection, serializer=jobs.JSONSerializer).func_name
    assert name == "generations.draw"
    assert importlib.util.find_spec(name.partition(".")[0]) is None


def test_bytes_of_pictures_are_in_the_store_and_never_in_redis(lab: Lab):
    image = png()
    mask = io.BytesIO()
    Image.new("L", (64, 64), 255).save(mask, "png")
    body = asked(image=base64.b64encode(image).decode(), mask=base64.b64encode(mask.getvalue()).decode())
    generation, _ = lab.jobs.submit(body, OWNER, "a key")
    for field in ("image", "mask"):
        assert lab.blobs.open(input_key(generation.id, field)).startswith(b"\x89PNG")
        assert getattr(generation.parameters, field).startswith("sha256:")
    for key in keys(lab.connection):
        dump = lab.connection.dump(key)
        assert dump is not None
        assert len(dump) < 4096
    record = Job.fetch(generation.id, connection=lab.connection, serializer=jobs.JSONSerializer)
    assert base64.b64encode(image).decode()[:40] not in str(record.kwargs)
    assert b"PNG" not in record.data


def test_a_full_queue_accepts_nothing_and_says_when_to_come_back(lab: Lab):
    full = lab.with_settings(max_queued=3)
    for priority in ("high", "normal", "low"):
        full.submit(asked(priority=priority), OWNER)
    before = keys(lab.connection)
    with pytest.raises(QueueFull) as refused:
        full.submit(asked(), OWNER)
    assert refused.value.headers["Retry-After"] == "10"  # nobody knows
    pace(lab, rows_per_second=2, rows_per_job=40)
    with pytest.raises(QueueFull) as refused:
        full.submit(asked(), OWNER)
    assert refused.value.headers["Retry-After"] == "20"
    assert keys(lab.connection) == before | {pace_key("alpha")}
    full.submit(asked(model="beta"), OWNER)  # each model has its own queue


def test_a_queue_that_would_take_too_long_accepts_nothing_more_once_workers_have_said_how_fast_they_are(lab: Lab):
    slow = lab.with_settings(max_queued_seconds=60)
    for _ in range(4):  # who should know how long they take?
        slow.submit(asked(), OWNER)
    pace(lab, rows_per_second=2, rows_per_job=40)  # 20 s each
    with pytest.raises(QueueFull) as refused:
        slow.submit(asked(), OWNER)
    assert refused.value.headers["Retry-After"] == "20"
    pace(lab, rows_per_second=1, rows_per_job=40)
    with pytest.raises(QueueFull) as refused:
        slow.submit(asked(), OWNER)
    assert refused.value.headers["Retry-After"] == "100"  # 160 s of work, and 60 may wait
    pace(lab, rows_per_second=4, rows_per_job=40)
    slow.submit(asked(), OWNER)
    assert lab.connection.llen("rq:queue:alpha.normal") == 5


def test_pictures_are_decoded_a_few_at_a_time(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    few, at_once, most = lab.with_settings(max_decodes=2), [], []
    decode = jobs.read_image

    def counted(*arguments: Any) -> Image.Image:
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.01)
        image = decode(*arguments)
        at_once.pop()
        return image

    monkeypatch.setattr(jobs, "read_image", counted)
    body = asked(image=base64.b64encode(png()).decode())
    with ThreadPoolExecutor(10) as pool:
        assert len({generation.id for generation, _ in pool.map(lambda _: few.submit(body, OWNER), range(20))}) == 20
    assert max(most) == 2


def test_a_model_that_there_is_not(lab: Lab):
    with pytest.raises(InvalidRequest, match="there is no 'gamma'; there are alpha, beta"):
        lab.jobs.submit(asked(model="gamma"), OWNER)


# -- once is enough


def test_the_same_key_and_body_give_the_first_answer_again(lab: Lab):
    first, replayed = lab.jobs.submit(asked(), OWNER, "key")
    again, replayed_again = lab.jobs.submit(asked(), OWNER, "key")
    assert (replayed, replayed_again) == (False, True)
    assert again.id == first.id
    assert again.parameters == first.parameters  # its seed too
    assert lab.connection.llen("rq:queue:alpha.normal") == 1


def test_a_key_is_for_one_body_and_one_caller(lab: Lab):
    first, _ = lab.jobs.submit(asked(), OWNER, "key")
    with pytest.raises(IdempotencyConflict):
        lab.jobs.submit(asked("a dog"), OWNER, "key")
    other, replayed = lab.jobs.submit(asked("a dog"), "bob", "key")
    assert not replayed
    assert other.id != first.id


def test_a_key_whose_generation_was_forgotten_is_free(lab: Lab):
    first, _ = lab.jobs.submit(asked(), OWNER, "key")
    lab.connection.delete(Job.key_for(first.id))
    again, replayed = lab.jobs.submit(asked(), OWNER, "key")
    assert not replayed
    assert again.id != first.id


def test_of_many_at_once_with_one_key_one_is_queued(lab: Lab):
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: lab.jobs.submit(asked(), OWNER, "key"), range(20)))
    assert len({generation.id for generation, _ in answers}) == 1
    assert sorted(replayed for _, replayed in answers) == [False] + [True] * 19
    assert lab.connection.llen("rq:queue:alpha.normal") == 1
    assert lab.connection.zcard(jobs.index_key(OWNER)) == 1


# -- out


def pace(lab: Lab, worker: str = "w", alive: bool = True, **measured: float) -> None:
    until = time.time() + (30 if alive else -1)
    lab.connection.hset(pace_key("alpha"), worker, jobs.json.dumps(Pace(until, **measured)))


def test_position_and_eta_follow_the_queue_and_the_pace_of_workers_that_live(lab: Lab):
    first, second, last = lab.put(3, n=2, steps=10, guidance_scale=3.0)  # 40 rows each
    (urgent,) = lab.put(priority="high")
    assert lab.get(second).eta is None  # who should know?
    pace(lab, "a", rows_per_second=10, rows_per_job=40)
    pace(lab, "b", rows_per_second=10, rows_per_job=40)
    pace(lab, "dead", alive=False, rows_per_second=1000, rows_per_job=1)
    assert [lab.get(id).position for id in (urgent, first, second, last)] == [0, 1, 2, 3]
    assert lab.get(first).eta == pytest.approx((1 * 40 + 40) / 20)
    assert lab.get(last).eta == pytest.approx((3 * 40 + 40) / 20)
    lab.connection.lrem("rq:queue:alpha.normal", 1, last)  # popped a moment ago
    assert lab.get(last).position == 0


def test_progress_and_the_time_that_remains_come_from_the_newest_event(lab: Lab):
    (id,) = lab.put(steps=10)
    started = jobs.utcformat(jobs.datetime.now(jobs.UTC) - timedelta(seconds=4))
    lab.connection.hset(Job.key_for(id), mapping={"status": "started", "started_at": started})
    with lab.connection.pipeline() as pipe:
        events.record(pipe, id, "progress", {"step": 4, "steps": 10})
        pipe.execute()
    shown = lab.get(id)
    assert (shown.progress.step, shown.progress.steps) == (4, 10)
    assert shown.eta == pytest.approx(6, abs=0.5)


def test_a_poll_is_one_round_trip(lab: Lab):
    (id,) = lab.put()
    lab.connection.hset(Job.key_for(id), mapping={"status": "started"})
    lab.connection.config_resetstat()
    lab.get(id)
    assert commands(lab.connection) == {"evalsha": 1, "time": 1, "hmget": 1, "xrevrange": 1}


def test_a_poll_of_a_queued_one_finds_its_place_by_halving_the_queue(lab: Lab):
    ids = [*lab.put(40, priority="low"), *lab.put(3, priority="high")]
    lab.connection.config_resetstat()
    assert lab.get(ids[20]).position == 23
    used = commands(lab.connection)
    assert used.pop("lindex") <= 6
    assert used == {"evalsha": 1, "time": 1, "hmget": 1, "lrange": 1, "llen": 3, "hvals": 1}


def test_a_page_of_the_list_is_two_round_trips(lab: Lab):
    lab.put(30)
    lab.connection.config_resetstat()
    page = lab.jobs.list(OWNER, limit=20)
    assert [one.position for one in page.data] == [*range(29, 9, -1)]
    used = commands(lab.connection)
    assert (used["zrevrangebylex"], used["evalsha"], used["hmget"]) == (1, 1, 21)


def test_the_place_of_one_that_stands_out_of_order_is_found_as_well(lab: Lab):
    ids = lab.put(100)
    lab.connection.lrem("rq:queue:alpha.normal", 1, ids[3])
    lab.connection.rpush("rq:queue:alpha.normal", ids[3])
    assert [lab.get(id).position for id in (ids[0], ids[4], ids[98], ids[3])] == [0, 3, 97, 99]


@pytest.mark.parametrize("id", ["", "0" * 31, "0" * 32, "../" * 10, "A" * 32])
def test_what_there_is_not_is_not_found(lab: Lab, id: str):
    for method in (lab.jobs.fetch, lab.jobs.cancel):
        with pytest.raises(NotFound):
            method(id, OWNER)


def test_what_is_somebody_elses_is_not_found(lab: Lab):
    (id,) = lab.put(owner="bob")
    for method in (lab.jobs.fetch, lab.jobs.cancel, lab.jobs.record):
        with pytest.raises(NotFound):
            method(id, OWNER)
    assert lab.jobs.list(OWNER).data == []
    assert lab.jobs.fetch(id, "bob").status == "queued"


def test_a_hash_that_rq_wrote_to_after_it_was_forgotten_is_no_generation(lab: Lab):
    (id,) = lab.put()
    lab.connection.delete(Job.key_for(id))
    lab.connection.hset(Job.key_for(id), "last_heartbeat", "2026-01-01T00:00:00Z")
    with pytest.raises(NotFound):
        lab.get(id)
    assert lab.jobs.list(OWNER).data == []


# -- a list


def test_a_list_comes_page_by_page_newest_first_without_what_has_gone(lab: Lab):
    ids = [id for i in range(125) for id in (*lab.put(), *lab.put(model="beta", priority="low"))]
    gone = set(ids[::7]) | set(ids[40:160])  # whole pages of it
    lab.connection.delete(*map(Job.key_for, gone))
    left = [id for id in sorted(ids, reverse=True) if id not in gone]
    assert list(pages(lab.jobs, limit=20)) == left
    assert lab.connection.zcard(jobs.index_key(OWNER)) == len(left)  # the others were taken off the list
    beta = {id for id in left if lab.get(id).model == "beta"}
    assert list(pages(lab.jobs, limit=7, model="beta")) == [id for id in left if id in beta]
    canceled = left[3::10]
    for id in canceled:
        lab.jobs.cancel(id, OWNER)
    assert list(pages(lab.jobs, limit=3, status="canceled")) == canceled
    assert list(pages(lab.jobs, limit=3, status="canceled", model="beta")) == [id for id in canceled if id in beta]
    assert list(pages(lab.jobs, limit=100, status="running")) == []


def pages(these: Jobs, **filters: Any) -> Iterator[str]:
    cursor = None
    while True:
        page = these.list(OWNER, cursor=cursor, **filters)
        assert len(page.data) <= filters["limit"]
        assert page.next_cursor is None or len(page.data) == filters["limit"]
        yield from (generation.id for generation in page.data)
        if page.next_cursor is None:
            return
        cursor = page.next_cursor


def test_a_page_that_is_full_and_the_last_says_so(lab: Lab):
    lab.put(4)
    first = lab.jobs.list(OWNER, limit=2)
    assert lab.jobs.list(OWNER, limit=2, cursor=first.next_cursor).next_cursor is None


def test_a_cursor_that_is_none_of_ours_is_refused(lab: Lab):
    with pytest.raises(InvalidRequest, match="cursor"):
        lab.jobs.list(OWNER, cursor="(+inf")


def test_what_is_older_than_any_may_wait_leaves_the_list(lab: Lab):
    (old,) = lab.put(age=jobs.LISTED_FOR.total_seconds() + 10)
    (new,) = lab.put()
    assert list(pages(lab.jobs, limit=10)) == [new]
    assert lab.get(old).status == "queued"


# -- away


def test_a_queued_one_is_canceled_in_one_transaction(lab: Lab):
    ids = lab.put(3)
    heard = lab.connection.pubsub(ignore_subscribe_messages=True)
    heard.subscribe(jobs.BELL)
    until(lambda: lab.connection.pubsub_numsub(jobs.BELL)[0][1] == 1)
    lab.connection.config_resetstat()
    assert lab.jobs.cancel(ids[1], OWNER).status == "canceled"
    assert commands(lab.connection)["exec"] == 1
    assert lab.connection.lrange("rq:queue:alpha.normal", 0, -1) == [ids[0].encode(), ids[2].encode()]
    assert lab.events(ids[1]) == ["queued", "canceled"]
    rung: list[bytes] = []
    until(lambda: (message := heard.get_message()) and rung.append(message["data"]) is None)
    assert rung == [f"drop {ids[1]}".encode()]
    heard.close()


def test_to_cancel_again_changes_nothing(lab: Lab):
    (id,) = lab.put()
    first = lab.jobs.cancel(id, OWNER)
    assert lab.jobs.cancel(id, OWNER) == first
    assert lab.events(id) == ["queued", "canceled"]


@pytest.mark.parametrize(("status", "shown"), [("finished", "succeeded"), ("failed", "failed"), ("stopped", "failed")])
def test_what_has_ended_is_not_canceled(lab: Lab, status: str, shown: str):
    (id,) = lab.put()
    lab.connection.hset(Job.key_for(id), "status", status)
    with pytest.raises(NotCancelable, match=f"has {shown} already"):
        lab.jobs.cancel(id, OWNER)
    assert lab.get(id).status == shown


def test_a_queued_one_expires_when_somebody_looks(lab: Lab):
    polled, listed, canceled = lab.put(3, expires_in=1)
    (other,) = lab.put(expires_in=100)
    assert lab.get(polled).status == "queued"
    time.sleep(1.05)
    assert lab.statuses([polled, listed]) == {polled: "queued", listed: "queued"}
    assert lab.get(polled).status == "expired"
    with pytest.raises(NotCancelable, match="has expired already"):
        lab.jobs.cancel(polled, OWNER)
    assert list(pages(lab.jobs, limit=10, status="expired")) == [canceled, listed, polled]
    assert lab.events(listed) == ["queued", "expired"]
    assert lab.connection.lrange("rq:queue:alpha.normal", 0, -1) == [other.encode()]


def test_one_that_succeeds_while_it_is_found_overdue_has_succeeded(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    (id,) = lab.put(expires_in=1)
    time.sleep(1.05)
    read = jobs.read_records

    def read_and_lose_the_race(connection: "Redis", ids: list[str]) -> Iterator[Any]:
        records = list(read(connection, ids))
        lab.connection.hset(Job.key_for(id), "status", "finished")
        return iter(records)

    monkeypatch.setattr(jobs, "read_records", read_and_lose_the_race)
    assert lab.get(id).status == "succeeded"


def test_one_that_is_forgotten_while_it_is_canceled_is_not_found(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    (id,) = lab.put()
    read = jobs.read_records

    def read_and_lose_the_race(connection: "Redis", ids: list[str]) -> Iterator[Any]:
        records = list(read(connection, ids))
        lab.connection.delete(Job.key_for(id))
        return iter(records)

    monkeypatch.setattr(jobs, "read_records", read_and_lose_the_race)
    with pytest.raises(NotFound):
        lab.jobs.cancel(id, OWNER)


# -- and nothing is kept

KEPT = {"rq:queues", "rq:workers", "rq:clean_group_registries", jobs.index_key(OWNER)}
KEPT |= {f"rq:{kind}:{queue}" for kind in ("finished", "failed", "wip", "queue", "workers") for queue in QUEUES}


def test_of_what_has_ended_nothing_outlives_the_result(lab: Lab):
    lab.settings = {"result_ttl": 100, "max_attempts": 1}
    lab.jobs = lab.with_settings()
    (waiting,) = lab.put()
    lab.jobs.cancel(waiting, OWNER)
    worker = lab.worker(slots=4)
    ended = [*lab.put(2), *lab.put(crash=1), *lab.put(fail=9)]
    running, frozen = *lab.put(steps=100), *lab.put(steps=100)
    until(lambda: set(lab.statuses(ended).values()) <= {"succeeded", "failed"})
    lab.wait_running(2)
    lab.jobs.cancel(running, OWNER)
    worker.kill()
    lab.worker()
    lab.wait([frozen])
    for id in (*ended, running, waiting):  # late, as a preview may be
        with lab.connection.pipeline() as pipe:
            events.record(pipe, id, "preview", {})
            pipe.execute()
    for id in (*ended, running, waiting, frozen):
        for key in (key for key in keys(lab.connection) if id in key):
            assert 0 < lab.connection.ttl(key) <= 100, key
    without = {key for key in keys(lab.connection) - KEPT if lab.connection.ttl(key) < 0}
    assert without <= {"lab:joins"}


def test_an_idempotency_key_is_remembered_for_a_day(lab: Lab):
    lab.jobs.submit(asked(), OWNER, "key")
    (key,) = (key for key in keys(lab.connection) if "idempotency" in key)
    assert 86_000 < lab.connection.ttl(key) <= 86_400


def test_the_oldest_and_the_number_of_those_who_wait_are_told(lab: Lab):
    lab.put(2, priority="low", age=30)
    lab.put(priority="low")
    waiting = lab.jobs.waiting()
    assert set(waiting) == set(QUEUES)
    number, seconds = waiting["alpha.low"]
    assert number == 3
    assert seconds == pytest.approx(30, abs=5)
    assert waiting["beta.high"] == (0, 0.0)
