"""The clients: they ask, ask again when nobody answers, watch, fetch, cancel, or vanish; and remember what they saw."""

import hashlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2

from app.events import ENDED
from tests.chaos.orders import PICTURES, Order, order
from tests.chaos.system import System

PATIENCE = 90.0  # seconds until a client gives up
Checksums = dict[str, list[str]]


@dataclass
class Job:
    """A generation that was accepted, as its client knows it."""

    id: str
    order: Order
    seen: set[str] = field(default_factory=set)  # the final states that it was shown in
    complaints: list[str] = field(default_factory=list)


@dataclass
class Ledger:
    """What all clients saw."""

    right: Checksums  # of each picture, from an undisturbed worker
    jobs: dict[str, Job] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # seconds, of the GETs that were answered
    longest_submit: float = 0.0  # seconds until a 202
    wrong_answers: list[str] = field(default_factory=list)  # that no fault explains
    lock: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, id: str, order: Order, took: float) -> Job:
        with self.lock:
            self.longest_submit = max(self.longest_submit, took)
            return self.jobs.setdefault(id, Job(id, order))


class Client:
    """One client, who takes any API."""

    def __init__(self, system: System, ledger: Ledger, rng: random.Random):
        self.system, self.ledger, self.rng = system, ledger, rng
        self.http = httpx2.Client(timeout=httpx2.Timeout(6, connect=2))

    def url(self, path: str) -> str:
        return self.rng.choice(self.system.apis).url + path

    def get(self, path: str) -> httpx2.Response | None:
        """None if it was not answered, or with an error that will pass."""
        began = time.monotonic()
        try:
            answer = self.http.get(self.url(path))
        except httpx2.TransportError:
            self.ledger.counts["unanswered"] += 1
            return None
        if answer.status_code >= 500:
            self.ledger.counts[f"GET {answer.status_code}"] += 1
            self.note_if_strange(answer)
            return None
        self.ledger.latencies.append(time.monotonic() - began)
        return answer

    def note_if_strange(self, answer: httpx2.Response) -> None:
        """A 503 is what faults are answered with; anything else is a bug."""
        if answer.status_code != 503:
            self.ledger.wrong_answers.append(f"{answer.request.method} {answer.status_code} {answer.text[:200]}")

    def serve(self, order: Order) -> None:
        key = None if order.manner == "careless" else f"{order.seed}-{order.number}-{order.picture}"
        if order.manner == "vanish":
            self.drop(order, key)
        if (job := self.submit(order, key)) is None:
            self.ledger.counts["refused"] += 1
            return
        match order.manner:
            case "vanish":
                self.vanish(job)
                return
            case "watch":
                self.watch(job)
            case "cancel":
                if "metadata" in order.body:
                    self.await_ambush(job)
                else:
                    time.sleep(order.rng.choice([0, 0.1, 0.5, 1.5]))
                self.cancel(job)
        self.poll(job)
        if job.seen and self.rng.random() < 0.2:
            self.cancel(job)  # too late
        if key and self.rng.random() < 0.2 and (again := self.submit(order, key)) and again is not job:
            job.complaints.append(f"submitted twice: {again.id} has the same Idempotency-Key")

    def submit(self, order: Order, key: str | None) -> Job | None:
        began, headers = time.monotonic(), {"Idempotency-Key": key} if key else {}
        while time.monotonic() - began < PATIENCE:
            with suppress(httpx2.TransportError):
                answer = self.http.post(self.url("/v1/generations"), json=order.body, headers=headers)
                if answer.status_code in (200, 202):
                    return self.ledger.accept(answer.json()["id"], order, time.monotonic() - began)
                self.ledger.counts[f"POST {answer.status_code}"] += 1
                self.note_if_strange(answer)
            if key is None:
                return None
            time.sleep(0.3)
        return None

    def drop(self, order: Order, key: str | None) -> None:
        """Ask, wait for the picture, and go before it comes."""
        headers = {"Idempotency-Key": key or "", "Prefer": "wait=30"}
        with suppress(httpx2.TransportError):
            self.http.post(self.url("/v1/generations"), json=order.body, headers=headers, timeout=httpx2.Timeout(0.3))

    def vanish(self, job: Job) -> None:
        """Open a stream, listen to a few lines, and go."""
        with (
            suppress(httpx2.TransportError),
            self.http.stream("GET", self.url(f"/v1/generations/{job.id}/events"), timeout=httpx2.Timeout(2)) as stream,
        ):
            for _ in zip(range(job.order.rng.randint(1, 8)), stream.iter_lines(), strict=False):
                pass

    def watch(self, job: Job) -> None:
        """To the end of the stream, or until it breaks."""
        with (
            suppress(httpx2.TransportError),
            self.http.stream("GET", self.url(f"/v1/generations/{job.id}/events"), timeout=httpx2.Timeout(20)) as stream,
        ):
            for line in stream.iter_lines():
                name, _, word = line.partition(": ")
                if name == "event" and word in ENDED:
                    self.show(job, word)

    def await_ambush(self, job: Job) -> None:
        deadline = time.monotonic() + PATIENCE / 3
        while not any(self.system.marks.glob(f"{job.id}.*")) and time.monotonic() < deadline:
            time.sleep(0.1)

    def cancel(self, job: Job) -> None:
        with suppress(httpx2.TransportError):
            answer = self.http.delete(self.url(f"/v1/generations/{job.id}"))
            if answer.status_code == 200:
                self.show(job, "canceled")
            elif answer.status_code != 409:
                self.note_if_strange(answer)

    def poll(self, job: Job) -> None:
        began, pause = time.monotonic(), 0.2
        while time.monotonic() - began < PATIENCE:
            generation = self.look(job)
            if generation and generation["status"] in ENDED:
                if generation["status"] == "succeeded":
                    self.check_images(job, generation)
                return
            time.sleep(pause)
            pause = min(1.0, pause * 1.3)

    def look(self, job: Job) -> dict[str, Any] | None:
        answer = self.get(f"/v1/generations/{job.id}")
        if answer is None:
            return None
        if answer.status_code == 404:
            job.complaints.append("lost: 404")
            return None
        generation = answer.json()
        if generation["status"] in ENDED:
            self.show(job, generation["status"])
        elif job.seen:
            job.complaints.append(f"finished twice: {generation['status']} after {job.seen}")
        return generation

    def show(self, job: Job, status: str) -> None:
        job.seen.add(status)

    def check_images(self, job: Job, generation: dict[str, Any]) -> bool:
        """Fetch the pictures of one that has succeeded. False if nobody answers at present."""
        sums = []
        for image in generation["images"]:
            if (answer := self.get(image["url"])) is None:
                return False
            if answer.status_code != 200:
                job.complaints.append(f"wrong bytes: the picture is not there: {answer.status_code}")
                return True
            sums.append(hashlib.sha256(answer.content).hexdigest())
        right = self.ledger.right.get(job.order.picture or "")
        if right is not None and sums != right:
            job.complaints.append("wrong bytes: they differ from those of an undisturbed worker")
        elif not sums:
            job.complaints.append("wrong bytes: succeeded without a picture")
        return True


class Crowd:
    """So many clients at a time, each with the next order, until they are told to stop."""

    def __init__(self, system: System, ledger: Ledger, seed: int, size: int):
        self.system, self.ledger, self.seed = system, ledger, seed
        self.numbers = itertools.count()
        self.stopping = threading.Event()
        self.threads = [threading.Thread(target=self._come_and_go, name=f"client {i}") for i in range(size)]
        self.specials = ThreadPoolExecutor(8, thread_name_prefix="special")

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def bring(self, order: Order) -> Future[None]:
        """One more client, with this order."""
        rng = random.Random(f"{self.seed}/special/{order.number}")
        return self.specials.submit(Client(self.system, self.ledger, rng).serve, order)

    def stop(self) -> None:
        """When those that are here have got what they came for."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()
        self.specials.shutdown(wait=True)

    def _come_and_go(self) -> None:
        while not self.stopping.is_set():
            number = next(self.numbers)
            Client(self.system, self.ledger, random.Random(f"{self.seed}/api/{number}")).serve(order(self.seed, number))


def right_checksums(system: System) -> Checksums:
    """Of every picture, with nothing amiss."""
    with httpx2.Client(base_url=system.apis[0].url, timeout=60) as http, ThreadPoolExecutor(2) as clients:

        def checksums(body: Mapping[str, Any]) -> list[str]:
            done = http.post("/v1/generations", json=body, headers={"Prefer": "wait=50"}).json()
            assert done["status"] == "succeeded", done
            return [hashlib.sha256(http.get(image["url"]).content).hexdigest() for image in done["images"]]

        return dict(zip(PICTURES, clients.map(checksums, PICTURES.values()), strict=True))


class Probe:
    """Somebody who asks all the time whether anybody answers, and can reach what it needs."""

    def __init__(self, system: System):
        self.system, self.longest = system, 0.0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._ask, name="probe")
        self.thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()

    def _ask(self) -> None:
        last = time.monotonic()
        with httpx2.Client(timeout=0.5) as http:
            while not self.stopped.wait(0.1):
                answered = any(self._answers(http, api.url) for api in self.system.apis)
                now = time.monotonic()
                self.longest = max(self.longest, now - last)
                last = now if answered else last

    def _answers(self, http: httpx2.Client, url: str) -> bool:
        try:
            return http.get(f"{url}/livez").status_code < 500 and http.get(f"{url}/readyz").status_code < 500
        except httpx2.TransportError:
            return False
