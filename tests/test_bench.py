"""The benchmark: its generator against a server that takes a known time, its figures, and one small comparison."""

import json
import math
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import pytest

from bench import __main__ as bench
from bench import report
from bench.mixes import MIXES, Kind, Model, arrivals, requests
from bench.peers.plan import Plan
from bench.systems import ask, asked_of

MODEL = Model("emoji-sd", "emoji-sd-twin", 128, "ddim")
TAKES = 0.1


class OneAfterAnother(BaseHTTPRequestHandler):
    turn = Lock()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.turn:
            time.sleep(TAKES)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), OneAfterAnother)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def plan(url: str, count: int, **more: object) -> dict[str, object]:
    return {"url": url, "protocol": "peer", "requests": requests("a", MODEL, count, 0), **more}


def test_latency_begins_when_a_request_was_due(url: str):
    sent = ask("bench.load", plan(url, 6, due=[0.0] * 6))
    assert {one["status"] for one in sent} == {200}
    assert sorted(one["ended"] - one["due"] for one in sent)[-1] >= 6 * TAKES


def test_a_closed_loop_asks_when_it_was_answered(url: str):
    sent = ask("bench.load", plan(url, 6, in_flight=2))
    assert len(sent) == 6
    assert all(one["ended"] - one["due"] < 6 * TAKES for one in sent[:2])


def test_a_server_that_is_not_there_is_no_latency(url: str):
    (sent,) = ask("bench.load", plan("http://127.0.0.1:9", 1, due=[0.0]))
    assert sent["status"] == 0
    assert math.isnan(report.percentile(report.latencies({"sent": [sent]}), 50))


def test_all_systems_are_asked_for_the_same():
    assert requests("b", MODEL, 40, 3) == requests("b", MODEL, 40, 3) != requests("b", MODEL, 40, 4)
    assert arrivals(2.0, 20, 3) == arrivals(2.0, 20, 3)
    assert [2 * at for at in arrivals(2.0, 20, 3)] == pytest.approx(arrivals(1.0, 20, 3))


@pytest.mark.parametrize("mix", MIXES)
def test_kinds_come_in_their_shares(mix: str):
    asked = requests(mix, MODEL, 20, 1)
    for kind in MIXES[mix]:
        alike = [
            r
            for r in asked
            if (r["num_inference_steps"], r["guidance_scale"] > 1, r["width"], r["model"] == MODEL.second)
            == (kind.steps, kind.guided, int(MODEL.size * kind.size), kind.second)
        ]
        assert len(alike) == 20 * kind.share


def test_throughput_at_a_latency_is_read_between_the_points():
    curve = [(1.0, 2.0), (2.0, 4.0), (2.5, 14.0)]
    assert report.throughput_at(curve, 3.0) == (1.5, True)
    assert report.throughput_at(curve, 9.0) == (2.25, True)
    assert report.throughput_at(curve, 20.0) == (2.5, False)


def test_systems_are_compared_by_the_same_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "ALONE", 1)
    monkeypatch.setitem(MIXES, "d", [Kind(0.5, 4), Kind(0.5, 4, guided=False)])
    monkeypatch.setenv("DARKROOM_MAX_ROWS", "4")  # tried at warm-up
    words = "--systems darkroom,fastapi+net --mixes d --loads 0.8 --seeds 1 --minutes 0.2 --batch 2 --threads 1"
    assert bench.main([*words.split(), "--name", "small"]) == 0
    results = json.loads((tmp_path / "small.json").read_text())
    assert all(found["same"] for found in results["parity"].values())
    assert {point["system"] for point in results["points"]} == set(results["systems"])
    assert all(one["status"] == 200 for point in results["points"] for one in point["sent"])
    assert "| fastapi+net |" in capsys.readouterr().out


def test_a_name_says_in_which_batches_a_peer_is_to_draw_and_with_whose_nets():
    library, of = asked_of("mosec+net:16:0.2", Plan([], batch=8))
    assert (library, of.net, of.batch, of.wait) == ("mosec", True, 16, 0.2)
    assert asked_of("litserve", Plan([], batch=8)) == ("litserve", Plan([], batch=8))


def test_at_the_same_p99_as_the_best_peer_has_at_80_percent():
    def point(system: str, load: object, rate: float, takes: float) -> dict[str, object]:
        sent = [{"due": i / rate, "ended": i / rate + takes, "status": 200, "steps": 4} for i in range(20)]
        return {"mix": "b", "system": system, "load": load, "rate": rate, "sent": sent}

    points = [point("darkroom", "saturated", 9.0, 1.0), point("mosec", "saturated", 5.0, 1.0)]
    points += [point("darkroom", load, rate, takes) for load, rate, takes in ((0.5, 3.0, 1.0), (0.8, 6.0, 3.0))]
    points += [point("mosec", 0.8, 3.0, 2.0)]
    results = {"points": points, "systems": ["darkroom", "mosec"], "parity": {}, "mixes": ["b"]}
    assert "darkroom does 4.50/s: **1.50 ×**" in report.at_equal_p99(results, "b")
