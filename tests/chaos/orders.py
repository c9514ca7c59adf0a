"""What the clients ask for: a few pictures whose right bytes are known, and how the client behaves about each."""

import base64
import functools
import io
import random
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from PIL import Image, ImageDraw

Manner = Literal["poll", "watch", "cancel", "expire", "vanish", "careless"]
MANNERS: Mapping[Manner, int] = {  # in how many of a hundred orders
    "poll": 46,
    "watch": 15,  # over server-sent events
    "cancel": 10,
    "expire": 6,
    "vanish": 13,  # the client goes while it waits or watches
    "careless": 10,  # no idempotency key, and not tried again
}
SCHEDULERS = ("unipc", "dpmpp_2m", "ddim", "euler", "euler_a", "heun", "deis", "ddpm", "dpmpp_2m_sde", "pndm")


class Order(NamedTuple):
    body: Mapping[str, Any]
    picture: str | None  # which of `PICTURES` it is, if its bytes are known
    manner: Manner
    number: int
    seed: int

    @property
    def rng(self) -> random.Random:
        """Of all that its client leaves to chance."""
        return random.Random(f"{self.seed}/client/{self.number}")


def png(mode: str, size: int, paint: Any) -> str:
    image = Image.new(mode, (size, size), "navy" if mode == "RGB" else 0)
    paint(ImageDraw.Draw(image))
    data = io.BytesIO()
    image.save(data, "png")
    return base64.b64encode(data.getvalue()).decode()


@functools.cache
def picture() -> str:
    return png("RGB", 64, lambda on: on.ellipse((12, 12, 52, 52), "gold"))


@functools.cache
def mask() -> str:
    return png("L", 64, lambda on: on.rectangle((20, 20, 44, 44), 255))


def pictures() -> dict[str, dict[str, Any]]:
    """Every scheduler, every task, several sizes, one or two at once; always the same bytes."""
    things = ("a red apple", "a blue whale on a yellow background", "a rocket", "a green pear", "a small dog")
    found = {}
    for i, scheduler in enumerate(SCHEDULERS):
        found[f"text {scheduler}"] = {
            "prompt": things[i % len(things)],
            "scheduler": scheduler,
            "num_inference_steps": 4 + i % 5,
            "width": 128 if scheduler == "pndm" else (64, 64, 96)[i % 3],
            "height": (64, 96, 64, 64)[i % 4],
        }
    found["two at once"] = {"prompt": "two cats", "n": 2, "num_inference_steps": 5, "scheduler": "unipc"}
    found["unguided"] = {"prompt": "a tree", "num_inference_steps": 2, "guidance_scale": 1.0, "scheduler": "ddim"}
    found["webp"] = {"prompt": "a moon", "num_inference_steps": 3, "output_format": "webp"}
    for scheduler in ("unipc", "euler_a"):
        given = {"image": picture(), "strength": 0.7, "num_inference_steps": 8}
        found[f"image {scheduler}"] = {"prompt": "a sunflower", "scheduler": scheduler, **given}
    given = {"image": picture(), "mask": mask(), "num_inference_steps": 6}
    found["inpaint"] = {"prompt": "a heart", "scheduler": "dpmpp_2m", **given}
    size = {"width": 64, "height": 64}
    return {name: {**size, **body, "seed": i, "reproducible": True} for i, (name, body) in enumerate(found.items())}


PICTURES = pictures()
SLOW = [name for name, body in PICTURES.items() if body["num_inference_steps"] >= 5]  # may be hit in the middle


def order(seed: int, number: int) -> Order:
    """The order of this number: always the same for a seed."""
    rng = random.Random(f"{seed}/order/{number}")
    manner = rng.choices(list(MANNERS), list(MANNERS.values()))[0]
    priority = rng.choice(["high", "normal", "normal", "low"])
    if rng.random() < 0.15:  # the default lane, whose bytes depend on its company
        body = {"prompt": "a yellow duck", "num_inference_steps": rng.randint(2, 6), "width": 64, "height": 64}
        return Order({**body, "seed": rng.randrange(99), "priority": priority}, None, manner, number, seed)
    name = rng.choice(list(PICTURES))
    body = {**PICTURES[name], "priority": priority}
    if manner == "expire":
        body["expires_in"] = rng.choice([1, 2, 5, 30])
    return Order(body, name, manner, number, seed)


def special(seed: int, number: int, metadata: dict[str, str], manner: Manner = "poll") -> Order:
    """One that brings its own misfortune: poison, or an ambush."""
    name = random.Random(f"{seed}/special/{number}").choice(SLOW)
    body = {**PICTURES[name], "metadata": metadata, "priority": "high"}
    return Order(body, name, manner, number, seed)
