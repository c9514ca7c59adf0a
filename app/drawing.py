"""What `darkroom generate` does: draw, show how far it is, write the pictures, say where they are."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from app.terminal import Screen, way
from darkroom import Darkroom, DarkroomError, Event, Fields, Generation
from darkroom.exchange import drawn

PREVIEWS = 5  # on the way to a picture


def draw(client: Darkroom, prompt: str | None, fields: Fields, output: Path, console: Console, preview: bool) -> None:
    """Who interrupts it no longer wants the picture."""
    began = time.perf_counter()
    screen = Screen(way(console, os.environ) if preview else None)
    if screen.way:
        fields["preview_every"] = max(1, steps_of(client, fields) // (PREVIEWS + 1))
    generation = client.submit(prompt, **fields)
    try:
        generation, paths = watched(client, generation, output, console, screen)
    except KeyboardInterrupt:
        with suppress(DarkroomError):  # it ended just now
            client.cancel(generation)
        raise
    took = time.perf_counter() - began
    for warning in generation.warnings:
        console.print(f"[yellow]warning[/] {warning}")
    for path, image in zip(paths, generation.images, strict=True):
        console.print(f"[bold]{path}[/] · {image.width}×{image.height} · seed {image.seed}", highlight=False)
    console.print(f"{took:.2f} s from request to file", highlight=False)


def watched(
    client: Darkroom, generation: Generation, output: Path, console: Console, screen: Screen
) -> tuple[Generation, list[Path]]:
    """The generation when it has ended, and its files.

    Raises:
        NotDrawn: there are none.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[steps]}"),
        TimeElapsedColumn(),
        console=console,
    )
    task = bar.add_task("queued", total=None, steps="")
    with Live(Group(screen, bar), console=console):
        for event in client.watch(generation):
            bar.update(task, **told(event))
            if event.preview and event.preview.number == 0 and screen.way:
                screen.show(client.image(event.preview))
            generation = event.generation or generation
        paths = client.save(drawn(generation), output)
        if generation.images[0].frames == 1:
            screen.show(paths[0].read_bytes())
    return generation, paths


def told(event: Event) -> dict[str, Any]:
    """What the bar says of it."""
    if event.step is None:
        return {"description": event.name}
    steps = f"step {event.step} of {event.steps}"
    return {"description": event.stage or "drawing", "completed": event.step, "total": event.steps, "steps": steps}


def steps_of(client: Darkroom, fields: Fields) -> int:
    """How many it will be."""
    models = client.models()
    model = next((one for one in models if one.name == fields.get("model")), models[0])
    return fields.get("num_inference_steps") or model.defaults.num_inference_steps
