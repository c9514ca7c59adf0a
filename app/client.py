"""What `darkroom generate` does over HTTP: submit, watch, fetch."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from app.events import ENDED


class Refused(Exception):
    """The service would not, or could not."""


class Client:
    def __init__(self, url: str, key: str | None = None):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx2.Client(base_url=url, headers=headers, timeout=30)

    def answers(self) -> bool:
        try:
            return self.http.get("/livez", timeout=2).status_code == 200
        except httpx2.HTTPError:
            return False

    def fetch(self, request: dict[str, Any]) -> bytes:
        """One picture; waits for it as long as it takes."""
        generation = self._checked(self.http.post("/v1/generations", json=request)).json()
        id = generation["id"]
        while generation["status"] in ("queued", "running"):
            with self.http.stream("GET", f"/v1/generations/{id}/events", timeout=None) as response:
                for name, _ in server_sent(response.iter_lines()):
                    if name in ENDED:
                        break
            generation = self._checked(self.http.get(f"/v1/generations/{id}")).json()
        if generation["status"] != "succeeded":
            raise Refused(
                f"{request['model']}: {generation['status']}: {(generation['error'] or {}).get('detail', '')}"
            )
        return self._checked(self.http.get(generation["images"][0]["url"])).content

    def draw(self, request: dict[str, Any], output: Path, console: Console) -> None:
        """Submit, show progress, write the pictures, print their paths and how long it took."""
        began = time.perf_counter()
        generation = self._checked(self.http.post("/v1/generations", json=request)).json()
        generation = self._watch(generation["id"], console)
        if generation["status"] != "succeeded":
            reason = (generation["error"] or {}).get("detail", "")
            raise Refused(f"{generation['status']}: {reason}".rstrip(": "))
        for warning in generation["warnings"]:
            console.print(f"[yellow]warning[/] {warning}")
        paths = named(output, len(generation["images"]))
        for path, image in zip(paths, generation["images"], strict=True):
            path.write_bytes(self._checked(self.http.get(image["url"])).content)
        took = time.perf_counter() - began
        for path, image in zip(paths, generation["images"], strict=True):
            console.print(
                f"[bold]{path}[/] · {image['width']}×{image['height']} · seed {image['seed']}", highlight=False
            )
        console.print(f"{took:.2f} s from request to file", highlight=False)

    def _watch(self, id: str, console: Console) -> dict[str, Any]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TimeElapsedColumn(),
        )
        with (
            Progress(*columns, console=console, transient=False) as bar,
            self.http.stream("GET", f"/v1/generations/{id}/events", timeout=None) as response,
        ):
            task = bar.add_task("queued", total=None, steps="")
            for name, data in server_sent(response.iter_lines()):
                if name in ENDED:
                    bar.update(task, description=name)
                    return data
                if "step" in data:
                    steps = f"step {data['step']} of {data['steps']}"
                    bar.update(
                        task,
                        description=data.get("stage", "drawing"),
                        completed=data["step"],
                        total=data["steps"],
                        steps=steps,
                    )
                else:
                    bar.update(task, description=name)
        raise Refused("the service closed the stream; the generation goes on: " + id)

    def _checked(self, response: httpx2.Response) -> httpx2.Response:
        if response.is_error:
            raise Refused(f"{response.status_code}: {response.json().get('detail', response.text)}")
        return response


def server_sent(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(event, data) of a text/event-stream whose data is one line of JSON."""
    name = "message"
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def named(output: Path, count: int) -> list[Path]:
    """picture.png, or picture-1.png, picture-2.png, …"""
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]


def encoded(path: Path | None) -> str | None:
    return base64.b64encode(path.read_bytes()).decode() if path else None
