"""`darkroom eval`: a suite of prompts over several models, side by side, with scores."""

import csv
import html
import io
import json
import statistics
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, Field

from app.schemas import Text

SUITES = Path(__file__).parent.parent / "models" / "suites"
DELIMITERS = {".tsv": "\t", ".csv": ","}
AT_ONCE = 16

Draw = Callable[[dict[str, Any]], bytes]
"""A generation's request to its picture, as a PNG."""


class Prompt(BaseModel, extra="forbid", str_strip_whitespace=True):
    category: str
    prompt: Text = Field(min_length=1)
    background: str | None = None  # one of the suite's colours


class Suite(BaseModel, extra="forbid"):
    """A data file of prompts by category."""

    title: str
    colours: dict[str, tuple[int, int, int]] = {}
    prompts: list[Prompt]

    @classmethod
    def read(cls, name: str) -> "Suite":
        """A suite of ours by its name, or a file of yours.

        Raises:
            ValueError: there is none, or it is wrong; the message says what.
        """
        path = Path(name)
        if path.suffix not in (".toml", *DELIMITERS):
            return cls.ours(name)
        if not path.is_file():
            raise ValueError(f"there is no file {name}")
        if path.suffix == ".toml":
            return cls.model_validate(tomllib.loads(path.read_text()))
        return cls(title=path.stem, prompts=list(table(path)))

    @classmethod
    def ours(cls, name: str) -> "Suite":
        """One that ships.

        Raises:
            ValueError: there is none of this name.
        """
        files = {file.stem: file for file in SUITES.glob("*.toml")}
        if name not in files:
            some = f"there are {', '.join(sorted(files))}, and files that end in .toml, .tsv or .csv"
            raise ValueError(f"there is no suite {name!r}; {some}")
        return cls.model_validate(tomllib.loads(files[name].read_text()))


def table(path: Path) -> Iterator[Prompt]:
    """The prompts of a file with columns, as PartiPrompts (`Prompt`, `Category`) and DrawBench (`Prompts`) come.

    Raises:
        ValueError: a column is missing, or a row is short.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter=DELIMITERS[path.suffix])
        columns = rows.fieldnames or ()
        prompt = next((name for name in ("Prompt", "Prompts") if name in columns), None)
        if prompt is None or "Category" not in columns:
            raise ValueError(f"{path} needs the columns Prompt and Category; it has {', '.join(columns)}")
        for row in rows:
            yield Prompt.model_validate({"category": row["Category"], "prompt": row[prompt]})


@dataclass(frozen=True)
class Score:
    """Of one model in one category."""

    model: str
    category: str
    pictures: int
    agreement: float  # CLIP's cosine of picture and prompt
    found: float  # how often the picture's own prompt is CLIP's first choice among the suite's
    background: float | None  # how often the border has the colour that was named


def evaluate(
    draw: Draw,
    save: Callable[[str, bytes], object],
    suite: Suite,
    models: list[str],
    given: dict[str, Any],
    tell: Callable[[str, int, int], None],
    clip: Path | None = None,
) -> list[Score]:
    """Draw every prompt with every model, score them, and save index.html, scores.json and the pictures.

    Args:
        tell: is told, for a model, how many pictures are done, of how many.
        clip: folder of the CLIP model that judges, in transformers' layout; the shipped one if there is none.
    """
    scores = list[Score]()
    for model in models:
        requests = [{"model": model, "prompt": one.prompt, "seed": i} | given for i, one in enumerate(suite.prompts)]
        pictures = list[Image.Image]()
        with ThreadPoolExecutor(AT_ONCE) as clients:
            try:
                for i, data in enumerate(clients.map(draw, requests)):
                    save(picture_name(model, i), data)
                    pictures.append(Image.open(io.BytesIO(data)))
                    tell(model, i + 1, len(requests))
            except BaseException:
                clients.shutdown(wait=False, cancel_futures=True)  # one that fails ends it: no more are begun
                raise
        scores += score(suite, model, pictures, clip)
    save("scores.json", json.dumps([asdict(one) for one in scores], indent=1).encode())
    save("index.html", sheet(suite, models, scores).encode())
    return scores


def picture_name(model: str, index: int) -> str:
    return f"{model}-{index:03}.png"


def score(suite: Suite, model: str, pictures: list[Image.Image], clip: Path | None = None) -> list[Score]:
    """By category, then of all of them."""
    from models.scoring import NEAR, Scorer, distance_from

    scorer = Scorer(clip) if clip else Scorer()
    captions = sorted({one.prompt for one in suite.prompts})
    agreement = scorer.pictures(pictures) @ scorer.captions(captions).T
    own = [captions.index(one.prompt) for one in suite.prompts]
    cosines = [float(agreement[i, k]) for i, k in enumerate(own)]
    found = [int(agreement[i].argmax()) == k for i, k in enumerate(own)]
    near = [
        None if one.background is None else distance_from(picture, suite.colours[one.background]) < NEAR
        for one, picture in zip(suite.prompts, pictures, strict=True)
    ]

    def mean_of(category: str, rows: list[int]) -> Score:
        named = [near[i] for i in rows if near[i] is not None]
        return Score(
            model,
            category,
            len(rows),
            round(statistics.mean(cosines[i] for i in rows), 4),
            round(statistics.mean(found[i] for i in rows), 4),
            round(statistics.mean(bool(one) for one in named), 4) if named else None,
        )

    categories = list(dict.fromkeys(one.category for one in suite.prompts))
    rows = {name: [i for i, one in enumerate(suite.prompts) if one.category == name] for name in categories}
    return [mean_of(name, of) for name, of in rows.items()] + [mean_of("all", list(range(len(pictures))))]


STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
:root { color-scheme: light dark }
table { border-collapse: collapse } th, td { padding: .25rem .75rem; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums } tr { border-bottom: 1px solid #8884 }
img { display: block; width: 128px }
"""


def sheet(suite: Suite, models: list[str], scores: list[Score]) -> str:
    """Side by side: a page that needs nothing but the pictures beside it."""

    def row(cells: list[str], tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    table = [row(["model", "category", "pictures", "CLIP agreement", "prompt found first", "background"], "th")]
    table += [
        row(
            [
                one.model,
                one.category,
                str(one.pictures),
                f"{one.agreement:.3f}",
                percent(one.found),
                percent(one.background),
            ]
        )
        for one in scores
    ]
    pictures = [row(["", *map(html.escape, models)], "th")]
    for i, one in enumerate(suite.prompts):
        shown = [f'<img src="{picture_name(model, i)}" alt="{html.escape(one.prompt)}">' for model in models]
        pictures.append(row([f"{html.escape(one.prompt)}<br><small>{html.escape(one.category)}</small>", *shown]))
    title = html.escape(suite.title)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
        f"<h1>{title}</h1><table>{''.join(table)}</table><h2>Side by side</h2><table>{''.join(pictures)}</table>"
    )
