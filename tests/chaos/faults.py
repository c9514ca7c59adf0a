"""What goes wrong: a shuffled deck of faults, dealt one after the other. A seed always deals the same."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.chaos.clients import Crowd
from tests.chaos.orders import special
from tests.chaos.part import AMBUSHES, POISONS
from tests.chaos.system import LEASE, Part, System

LONGEST_PAUSE = 12.0  # seconds
Fault = Callable[["Havoc", random.Random], None]


class Havoc:
    """Deals faults to a system and counts them."""

    def __init__(self, system: System, crowd: Crowd, seed: int, say: Callable[[str], None]):
        self.system, self.crowd, self.seed, self.say = system, crowd, seed, say
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.counts.total()

    def run(self, faults: int, jobs: int) -> None:
        """Spread over so many jobs; but if these do not come, because of the faults, it waits no longer."""
        for number, (name, fault) in zip(range(faults), deal(self.seed), strict=False):
            rng = random.Random(f"{self.seed}/fault/{number}")
            time.sleep(rng.uniform(0.5, 2))
            deadline = time.monotonic() + LONGEST_PAUSE
            while len(self.crowd.ledger.jobs) < jobs * number / faults and time.monotonic() < deadline:
                time.sleep(0.1)
            self.say(name)
            fault(self, rng)
            self.counts[name] += 1

    def busy_worker(self, rng: random.Random, patience: float = 4.0) -> Part:
        """One in the middle of something that it has begun to keep; after a while, any."""
        workers = rng.sample(self.system.workers, len(self.system.workers))
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            for worker in workers:
                if worker.runs and any(journal(self.system, id) for id in self.system.held_by(worker)):
                    return worker
            time.sleep(0.05)
        return workers[0]

    def bring(self, rng: random.Random, metadata: dict[str, str], canceled: bool = False) -> None:
        number = rng.randrange(10**9)
        self.crowd.bring(special(self.seed, number, metadata, "cancel" if canceled else "poll"))


# -- processes


def kill_worker(havoc: Havoc, rng: random.Random) -> None:
    havoc.busy_worker(rng).signal(signal.SIGKILL)


def kill_api(havoc: Havoc, rng: random.Random) -> None:
    rng.choice(havoc.system.apis).signal(signal.SIGKILL)


def freeze_worker_for_long(havoc: Havoc, rng: random.Random) -> None:
    """Until another has taken over and, mostly, ended what this one holds."""
    freeze(havoc.busy_worker(rng), LEASE + rng.uniform(2, 5))


def freeze_worker_briefly(havoc: Havoc, rng: random.Random) -> None:
    freeze(havoc.busy_worker(rng), rng.uniform(0.5, LEASE - 1.5))


def freeze_api(havoc: Havoc, rng: random.Random) -> None:
    freeze(rng.choice(havoc.system.apis), rng.uniform(0.5, 4))


def freeze(part: Part, seconds: float) -> None:
    part.signal(signal.SIGSTOP)
    time.sleep(seconds)
    part.signal(signal.SIGCONT)


def stop_worker(havoc: Havoc, rng: random.Random) -> None:
    havoc.busy_worker(rng).signal(signal.SIGTERM)


def stop_api(havoc: Havoc, rng: random.Random) -> None:
    rng.choice(havoc.system.apis).signal(signal.SIGTERM)


# -- Redis, the network and the disk


def kill_valkey(havoc: Havoc, rng: random.Random) -> None:
    havoc.system.valkey.down_until = time.monotonic() + rng.uniform(0, 3)
    havoc.system.valkey.kill()


def slow_network(havoc: Havoc, rng: random.Random) -> None:
    havoc.system.proxy.delay(rng.uniform(0.02, 0.2))
    time.sleep(rng.uniform(2, 4))
    havoc.system.proxy.heal()


def cut_network(havoc: Havoc, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        havoc.system.proxy.cut()
        time.sleep(rng.uniform(0.05, 0.4))
        havoc.system.proxy.heal()
        time.sleep(rng.uniform(0.05, 0.4))


def black_hole(havoc: Havoc, rng: random.Random) -> None:
    havoc.system.proxy.black_hole()
    time.sleep(rng.uniform(1, LEASE + 2))
    havoc.system.proxy.heal()


def full_disk(havoc: Havoc, rng: random.Random) -> None:
    havoc.busy_worker(rng)
    path = havoc.system.full_disk()
    with path.open("wb") as file:
        left = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
        with suppress(OSError):  # somebody was quicker
            os.posix_fallocate(file.fileno(), 0, left)
    time.sleep(rng.uniform(2, 4))
    path.unlink()


def damaged_journals(havoc: Havoc, rng: random.Random) -> None:
    """A worker dies, and what it leaves to its successor is no longer what it wrote."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        worker = havoc.busy_worker(rng, 0.5)
        worker.signal(signal.SIGSTOP)
        if pages := sorted(page for id in havoc.system.held_by(worker) for page in journal(havoc.system, id)):
            worker.signal(signal.SIGKILL)
            damage(pages, rng)
            return
        worker.signal(signal.SIGCONT)
        time.sleep(0.1)
    worker.signal(signal.SIGKILL)


def journal(system: System, id: str) -> list[Path]:
    return [path for path in (system.blobs / "generations" / id / "journal").rglob("*") if path.is_file()]


def damage(pages: list[Path], rng: random.Random) -> None:
    """Bytes flipped in most; some cut off; some in each other's place."""
    for page in pages:
        data = bytearray(page.read_bytes())
        match rng.random():
            case chance if chance < 0.6:
                for _ in range(200):  # of the last three quarters, where the tensors are
                    data[rng.randrange(len(data) // 4, len(data))] ^= 0x55
            case chance if chance < 0.8:
                del data[rng.randrange(len(data)) :]
            case _:
                data = bytearray(rng.choice(pages).read_bytes())
        page.write_bytes(data)


# -- requests that are trouble


def poison(havoc: Havoc, rng: random.Random) -> None:
    havoc.bring(rng, {"poison": rng.choice(list(POISONS))})


def ambushed(name: str, canceled: bool = False) -> Fault:
    def bring(havoc: Havoc, rng: random.Random) -> None:
        havoc.bring(rng, {"ambush": name}, canceled)

    return bring


DECK: dict[str, tuple[Fault, int]] = {  # and how many there are of each
    "worker killed": (kill_worker, 3),
    "API killed": (kill_api, 2),
    "worker frozen, longer than its lease": (freeze_worker_for_long, 3),
    "worker frozen, briefly": (freeze_worker_briefly, 1),
    "API frozen": (freeze_api, 1),
    "worker stopped": (stop_worker, 1),
    "API stopped": (stop_api, 1),
    "Valkey killed": (kill_valkey, 2),
    "network slow": (slow_network, 1),
    "network cut": (cut_network, 2),
    "network a black hole": (black_hole, 1),
    "disk full": (full_disk, 1),
    "journals damaged": (damaged_journals, 2),
    "poison": (poison, 1),
    **{f"worker {name.replace('-', ' ')}": (ambushed(name), 1) for name in AMBUSHES},
    "worker freezes at claim, canceled meanwhile": (ambushed("freeze-at-claim", canceled=True), 1),
}


def deal(seed: int) -> Iterator[tuple[str, Fault]]:
    """Deck after deck, each shuffled: none is missing, and none keeps away for long."""
    rng = random.Random(f"{seed}/deck")
    while True:
        deck = [name for name, (_, count) in DECK.items() for _ in range(count)]
        rng.shuffle(deck)
        yield from ((name, DECK[name][0]) for name in deck)
