"""The `darkroom` command."""

import os
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.settings import Settings, read_settings

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

    from app.dead import Dead
    from app.schemas import OutputFormat, Task
    from darkroom import Darkroom, Fields

cli = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pictures from guided diffusion models, over HTTP.",
)
console = Console(stderr=True)

HOST = typer.Option(help="Address to listen on.", show_default="127.0.0.1")
PORT = typer.Option(help="Port to listen on.", show_default="8000")


@cli.command()
def up(
    host: Annotated[str | None, HOST] = None,
    port: Annotated[int | None, PORT] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where everything is kept.", show_default="data")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes, one a GPU.")] = 1,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Serve until Ctrl-C: an embedded Valkey, the API and workers."""
    from app.local import LocalService
    from app.parts import StartFailed

    end_with_parent(with_parent)
    settings = read_settings(host=host, port=port, data_dir=data_dir)
    check_cards(settings)
    end_at_sigterm(0)
    try:
        status = console.status("starting")
        status.start()
        with LocalService(settings, workers, status.update, evaluates=True, delivers=True) as service:
            status.stop()
            console.print(
                f"[bold green]ready[/] {service.url} is the playground · docs at {service.url}/docs · Ctrl-C stops it"
            )
            service.watch(lambda line: console.print(line, soft_wrap=True, highlight=False))
    except KeyboardInterrupt:
        console.print("stopped")
    except StartFailed as error:
        raise SystemExit(str(error)) from None


@cli.command()
def api(
    host: Annotated[str | None, HOST] = None,
    port: Annotated[int | None, PORT] = None,
    shares_port: Annotated[bool, typer.Option("--shares-port", hidden=True)] = False,
) -> None:
    """Run the HTTP front end alone; REDIS_URL says where the queue is."""
    settings = read_settings(host=host, port=port)
    check_cards(settings)
    redis_url = required_redis(settings)
    from app import logs

    logs.set_up(settings)
    if settings.api_processes > 1 and not shares_port:
        watch_apis(settings)
    else:
        from app.main import create_app
        from app.server import serve

        serve(create_app(settings, redis_url), settings.host, settings.port, shares_port)


@cli.command()
def worker(last_words: Annotated[Path | None, typer.Option(hidden=True)] = None) -> None:
    """Run one worker; REDIS_URL says where the queue is."""
    settings = read_settings()
    check_cards(settings)
    redis_url = required_redis(settings)
    from app import logs

    logs.set_up(settings)
    from workers.main import run

    run(settings, redis_url, last_words)


@cli.command()
def evaluator() -> None:
    """Run what `POST /v1/evaluations` is answered by; REDIS_URL says where the queue is."""
    settings = read_settings()
    check_cards(settings)
    redis_url = required_redis(settings)
    from app import logs
    from app.evaluator import serve

    logs.set_up(settings)
    serve(settings, redis_url)


@cli.command()
def postman() -> None:
    """Deliver webhooks; REDIS_URL says where they wait."""
    settings = read_settings()
    check_cards(settings)
    redis_url = required_redis(settings)
    from app import logs
    from app.postman import serve

    logs.set_up(settings)
    serve(settings, redis_url)


@cli.command()
def generate(
    prompt: Annotated[str | None, typer.Argument()] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file; with --n, a number is added.")] = Path(
        "image.png"
    ),
    n: Annotated[int | None, typer.Option(min=1, help="How many.")] = None,
    model: str | None = None,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: Annotated[int | None, typer.Option(help="num_inference_steps")] = None,
    guidance_scale: float | None = None,
    scheduler: str | None = None,
    seed: Annotated[int | None, typer.Option(help="Zero is a seed; a random one if unset.")] = None,
    image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="White where it is repainted.")] = None,
    strength: float | None = None,
    task: Annotated[str | None, typer.Option(help="Such as variation; unset, it follows from what is given.")] = None,
    end_prompt: Annotated[str | None, typer.Option(help="What is at the other end of an interpolation.")] = None,
    end_image: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="The picture there.")] = None,
    control_image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="What a ControlNet follows.")
    ] = None,
    ip_adapter_image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="What an IP-Adapter takes up.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="How long a video is to be.")] = None,
    fps: Annotated[int | None, typer.Option(help="Its frames a second.")] = None,
    mix: Annotated[float | None, typer.Option(help="Where between the ends, from 0 to 1.")] = None,
    reproducible: bool = False,
    preview: Annotated[bool, typer.Option(help="Show the picture as it comes, where the terminal can.")] = True,
    url: Annotated[str, typer.Option(envvar="DARKROOM_URL", help="A running service.")] = "http://127.0.0.1:8000",
    fresh: Annotated[bool, typer.Option(help="Start a service for this, even if one is running.")] = False,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Draw a picture: on a running service or, with none, on one that is started for it."""
    from app.drawing import draw

    end_with_parent(with_parent)
    fields: Fields = {
        "task": cast("Task | None", task),  # the service knows which there are
        "n": n,
        "model": model,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "seed": seed,
        "image": image,
        "mask": mask,
        "strength": strength,
        "end_prompt": end_prompt,
        "end_image": end_image,
        "control_image": control_image,
        "ip_adapter_image": ip_adapter_image,
        "num_frames": num_frames,
        "fps": fps,
        "mix": mix,
        "reproducible": reproducible,
        "output_format": output_format(output),
    }
    with some_service(url, fresh, [model] if model else ()) as client:
        draw(client, prompt, fields, output, console, preview)


@cli.command("eval")
def evaluate(
    suite: Annotated[str, typer.Argument(help="One of ours (emoji), or a .toml, .tsv or .csv file of yours.")],
    models: Annotated[str, typer.Option(help="Names, separated by commas.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for the sheet.")] = Path("evaluation"),
    steps: Annotated[int | None, typer.Option(help="num_inference_steps")] = None,
    guidance_scale: float | None = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of the CLIP that judges; the shipped one if unset.")] = None,
    url: Annotated[str, typer.Option(envvar="DARKROOM_URL", help="A running service.")] = "http://127.0.0.1:8000",
    fresh: Annotated[bool, typer.Option(help="Start a service for this, even if one is running.")] = False,
) -> None:
    """Draw a suite of prompts with several models, and score them side by side."""
    from app.evaluation import Suite
    from app.evaluation import evaluate as draw_and_score

    try:
        prompts = Suite.read(suite)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    given = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    names = models.split(",")
    output.mkdir(parents=True, exist_ok=True)
    with some_service(url, fresh, names) as client, console.status("drawing") as status:
        scores = draw_and_score(
            lambda request: client.image(client.generate(**request).images[0]),
            lambda name, data: (output / name).write_bytes(data),
            prompts,
            names,
            given,
            lambda model, done, of: status.update(f"{model} · {done} of {of}"),
            clip,
        )
    table = Table("model", "category", "pictures", "CLIP agreement", "prompt found first", "background")
    for one in scores:
        background = "" if one.background is None else f"{one.background:.0%}"
        table.add_row(
            one.model, one.category, str(one.pictures), f"{one.agreement:.3f}", f"{one.found:.0%}", background
        )
    Console().print(table)
    console.print(f"[bold]{output / 'index.html'}[/]", highlight=False)


@contextmanager
def some_service(url: str, fresh: bool, models: "Sequence[str]" = ()) -> "Generator[Darkroom]":
    """A client of the service at `url` or, with none, of one that lives as long as this; `models` are to be served.

    What the service refuses, and what keeps it from starting, ends the command with that.
    """
    from app.local import LocalService
    from app.parts import StartFailed
    from darkroom import Darkroom, DarkroomError

    end_at_sigterm(143)
    try:
        if not fresh and answers(url):
            with Darkroom(url) as client:
                yield client
            return
        with tempfile.TemporaryDirectory(prefix="darkroom-", ignore_cleanup_errors=True) as directory:
            quiet = None if "DARKROOM_LOG_LEVEL" in os.environ else "warning"
            settings = read_settings(port=0, data_dir=Path(directory), log_level=quiet, models=tuple(models) or None)
            check_cards(settings)
            status = console.status("starting")
            status.start()
            with LocalService(settings, 1, status.update) as service, Darkroom(service.url) as client:
                status.stop()
                yield client
    except (DarkroomError, StartFailed) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def answers(url: str) -> bool:
    """Whether there is a service, at once."""
    import httpx2

    try:
        return httpx2.get(f"{url.rstrip('/')}/livez", timeout=2).status_code == 200
    except httpx2.HTTPError:
        return False


@cli.command()
def models() -> None:
    """List the models that there are cards for."""
    from models.catalog import CARDS, read_cards

    settings = read_settings()
    table = Table("name", "title", "tasks", "licence", "served")
    for folder in filter(None, (CARDS, settings.cards_dir)):
        for card in read_cards(folder):
            served = "yes" if card.name in settings.models else ""
            table.add_row(card.name, card.title, ", ".join(card.tasks), card.licence, served)
    Console().print(table)


@cli.command()
def simulate(
    mix: Annotated[
        str, typer.Option(help="a: 20 steps; b: 4 or 50; c: sizes and models; d: guidance on or off.")
    ] = "b",
    model: Annotated[str, typer.Option(help="Whose curve: sd15, sdxl or small, on one H100.")] = "sd15",
    requests: Annotated[int, typer.Option(min=100)] = 1500,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    plot: Annotated[Path | None, typer.Option(help="Draw latency over load into this PNG.")] = None,
) -> None:
    """Say what scheduling policies would do: seconds to wait, over load, by the policy that the engine runs."""
    from app.plot import Panel, draw
    from workers.simulation import CURVES, LOADS, MIXES, POLICIES, averaged, run

    for name, value, known in (("--mix", mix, MIXES), ("--model", model, CURVES)):
        if value not in known:
            raise SystemExit(f"{name} {value}: there are {', '.join(known)}")
    table = Table("load", "policy", "p50 s", "p99 s", "p99 s of the short", "requests/s")
    waits: dict[str, dict[str, list[tuple[float, float]]]] = {"p50": {}, "p99": {}, "p99_short": {}}
    for load in LOADS:
        for policy in POLICIES:
            found = averaged([run(policy, mix, model, load, requests, seed) for seed in range(seeds)])
            table.add_row(f"{load:.0%}", policy, *(f"{figure:.2f}" for figure in found))
            for name, curves in waits.items() if policy != "one by one" else ():  # beside which all others are flat
                curves.setdefault(policy, []).append((100 * load, getattr(found, name)))
        table.add_section()
    Console().print(table)
    if plot:
        titles = {"p50": "p50, seconds", "p99": "p99, seconds", "p99_short": "p99 of the short requests, seconds"}
        draw([Panel(titles[name], "load, % of saturation", curves) for name, curves in waits.items()], plot)


@cli.command()
def dead(
    requeue: Annotated[str | None, typer.Option(metavar="ID", help="Queue this one again.")] = None,
    traceback: Annotated[str | None, typer.Option(metavar="ID", help="What this one ended with.")] = None,
) -> None:
    """List the generations that failed, or look at one, or queue one again."""
    from redis.exceptions import RedisError

    from app import dead as letters
    from app.connection import connect
    from app.errors import ServiceError

    settings = read_settings()
    try:
        with connect(required_redis(settings), settings.redis_timeout) as connection:
            if requeue:
                letters.requeue(connection, requeue, settings.max_attempts)
                console.print(f"{requeue} is queued again", highlight=False)
            if traceback:
                typer.echo(letters.traceback_of(connection, traceback))
            if not (requeue or traceback):
                print_letters(letters.dead(connection))
    except ServiceError as error:
        raise SystemExit(error.detail) from None
    except RedisError as error:
        raise SystemExit(f"Redis does not answer: {error}") from None


@cli.command()
def webhooks(
    resend: Annotated[str | None, typer.Option(metavar="ID", help="Deliver this one after all.")] = None,
) -> None:
    """List the webhooks that nobody took, or send one again."""
    from redis.exceptions import RedisError

    from app.connection import connect
    from app.errors import ServiceError
    from app.webhooks import Outbox

    settings = read_settings()
    try:
        with connect(required_redis(settings), settings.redis_timeout) as connection:
            if resend:
                Outbox(connection).resend(resend)
                console.print(f"{resend} is sent again", highlight=False)
                return
            table = Table("id", "url", "tries", "since", "reason")
            table.columns[0].no_wrap = True
            for one in Outbox(connection).dead():
                since = f"{one.since:%Y-%m-%d %H:%M:%S}"
                table.add_row(one.id, escape(one.url), str(one.tries), since, escape(one.reason))
            Console().print(table)
    except ServiceError as error:
        raise SystemExit(error.detail) from None
    except RedisError as error:
        raise SystemExit(f"Redis does not answer: {error}") from None


def watch_apis(settings: Settings) -> None:
    """As many as the settings say, until a signal comes."""
    from app.local import Apis
    from app.parts import StartFailed

    end_at_sigterm(0)
    try:
        with Apis(settings) as service:
            service.watch(lambda line: console.print(line, soft_wrap=True, highlight=False))
    except KeyboardInterrupt:
        pass
    except StartFailed as error:
        raise SystemExit(str(error)) from None


def print_letters(letters: "Iterable[Dead]") -> None:
    table = Table("id", "model", "owner", "attempts", "ended", "reason")
    table.columns[0].no_wrap = True
    for letter in letters:
        ended = f"{letter.ended_at:%Y-%m-%d %H:%M:%S}" if letter.ended_at else ""
        reason = escape(f"{letter.reason.type}: {letter.reason.detail}")
        table.add_row(letter.id, letter.model, escape(letter.owner), str(letter.attempts), ended, reason)
    Console().print(table)


def end_with_parent(wanted: bool) -> None:
    """For `make`: killed, it must not leave us behind."""
    if wanted:
        from app.parts import die_with_parent

        die_with_parent(os.getppid(), signal.SIGTERM)


def end_at_sigterm(status: int) -> None:
    """As at Ctrl-C. What a signal raises in a `__del__` Python only reports, and goes on: so it is sent again."""
    report = sys.unraisablehook

    def send_again(what: "sys.UnraisableHookArgs") -> None:
        if isinstance(what.exc_value, SystemExit | KeyboardInterrupt):
            number = signal.SIGTERM if isinstance(what.exc_value, SystemExit) else signal.SIGINT
            threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # when we are back from there
        else:
            report(what)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
    sys.unraisablehook = send_again


def check_cards(settings: Settings) -> None:
    """A model without a card, or a wrong card, stops start-up with its name."""
    from models.catalog import Catalog

    try:
        Catalog.read(settings.models, settings.cards_dir)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def required_redis(settings: Settings) -> str:
    if settings.redis_url is None:
        raise SystemExit("REDIS_URL is not set; `darkroom up` runs everything, a server included")
    return settings.redis_url


def output_format(path: Path) -> "OutputFormat":
    """By the file's name: .png, .jpg, .jpeg, .webp, .avif or .mp4."""
    suffix = path.suffix.lower().lstrip(".")
    known: dict[str, OutputFormat] = {
        "png": "png",
        "jpg": "jpeg",
        "jpeg": "jpeg",
        "webp": "webp",
        "avif": "avif",
        "mp4": "mp4",
    }
    if suffix not in known:
        raise typer.BadParameter(f"{path}: a picture's name ends in .png, .jpg, .webp or .avif, a video's also in .mp4")
    return known[suffix]


def main() -> None:
    cli()


if __name__ == "__main__":
    main()
