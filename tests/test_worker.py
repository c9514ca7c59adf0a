"""The worker's contract with RQ: what becomes of jobs when workers, Redis and engines end, stall and come back."""

import json
import random
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from rq.command import send_stop_execution_command, send_stop_job_command
from rq.executions import ExecutionRegistry
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from app import events
from app.dead import dead
from app.errors import NotCancelable
from app.jobs import BELL
from tests.lab import FAKETIME, OWNER, Lab, Server, ended, freeze, thaw, until

LONG = pytest.mark.long


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("lab"))
    yield server
    server.stop()


@pytest.fixture
def lab(server: Server, tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(server, tmp_path)
    yield lab
    lab.close()
    sys.stdout.write(lab.logs()[-5000:])  # shown with a failure


# -- a batch that changes at every step


def test_generations_join_a_running_batch_and_leave_it_one_by_one(lab: Lab):
    lab.worker(slots=8)
    ids = []
    for _ in range(24):
        ids += lab.put(steps=20)
        time.sleep(0.02)
    lab.wait(ids)
    crowds = [join.crowd for join in lab.joins()]
    assert max(crowds) == 8
    assert crowds[0] == 1
    lab.wait_events(ids[0], ["queued", "running", "succeeded"])
    lab.audit(ids)


def test_two_workers_share_a_queue_and_run_each_job_once(lab: Lab):
    lab.worker(step=0.01)
    lab.worker(step=0.01)
    ids = lab.put(200)
    lab.wait(ids)
    assert set(lab.runs(ids).values()) == {1}
    assert {join.worker for join in lab.joins()} == {"w0", "w1"}
    lab.audit(ids)


def test_a_job_that_is_queued_twice_runs_once(lab: Lab):
    ids = lab.put(50)
    lab.connection.rpush("rq:queue:alpha.normal", *ids)
    lab.worker(step=0.01)
    lab.worker(step=0.01)
    lab.wait(ids)
    until(lambda: not lab.left(), 10, lambda: str(lab.left()))
    assert set(lab.runs(ids).values()) == {1}
    lab.audit(ids)


def test_between_two_beats_a_busy_worker_does_not_ask_redis_anything(lab: Lab):
    lab.worker(pulse=60, lease=120, step=0.005)
    ids = lab.put(4, steps=100)
    lab.wait_running(4)
    time.sleep(0.1)
    lab.connection.config_resetstat()
    time.sleep(0.3)  # 60 steps, with room for four more
    asked = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in lab.connection.info("commandstats").items()}
    asked.pop("config|resetstat")
    assert asked == {}
    lab.wait(ids)


# -- workers that die, stall and stop


def test_what_a_killed_worker_held_is_finished_by_another(lab: Lab):
    killed = lab.worker(slots=8)
    ids = lab.put(16, steps=50)
    lab.wait_running(8)
    killed.kill()
    lab.worker(slots=16)
    lab.wait(ids)
    assert Counter(lab.runs(ids).values()) == {2: 8, 1: 8}
    assert Counter(lab.get(id).attempts for id in ids) == {2: 8, 1: 8}
    twice = next(id for id, runs in lab.runs(ids).items() if runs == 2)
    lab.wait_events(twice, ["queued", "running", "queued", "running", "succeeded"])
    lab.audit(ids)


def test_a_worker_that_died_in_rqs_upkeep_does_not_keep_others_from_it(lab: Lab):
    killed = lab.worker()
    ids = lab.put(2, steps=100)
    lab.wait_running(2)
    killed.kill()
    lab.connection.set("rq:clean_registries:alpha.normal", 1, ex=899)
    lab.worker(step=0.001)
    lab.wait(ids)
    lab.audit(ids)


def test_a_worker_that_wakes_up_does_not_finish_what_was_taken_over(lab: Lab):
    asleep = lab.worker(name="asleep")
    ids = lab.put(8, steps=50)
    until(lambda: set(lab.runs(ids).values()) == {1})  # not only claimed
    freeze(asleep)
    lab.worker(name="awake")
    until(lambda: set(lab.runs(ids).values()) == {2})
    thaw(asleep)  # now both step the same eight
    lab.wait(ids)
    until(lambda: not lab.left())
    assert {lab.jobs.record(id, OWNER).meta["images"][0]["etag"] for id in ids} == {"awake"}
    lab.audit(ids)
    assert lab.connection.exists("rq:worker:asleep")  # and it goes on


def test_a_worker_that_wakes_up_goes_on_if_nobody_took_over(lab: Lab):
    worker = lab.worker()
    ids = lab.put(4, steps=50)
    lab.wait_running(4)
    freeze(worker)
    until(lambda: not lab.connection.exists("rq:worker:w0"))  # its hash lives as long as its leases
    thaw(worker)
    lab.wait(ids)
    assert set(lab.runs(ids).values()) == {1}
    assert b"queues" in lab.connection.hgetall("rq:worker:w0")  # whole again
    assert lab.connection.smembers("rq:workers") == {b"rq:worker:w0"}
    lab.audit(ids)


def queue_again(lab: Lab, id: str) -> None:
    """What RQ's upkeep does if the owner of a lease that has run out renews it in that very moment."""
    job = Job.fetch(id, connection=lab.connection, serializer=JSONSerializer)
    queue = Queue("alpha.normal", connection=lab.connection, serializer=JSONSerializer)
    with lab.connection.pipeline() as pipe:
        job.retry(queue, pipe)
        pipe.execute()
    until(lambda: lab.connection.pubsub_numsub(BELL)[0][1] == len(lab.workers))
    lab.connection.publish(BELL, "queued")


def test_of_two_workers_with_a_lease_on_a_job_one_ends_it(lab: Lab):
    lab.worker(pulse=600, lease=1200)  # no beat, so they do not notice before the end
    (id,) = lab.put(steps=100)
    lab.wait_running(1)
    lab.worker(pulse=600, lease=1200)
    queue_again(lab, id)
    lab.wait([id])
    until(lambda: not lab.left())
    assert lab.runs([id]) == {id: 2}
    lab.audit([id])


def test_of_two_workers_with_a_lease_on_a_job_one_lets_go_at_the_next_beat(lab: Lab):
    lab.worker()
    (id,) = lab.put(steps=100)
    lab.wait_running(1)
    lab.worker(step=1)
    queue_again(lab, id)
    until(lambda: lab.runs([id]) == {id: 2})
    lab.wait_running(1)
    assert lab.get(id).status == "running"


def test_long_jobs_on_short_leases_stay_where_they_are(lab: Lab):
    lab.worker(name="owner", step=0.045)
    ids = lab.put(4, steps=100)
    lab.wait_running(4)
    lab.worker(name="idle")
    lab.wait(ids)
    assert set(lab.runs(ids).values()) == {1}
    lab.audit(ids)


def test_a_stopping_worker_finishes_its_jobs_and_leaves_the_rest_queued(lab: Lab):
    worker = lab.worker(slots=4)
    ids = lab.put(10, steps=30)
    lab.wait_running(4)
    worker.terminate()
    assert ended(worker) == 0
    assert lab.count(ids) == {"succeeded": 4, "queued": 6}
    lab.worker(slots=8)
    lab.wait(ids)
    lab.audit(ids)


@pytest.mark.parametrize("times", [8, pytest.param(60, marks=LONG)])
def test_nothing_is_lost_to_workers_stopped_at_any_moment(lab: Lab, times: int):
    ids: list[str] = []
    fed = threading.Event()

    def feed() -> None:
        while not fed.is_set():
            ids.extend(lab.put(steps=2))
            time.sleep(0.01)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        for _ in range(times):
            worker = lab.worker(step=0.005)
            time.sleep(random.uniform(0, 0.3))
            worker.terminate()
            assert ended(worker) == 0
    finally:
        fed.set()
        feeder.join()
    lab.worker(step=0.005)
    lab.wait(ids)
    assert set(lab.runs(ids).values()) == {1}
    lab.audit(ids)


@pytest.mark.parametrize("times", [3, pytest.param(30, marks=LONG)])
def test_nothing_is_lost_to_workers_killed_at_any_moment(lab: Lab, times: int):
    lab.settings["max_attempts"] = 60
    lab.jobs = lab.with_settings()
    ids = lab.put(60 * times, steps=20)
    workers = [lab.worker(name=f"a{i}") for i in range(2)]
    for i in range(times):
        time.sleep(random.uniform(0.3, 1.0))
        which = random.randrange(2)
        workers[which].kill()
        workers[which] = lab.worker(name=f"b{i}")
    lab.wait(ids, seconds=120)
    lab.audit(ids, results={("SUCCESSFUL",), ()})  # RQ writes it just after the end: a kill may come in between


@pytest.mark.long
def test_nothing_is_done_twice_by_workers_that_freeze_at_any_moment(lab: Lab):
    lab.settings["max_attempts"] = 60
    lab.jobs = lab.with_settings()
    workers = [lab.worker(), lab.worker()]
    ids = lab.put(500, steps=50)
    for _ in range(6):
        time.sleep(random.uniform(0.5, 1.5))
        worker = random.choice(workers)
        freeze(worker)
        time.sleep(random.uniform(2, 5))
        thaw(worker)
    lab.wait(ids, seconds=150)
    lab.audit(ids)


def test_a_job_whose_worker_dies_before_claiming_it_goes_back_to_the_queue(lab: Lab):
    ids = lab.put(2)
    for _ in ids:
        assert ended(lab.worker(dies_claiming=True)) == 9
    assert lab.left() == {"rq:queue:alpha.normal:intermediate": 2}
    lab.jobs.cancel(ids[0], OWNER)
    lab.worker()
    lab.wait([ids[1]])
    until(lambda: not lab.left())
    assert lab.get(ids[0]).status == "canceled"
    assert lab.runs(ids) == {ids[0]: 0, ids[1]: 1}
    assert lab.get(ids[1]).attempts == 1  # the other was none


def test_a_stopping_worker_hands_over_what_it_cannot_finish_in_time(lab: Lab):
    worker = lab.worker(stop_grace=0.5)
    slow, quick = lab.put(4, steps=100), lab.put(4, steps=40)
    lab.wait_running(8)
    worker.terminate()
    assert ended(worker) == 0
    assert lab.count(quick) == {"succeeded": 4}
    assert lab.count(slow) == {"queued": 4}  # at once: no lease has to run out
    lab.worker()
    lab.wait(slow)
    assert max(join.crowd for join in lab.joins()) == 8  # nobody is suspected of anything
    lab.audit([*slow, *quick])


# -- poison


def test_what_a_killed_worker_held_is_drawn_alone_as_nobody_knows_who_killed_it(lab: Lab):
    killed = lab.worker()
    ids = lab.put(3, steps=50)
    until(lambda: len(lab.joins()) == 3)
    killed.kill()
    lab.worker()
    lab.wait(ids)
    assert [join.crowd for join in lab.joins()] == [1, 2, 3, 1, 1, 1]
    lab.audit(ids)


def test_a_request_that_kills_its_worker_fails_and_its_batch_mates_do_not_pay(lab: Lab):
    ids = lab.put(2, steps=20)
    (poison,) = lab.put(kill=99)
    ids += lab.put(2, steps=20)
    deaths = 0
    while lab.count([poison]) != {"failed": 1}:
        ended_with = ended(lab.worker(max_attempts=3), 10)
        deaths += ended_with == -signal.SIGSEGV
        if ended_with is None:
            break
    shown = lab.get(poison)
    assert shown.status == "failed"
    assert shown.error
    assert shown.error.type == "worker-died"
    assert shown.attempts == deaths == 3  # in company once, then alone twice
    until(lambda: not lab.executions(poison))
    assert lab.results(poison) == ["FAILED"]
    lab.wait(ids)
    lab.audit(ids)


def test_the_dead_say_when_they_are_forgotten(lab: Lab):
    (id,) = lab.put(kill=99)
    for _ in range(2):
        assert ended(lab.worker(max_attempts=1)) == -signal.SIGSEGV
    lab.worker(max_attempts=1)
    lab.wait([id], "failed")
    lab.wait_events(id, ["queued", "running", "queued", "running", "failed"])
    kept = lab.jobs.settings.result_ttl.total_seconds()
    assert 0 < lab.connection.ttl(events.stream(id)) <= kept
    assert 0 < lab.connection.ttl(Job.key_for(id)) <= kept


def test_one_that_killed_its_workers_is_a_dead_letter_and_forgiven_when_it_is_queued_again(lab: Lab):
    (id,) = lab.put(kill=2)
    for _ in range(2):
        assert ended(lab.worker(max_attempts=1)) == -signal.SIGSEGV
    lab.worker(max_attempts=1)
    lab.wait([id], "failed")
    until(lambda: [letter.id for letter in dead(lab.connection)] == [id])
    lab.requeue(id, max_attempts=3)
    lab.wait([id])
    assert lab.get(id).attempts == 3


# -- clocks


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
@pytest.mark.parametrize("shift", ["+300s", "-300s"])
def test_a_worker_whose_clock_is_wrong_by_minutes_does_no_harm(lab: Lab, shift: str):
    wrong = lab.worker(name="wrong", clock=shift)
    right = lab.worker(name="right")
    ids = lab.put(16, steps=100, expires_in=200)
    lab.wait_running(16)
    time.sleep(3)  # longer than a lease: who judges by a wrong clock has taken over by now, or has been
    lab.wait(ids)
    assert set(lab.runs(ids).values()) == {1}
    assert {join.worker for join in lab.joins()} == {"wrong", "right"}
    assert all(abs(lab.get(id).timings["queued"]) < 30 for id in ids)

    dying = lab.put(8, steps=100)
    lab.wait_running(8)
    (right if {join.worker for join in lab.joins()[-8:]} == {"right"} else wrong).kill()
    lab.wait(dying, seconds=60)
    lab.audit([*ids, *dying])


# -- generations that are not to go on


def test_a_running_one_that_is_canceled_leaves_the_batch_at_once(lab: Lab):
    lab.worker(slots=1, step=0.3, pulse=600, lease=1200)  # no beat during this test
    running, waiting = lab.put(2, steps=100)
    lab.wait_running(1)
    assert lab.jobs.cancel(running, OWNER).status == "canceled"
    until(lambda: lab.runs([waiting])[waiting] == 1, 15)  # it would have taken thirty seconds
    assert lab.get(running).status == "canceled"
    lab.wait_events(running, ["queued", "running", "canceled"])
    assert lab.results(running) == []
    assert lab.leases() == 1


def test_a_queued_one_that_is_canceled_never_runs(lab: Lab):
    ids = lab.put(3)
    lab.jobs.cancel(ids[1], OWNER)
    lab.worker()
    lab.wait([ids[0], ids[2]])
    assert lab.runs(ids)[ids[1]] == 0
    until(lambda: not lab.left())


@pytest.mark.parametrize("number", [25, pytest.param(500, marks=LONG)])
def test_a_generation_canceled_while_it_ends_ends_once_and_stays_so(lab: Lab, number: int):
    lab.worker(step=0.005, slots=8)
    answers: dict[str, str] = {}
    seen: dict[str, list[str]] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            for id, status in lab.statuses(list(seen)).items():
                if seen[id][-1:] != [status]:
                    seen[id].append(status)

    def cancel() -> None:
        """Close to the moment of the end: later whenever it was too early, and the other way round."""
        moment = 0.05
        for _ in range(number):
            (id,) = lab.put(steps=10)
            seen[id] = []
            until(lambda id=id: lab.statuses([id])[id] != "queued")
            time.sleep(moment)
            try:
                answers[id] = lab.jobs.cancel(id, OWNER).status
            except NotCancelable:
                answers[id] = "succeeded"
            moment = max(0.0, moment + (0.004 if answers[id] == "canceled" else -0.004))

    threads = [threading.Thread(target=cancel) for _ in range(5)]
    watcher = threading.Thread(target=watch)
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: not lab.left())
    time.sleep(0.2)
    over.set()
    watcher.join()
    ids = list(seen)
    assert lab.statuses(ids) == answers  # nobody was told otherwise
    assert set(answers.values()) == {"canceled", "succeeded"}
    for id, statuses in seen.items():
        assert statuses == [s for s in ("queued", "running", answers[id]) if s in statuses]
        assert lab.results(id) == (["SUCCESSFUL"] if answers[id] == "succeeded" else [])
        lab.wait_events(id, [answers[id]], among=events.ENDED)


def test_an_operator_stops_a_running_one_with_rqs_commands(lab: Lab):
    lab.worker()
    ids = lab.put(3, steps=100)
    lab.wait_running(3)
    send_stop_job_command(lab.connection, ids[0], JSONSerializer)
    (execution,) = ExecutionRegistry(ids[1], lab.connection).get_execution_ids()
    send_stop_execution_command(lab.connection, ids[1], execution)
    lab.wait(ids[:2], "failed")
    for id in ids[:2]:
        assert lab.get(id).error == lab.get(ids[0]).error
        assert lab.get(id).error.type == "stopped"
    assert lab.get(ids[2]).status == "running"
    assert lab.runs(ids) == dict.fromkeys(ids, 1)


def test_one_that_takes_too_long_fails(lab: Lab):
    lab.settings["job_timeout"] = 1
    lab.jobs = lab.with_settings()
    lab.worker(step=0.05)
    slow, quick = *lab.put(steps=100), *lab.put(steps=5)
    lab.wait([quick])
    lab.wait([slow], "failed")
    assert lab.get(slow).error.type == "timeout"
    assert lab.get(slow).attempts == 1


def test_one_that_nobody_wants_any_more_expires_queued_or_running(lab: Lab):
    queued, alone = lab.put(2, expires_in=1)
    (running,) = lab.put(model="beta", expires_in=2, steps=100)
    time.sleep(1.1)
    assert lab.get(alone).status == "expired"  # nobody needs to take it for that
    lab.worker(step=0.1)
    until(lambda: lab.statuses([running])[running] == "running")
    lab.wait([queued, alone, running], "expired")
    assert lab.runs([queued, alone, running]) == {queued: 0, alone: 0, running: 1}
    lab.wait_events(running, ["queued", "running", "expired"])
    until(lambda: not lab.left())


# -- attempts


def test_a_generation_that_had_no_luck_is_tried_again_in_front(lab: Lab):
    lab.worker(slots=1)
    unlucky, patient = *lab.put(fail=2), *lab.put()
    lab.wait([unlucky, patient])
    assert [join.id for join in lab.joins()] == [unlucky] * 3 + [patient]
    assert lab.get(unlucky).attempts == 3
    lab.wait_events(unlucky, ["queued", "running"] * 3 + ["succeeded"])
    lab.audit([unlucky, patient])


def test_after_the_last_attempt_it_has_failed_with_the_reason(lab: Lab):
    lab.settings["max_attempts"] = 3
    lab.jobs = lab.with_settings()
    lab.worker()
    (id,) = lab.put(fail=9)
    lab.wait([id], "failed")
    shown = lab.get(id)
    assert shown.attempts == 3
    assert shown.error.model_dump() == {"type": "out-of-luck", "detail": "attempt 3"}
    until(lambda: not lab.executions(id))  # what RQ writes after the status
    assert lab.results(id) == ["FAILED"]
    until(lambda: not lab.left())


def test_an_error_of_one_generation_fails_it_alone_and_at_once(lab: Lab):
    worker = lab.worker()
    wrong, refused, fine = *lab.put(crash=1), *lab.put(refuse=1), *lab.put(steps=20)
    lab.wait([wrong, refused], "failed")
    lab.wait([fine])
    assert lab.get(wrong).error.detail == "ZeroDivisionError: of the program"
    assert lab.get(wrong).attempts == 1
    assert worker.is_alive()
    lab.audit([fine])


def test_a_job_that_cannot_be_read_fails_and_the_worker_goes_on(lab: Lab):
    (id,) = lab.put()
    call = ["generations.draw", None, [], {"parameters": {"of": "a later version"}, "owner": OWNER}]
    lab.connection.hset(Job.key_for(id), "data", zlib.compress(json.dumps(call).encode()))
    lab.worker()
    until(lambda: lab.connection.hget(Job.key_for(id), "status") == b"failed")
    lab.wait(lab.put())


def test_an_engine_that_breaks_hands_every_job_back_and_ends_the_process(lab: Lab):
    worker = lab.worker()
    ids = lab.put(7, steps=100)
    lab.wait_running(7)
    ids += lab.put(**{"break": 1})
    assert ended(worker) not in (0, None)
    assert lab.count(ids) == {"queued": 8}  # no lease to wait for
    assert lab.leases() == 0
    lab.worker()
    lab.wait(ids)
    assert set(lab.runs(ids).values()) == {2}
    lab.audit(ids)


# -- Redis goes away


def test_workers_carry_on_when_redis_was_killed_and_comes_back(lab: Lab):
    workers = [lab.worker(lease=10), lab.worker(lease=10)]
    ids = lab.put(40, steps=50)
    lab.wait_running(16)
    lab.server.kill()
    time.sleep(3)
    lab.server.restart()
    lab.wait(ids)
    assert all(worker.is_alive() for worker in workers)
    lab.audit(ids)
    (id,) = lab.put(steps=100)
    lab.wait_running(1)
    send_stop_job_command(lab.connection, id, JSONSerializer)  # they hear commands again,
    lab.wait([id], "failed")
    (id,) = lab.put(steps=100)
    lab.wait_running(1)
    lab.jobs.cancel(id, OWNER)
    until(lambda: not lab.left())  # and the bell


@pytest.mark.long
def test_nothing_is_lost_to_a_redis_that_is_killed_again_and_again(lab: Lab):
    workers = [lab.worker(lease=10), lab.worker(lease=10)]
    ids = lab.put(300, steps=20)
    for _ in range(8):
        time.sleep(random.uniform(0.3, 1.5))
        lab.server.kill()
        time.sleep(random.uniform(0, 1))
        lab.server.restart()
    lab.wait(ids, seconds=120)
    assert all(worker.is_alive() for worker in workers)
    assert lab.count(ids) == {"succeeded": 300}
    until(lambda: not lab.left(), 30)


# -- who is next


def test_the_urgent_overtake_but_not_those_who_have_waited_a_minute_longer(lab: Lab):
    low_old = lab.put(2, priority="low", age=130)
    normal = lab.put(2, priority="normal", age=1)
    low = lab.put(2, priority="low", age=2)
    high = lab.put(2, priority="high")
    normal_old = lab.put(1, priority="normal", age=61.5)
    ids = low_old + normal + low + high + normal_old
    lab.worker(slots=1, step=0.005)
    lab.wait(ids)
    order = [join.id for join in lab.joins()]
    assert order == [*low_old, *high, *normal, *normal_old, *low]


def test_a_loaded_model_may_overtake_one_that_is_not_for_so_long_only(lab: Lab):
    cold_older, cold_old = *lab.put(model="beta", age=15), *lab.put(model="beta", age=5)
    (warm,) = lab.put(model="alpha")
    lab.worker(slots=1, step=0.005, warm=("alpha",), warm_bonus=10)
    lab.wait([cold_older, cold_old, warm])
    assert [join.id for join in lab.joins()] == [cold_older, warm, cold_old]


def test_suspended_workers_finish_what_they_have_and_begin_nothing(lab: Lab):
    lab.worker()
    first = lab.put(2, steps=70)
    lab.wait_running(2)
    suspend(lab.connection)
    time.sleep(1.1)  # a beat
    second = lab.put(2)
    lab.wait(first)
    time.sleep(0.2)
    assert lab.count(second) == {"queued": 2}
    resume(lab.connection)
    lab.wait(second)
    lab.audit(first + second)
