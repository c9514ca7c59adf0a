"""Whether a system draws what the stock pipeline draws: who draws something else is not compared."""

import io
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from bench.peers.plan import Plan
from bench.systems import System, ask, picture

# Mean difference of 255: rows that share a pass differ in their last bits, which 16 bits have fewer of.
TOLERANCE = {"float32": 0.02, "float16": 1.0, "bfloat16": 4.0}


def parity(systems: Mapping[str, System], plan: Plan, examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each system, asked for all examples at once, against the pipeline in a process of its own, one at a time."""
    drawn = ask("bench.parity", {"plan": asdict(plan), "examples": examples})
    expected = [pixels(bytes.fromhex(file)) for file in drawn["files"]]
    return {name: judged(system, examples, expected, drawn["dtype"]) for name, system in systems.items()}


def judged(system: System, examples: list[dict[str, Any]], expected: list[Any], dtype: str) -> dict[str, Any]:
    with ThreadPoolExecutor(len(examples)) as clients:
        files = list(clients.map(lambda example: picture(system, example), examples))
    differences = [np.abs(pixels(file) - other) for file, other in zip(files, expected, strict=True)]
    mean = max(float(difference.mean()) for difference in differences)
    greatest = max(int(difference.max()) for difference in differences)
    return {"mean": mean, "greatest": greatest, "dtype": dtype, "same": mean <= TOLERANCE[dtype]}


def pixels(file: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


if __name__ == "__main__":
    from bench.peers.drawing import catalog_of, drawing
    from models.prepare import dtype_of

    question = json.load(sys.stdin)
    asked = Plan(**question["plan"])
    draw = drawing(asked)
    dtype = str(dtype_of(catalog_of(asked).default, asked.device)).removeprefix("torch.")
    json.dump({"dtype": dtype, "files": [draw([one])[0].hex() for one in question["examples"]]}, sys.stdout)
