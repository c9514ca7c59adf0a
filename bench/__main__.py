"""`make bench`, the part with the peers: the same work through each system, in turns, and a table last.

python -m bench --short                       # some minutes: A and B, ours, the plain pipeline, mosec
python -m bench --minutes 20 --mixes a,b      # as long as that takes, at most
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import report
from bench.mixes import MIXES, Model, arrivals, requests
from bench.parity import parity
from bench.peers.plan import Plan
from bench.report import COMMON
from bench.systems import OURS, PEERS, ROOT, Peer, System, ask, asked_of, made, wait_for
from models.catalog import CARDS, Catalog

RESULTS = ROOT / "bench" / "results"
SYSTEMS = (OURS, "fastapi", "litserve", "mosec", "mosec+net")
SATURATED = "saturated"
ALONE = 8  # turns


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench")
    add = parser.add_argument
    add(
        "--systems",
        type=listed,
        default=SYSTEMS,
        help=f"{OURS}, {', '.join(PEERS)}, each peer as peer+net, peer:BATCH:WAIT",
    )
    add("--mixes", type=listed, default=tuple(MIXES), help="of a, b, c, d")
    add("--loads", type=listed, default=("0.5", "0.8", "1.2", COMMON), help="of each one's own saturation, or common")
    add("--seeds", type=int, default=3)
    add("--minutes", type=float, default=60, help="after all have started: points become as long as that allows")
    add("--model", default="emoji-sd")
    add("--cards", help="a folder with more cards")
    add("--device", default="cpu")
    add("--dtype", default="auto", help="of all systems; auto: the card's")
    add("--threads", type=int, default=0, help="of torch, of each system; 0: its own choice")
    add("--batch", type=int, default=8, help="of the peers")
    add("--wait", type=float, default=0.05, help="seconds for a peer's batch to fill")
    add("--scheduler", help="instead of the card's")
    add("--short", action="store_true", help="some minutes")
    add("--name", default=time.strftime("%Y-%m-%d-%H%M"), help="of the files in bench/results")
    given = parser.parse_args(words)
    if given.short:
        given.systems, given.mixes = (OURS, "fastapi", "mosec"), ("a", "b")
        given.loads, given.seeds, given.minutes = ("0.8",), 1, 4
    return given


def listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


@dataclass
class Bench:
    given: argparse.Namespace
    plan: Plan
    model: Model
    systems: dict[str, System]
    results: dict[str, Any]
    deadline: float
    saturations: dict[tuple[str, str], float] = field(default_factory=dict)

    def save(self) -> None:
        """After each point: what was measured stays, whatever becomes of us."""
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.given.name}.json"
        path.with_suffix(".tmp").write_text(json.dumps(self.results))
        path.with_suffix(".tmp").replace(path)

    def run(self) -> None:
        self.results["ceilings"] = ask("bench.ceilings", asdict(self.plan))
        self.save()
        for seed in range(ALONE):
            for name in self.valid:
                self.alone(name, seed)
        for mix in self.given.mixes:
            count = self.saturating(mix)
            for seed in self.results["seeds"]:
                for name in self.valid:
                    self.saturate(name, mix, seed, count)
        for seed, mix, load, name in (points := list(self.points())):
            left = self.deadline - time.monotonic()
            if left < 0:
                print("out of time", flush=True)
                return
            self.point(name, mix, load, seed, left / len(points))
            points = points[1:]

    @property
    def in_flight(self) -> int:
        return 2 * max(asked_of(name, self.plan)[1].batch for name in self.systems)

    @property
    def valid(self) -> list[str]:
        return [name for name in self.systems if self.results["parity"][name]["same"]]

    def points(self) -> Iterator[tuple[int, str, str, str]]:
        """In turns: what the machine does meanwhile happens to all of them."""
        for seed in self.results["seeds"]:
            for mix in self.given.mixes:
                for load in self.given.loads:
                    for name in self.valid:
                        yield seed, mix, load, name

    def alone(self, name: str, seed: int) -> None:
        """Two pictures, one after another, of mix A."""
        sent = self.loaded(name, requests("a", self.model, 2, seed), None, 1)["sent"]
        self.results["alone"].setdefault(name, []).extend(o["ended"] - o["due"] for o in sent if o["status"] == 200)

    def saturate(self, name: str, mix: str, seed: int, count: int) -> None:
        """Closed loop, with twice the largest batch in flight, over the same requests for all."""
        asked = requests(mix, self.model, count, seed)
        point = self.loaded(name, asked, None, self.in_flight) | {"mix": mix, "load": SATURATED, "seed": seed}
        self.results["points"].append(point)
        found = [point for point in self.results["points"] if (point["system"], point["mix"]) == (name, mix)]
        self.saturations[name, mix] = median(map(report.rate, found))
        self.save()
        print(f"{mix} saturated seed {seed} {name}: {report.rate(point):.2f} pictures/s × {count}", flush=True)

    def saturating(self, mix: str) -> int:
        """How many pictures: a third of the time, if all systems are as fast as the first one, which is tried."""
        most, given = self.in_flight, self.given
        tried = self.loaded(self.valid[0], requests(mix, self.model, most, seed=0), None, most)
        seconds = 60 * given.minutes / 3 / len(self.valid) / len(given.mixes) / len(self.results["seeds"])
        return max(3 * most, int(report.rate(tried) * seconds))

    def point(self, name: str, mix: str, load: str, seed: int, seconds: float) -> None:
        saturation = self.saturations[name, mix]
        peers = [rate for (other, of), rate in self.saturations.items() if of == mix and other != OURS]
        rate = 0.8 * max(peers, default=saturation) if load == COMMON else float(load) * saturation
        count = max(5, int(rate * seconds / max(1.0, rate / saturation)))
        asked = requests(mix, self.model, count, seed)
        point = self.loaded(name, asked, arrivals(rate, count, seed), 0)
        share = COMMON if load == COMMON else float(load)
        point |= {"mix": mix, "load": share, "seed": seed, "rate": rate}
        self.results["points"].append(point)
        self.save()
        latencies = report.latencies(point)
        p50, p99 = report.percentile(latencies, 50), report.percentile(latencies, 99)
        print(f"{mix} {load} seed {seed} {name}: {rate:.2f}/s × {count}: p50 {p50:.2f} s, p99 {p99:.2f} s", flush=True)

    def loaded(self, name: str, asked: list[dict[str, Any]], due: list[float] | None, in_flight: int) -> dict[str, Any]:
        system = self.systems[name]
        load = {"url": system.url, "protocol": system.protocol, "requests": asked, "due": due, "in_flight": in_flight}
        with undisturbed(self.systems, name):
            return {"system": name, "rate": None, "sent": ask("bench.load", load)}


@contextmanager
def undisturbed(systems: dict[str, System], name: str) -> Iterator[None]:
    """The peers that do not take part are frozen: some compute while they wait."""
    others = [system for system in systems.values() if isinstance(system, Peer) and system.name != name]
    for system in others:
        system.send(signal.SIGSTOP)
    try:
        yield
    finally:
        for system in others:
            system.send(signal.SIGCONT)


@contextmanager
def running(names: tuple[str, ...], plan: Plan, request: dict[str, Any], folder: Path) -> Iterator[dict[str, System]]:
    """All at once, each begun when the one before draws."""
    systems: dict[str, System] = {}
    try:
        for name in names:
            print(f"starting {name}", flush=True)
            systems[name] = made(name, plan, folder)
            systems[name].start()
            wait_for(systems[name], request)
        yield systems
    finally:
        for system in systems.values():
            system.stop()


def twin(model: str, extra: Path | None, folder: Path) -> tuple[Model, str]:
    """The model, and a folder with its card and that of a second one with the same weights."""
    card = Catalog.read([model], extra).default
    source = next(path for place in (extra, CARDS) if place for path in place.glob("*.toml") if path.stem == model)
    folder.mkdir()
    for name in (model, f"{model}-twin"):
        text = source.read_text().replace(f'name = "{card.name}"', f'name = "{name}"', 1)
        (folder / f"{name}.toml").write_text(text)
    return Model(model, f"{model}-twin", card.size.width, card.defaults.scheduler), str(folder)


def main(words: list[str]) -> int:
    given = arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or what was begun would be left
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as directory:
        folder = Path(directory)
        model, cards = twin(given.model, Path(given.cards) if given.cards else None, folder / "cards")
        if given.scheduler:
            model = model._replace(scheduler=given.scheduler)
        both = [model.name, model.second] if "c" in given.mixes else [model.name]
        plan = Plan(both, cards, given.device, given.dtype, given.threads, given.batch, given.wait)
        results: dict[str, Any] = {
            "began": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "command": " ".join(["python -m bench", *words]),
            "model": model.name,
            "device": given.device,
            "cores": len(os.sched_getaffinity(0)),
            "systems": list(given.systems),
            "mixes": list(given.mixes),
            "seeds": list(range(1, given.seeds + 1)),
            "alone": {},
            "points": [],
        }
        examples = requests(given.mixes[0], model, 3, seed=99)
        with running(given.systems, plan, examples[0], folder) as systems:
            results["curves"] = curves_of(systems, model.name)
            results["parity"] = parity(systems, plan, examples)
            bench = Bench(given, plan, model, systems, results, time.monotonic() + 60 * given.minutes)
            try:
                bench.run()
            finally:  # also when our time is up
                bench.save()
                report.plot(results, RESULTS / f"{given.name}.png")
                print(f"\n{report.tables(results)}\n\n† no previews: the finished picture")
                print(f"bench/results/{given.name}.json", flush=True)
    return 0 if all(found["same"] for found in results["parity"].values()) else 1


def curves_of(systems: dict[str, System], model: str) -> dict[str, dict[int, float]] | None:
    if OURS not in systems:
        return None
    import httpx2

    from bench.ceilings import pass_seconds

    with httpx2.Client(base_url=systems[OURS].url) as http:
        return pass_seconds(http, model)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
