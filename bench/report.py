"""What points come to: tables, curves, and how much more goes through at the same p99."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from app.plot import Panel, draw
from bench.ceilings import a_picture_tflop, ideal
from bench.systems import OURS

Point = Mapping[str, Any]
COMMON = "common"  # a load that is the same rate for all
DROPPED = 0.1  # of a point's requests, the first: the queue is not yet what it will be


def latencies(point: Point) -> list[float]:
    """Seconds from when a request was due, of all that were answered with a picture."""
    sent = sorted(point["sent"], key=lambda one: one["due"])
    return [one["ended"] - one["due"] for one in sent[int(DROPPED * len(sent)) :] if one["status"] == 200]


def previews(point: Point) -> list[float]:
    return [one["first"] - one["due"] for one in point["sent"] if one["first"] is not None]


def rate(point: Point) -> float:
    """Pictures a second, from the first request to the last picture."""
    done = [one for one in point["sent"] if one["status"] == 200]
    return len(done) / (max(one["ended"] for one in done) - min(one["due"] for one in done)) if done else 0.0


def percentile(values: Sequence[float], of: int) -> float:
    return quantiles(values, n=100, method="inclusive")[of - 1] if len(values) > 1 else (*values, float("nan"))[0]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    if not values:
        return "–"
    middle = format(median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}–{max(values):{form}})"


def by(points: Sequence[Point], *fields: str) -> dict[tuple[Any, ...], list[Point]]:
    found = defaultdict[tuple[Any, ...], list[Point]](list)
    for point in points:
        found[tuple(point[field] for field in fields)].append(point)
    return found


# -- tables


def tables(results: Mapping[str, Any]) -> str:
    parts = [
        machine(results),
        parity_table(results),
        alone_table(results),
        *(mix_tables(results, mix) for mix in results["mixes"]),
    ]
    return "\n\n".join(part for part in parts if part)


def machine(results: Mapping[str, Any]) -> str:
    ceilings = results.get("ceilings")
    if not ceilings:
        return ""
    return (
        f"{results['model']} on {results['device']}, {results['cores']} cores, {ceilings['dtype']}. "
        f"Ceilings of this run: product {ceilings['matmul_tflops']:.3g} TFLOP/s, "
        f"copy {1000 * ceilings['copy_tbs']:.3g} GB/s. Seeds {', '.join(map(str, results['seeds']))}."
    )


def parity_table(results: Mapping[str, Any]) -> str:
    lines = ["| picture against the stock pipeline's | mean difference of 255 | greatest | |", "|---|---|---|---|"]
    for name, found in results.get("parity", {}).items():
        verdict = "same" if found["same"] else "**void**"
        lines.append(f"| {name} | {found['mean']:.4f} | {found['greatest']} | {verdict} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def alone_table(results: Mapping[str, Any]) -> str:
    lines = ["| one picture, nothing else | seconds |", "|---|---|"]
    lines += [f"| {name} | {spread(seconds)} |" for name, seconds in results["alone"].items()]
    return "\n".join(lines) if len(lines) > 2 else ""


def mix_tables(results: Mapping[str, Any], mix: str) -> str:
    points = [point for point in results["points"] if point["mix"] == mix]
    valid = [name for name in results["systems"] if results["parity"].get(name, {}).get("same", True)]
    saturated = {name: [rate(p) for p in found] for (name,), found in by(only(points, "saturated"), "system").items()}
    lines = [
        f"**Mix {mix.upper()}**, saturated",
        "",
        "| | pictures/s | of ours | of the curve's ideal | MFU |",
        "|---|---|---|---|---|",
    ]
    best = ideal(results["curves"], mix) if results.get("curves") else None
    tflop = a_picture_tflop(results["ceilings"], mix) if results.get("ceilings") else None
    for name in results["systems"]:
        if name not in valid:
            lines.append(f"| {name} | void | | | |")
        elif name in saturated:
            got = median(saturated[name])
            share = f"{got / median(saturated[OURS]):.2f}" if OURS in saturated else ""
            of_ideal = f"{got / best:.0%}" if best else ""
            mfu = f"{got * tflop / results['ceilings']['matmul_tflops']:.0%}" if tflop else ""
            lines.append(f"| {name} | {spread(saturated[name])} | {share} | {of_ideal} | {mfu} |")
    open_loop = by([p for p in points if p["load"] != "saturated"], "load", "system")
    if open_loop:
        head = (
            "| load | | offered/s | done/s | p50, s | p99, s | p99 of the short, s | first seen p50, s | no picture |"
        )
        lines += ["", f"Mix {mix.upper()}, open loop", "", head, "|---|---|---|---|---|---|---|---|---|"]
    for load in dict.fromkeys(load for load, _ in open_loop):
        for name in results["systems"]:
            if (found := open_loop.get((load, name))) and name in valid:
                lines.append(open_line(load, name, found))
    if best_share := at_equal_p99(results, mix):
        lines += ["", best_share]
    return "\n".join(lines)


def only(points: Sequence[Point], load: object) -> list[Point]:
    return [point for point in points if point["load"] == load]


def open_line(load: Any, name: str, points: Sequence[Point]) -> str:
    everyone = [latency for point in points for latency in latencies(point)]
    shortest = min(one["steps"] for point in points for one in point["sent"])
    short = [
        one["ended"] - one["due"]
        for p in points
        for one in p["sent"]
        if one["steps"] == shortest and one["status"] == 200
    ]
    seen = [first for point in points for first in previews(point)]
    first = f"{percentile(seen, 50):.2f}" if seen else f"{percentile(everyone, 50):.2f}†"
    failed = sum(one["status"] != 200 for point in points for one in point["sent"])
    title = "same rate" if load == COMMON else f"{load:.0%}"
    p50 = spread([percentile(latencies(point), 50) for point in points])
    return (
        f"| {title} | {name} | {mean(p['rate'] for p in points):.2f} | {mean(rate(p) for p in points):.2f} | {p50} | "
        f"{percentile(everyone, 99):.2f} (n={len(everyone)}) | {percentile(short, 99):.2f} | {first} | {failed} |"
    )


# -- curves


def curve(results: Mapping[str, Any], mix: str, name: str, of: int) -> list[tuple[float, float]]:
    """(pictures a second, seconds) by offered load, of all seeds."""
    points = [
        p for p in results["points"] if (p["mix"], p["system"]) == (mix, name) and p["load"] not in ("saturated",)
    ]
    found = []
    for _, at in sorted(by(points, "load").items(), key=lambda item: mean(p["rate"] for p in item[1])):
        values = [latency for point in at for latency in latencies(point)]
        if values:
            found.append((mean(carried(results, point) for point in at), percentile(values, of)))
    return sorted(found)


def carried(results: Mapping[str, Any], point: Point) -> float:
    """Pictures a second: what was offered, up to what the system can do. A short point's own rate counts its tail."""
    fields = ("mix", "system")
    like = [p for p in only(results["points"], "saturated") if all(p[field] == point[field] for field in fields)]
    return min([point["rate"], *(rate(p) for p in like)])


def at_equal_p99(results: Mapping[str, Any], mix: str) -> str:
    """At the p99 that the best peer has at 80 % of what it can do: how much of that we do, by the curves."""
    best: tuple[float, float, str] | None = None
    for name in results["systems"]:
        found = [p for p in results["points"] if (p["mix"], p["system"], p["load"]) == (mix, name, 0.8)]
        same = results["parity"].get(name, {}).get("same", True)
        if found and name != OURS and same:
            p99 = percentile([latency for point in found for latency in latencies(point)], 99)
            best = max(best or (0.0, 0.0, ""), (mean(carried(results, p) for p in found), p99, name))
    ours = curve(results, mix, OURS, 99)
    if best is None or len(ours) < 2:
        return ""
    throughput, p99, name = best
    reached, within = throughput_at(ours, p99)
    about = "" if within else ", at least"
    return (
        f"At a p99 of {p99:.2f} s, which {name} has at {throughput:.2f} pictures/s, {OURS} does {reached:.2f}/s: "
        f"**{reached / throughput:.2f} ×**{about}"
    )


def throughput_at(points: Sequence[tuple[float, float]], seconds: float) -> tuple[float, bool]:
    """Where a curve reaches so many seconds, between the points that were measured; and whether it does."""
    reached = 0.0
    for (x0, y0), (x1, y1) in zip([(0.0, 0.0), *points], points, strict=False):
        if y1 > seconds:
            return (max(reached, x0 + (x1 - x0) * max(0.0, (seconds - y0) / (y1 - y0))) if y1 > y0 else reached), True
        reached = max(reached, x1)
    return reached, False


def plot(results: Mapping[str, Any], path: Path) -> None:
    panels = [
        Panel(
            f"Mix {mix.upper()}: {title} over pictures a second (s)",
            "pictures a second",
            {name: points for name in results["systems"] if (points := curve(results, mix, name, of))},
        )
        for mix in results["mixes"]
        for title, of in (("p50", 50), ("p99", 99))
    ]
    if any(panel.curves for panel in panels):
        draw(panels, path)
