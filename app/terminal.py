"""Pictures in a terminal: by kitty's or iTerm2's protocol, or as half blocks in 24-bit colour."""

import base64
import io
import secrets
from collections.abc import Iterator, Mapping
from typing import Literal

from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import ControlType, Segment
from rich.style import Style

Way = Literal["kitty", "iterm2", "blocks"]

ROWS = 16  # at most; a cell is twice as high as wide, so a square has 32 columns
CHUNK = 4096  # bytes that kitty takes at once


def way(console: Console, environment: Mapping[str, str]) -> Way | None:
    """How this terminal can show a picture, by what it says of itself; None if it cannot."""
    if not console.is_terminal or console.height < ROWS + 2:  # the bar goes below it
        return None
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "TMUX" not in environment and not term.startswith(("screen", "tmux")):  # they let neither protocol through
        if "kitty" in term or "ghostty" in term:
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    return "blocks" if console.color_system == "truecolor" else None


class Screen:
    """Where a picture is shown, one after another in the same place, within what rich keeps up to date."""

    def __init__(self, way: Way | None):
        self.way = way
        self.id = secrets.randbelow(2**24) + 1  # of kitty's, which would move an earlier picture of this number
        self.picture: Image.Image | None = None
        self.shown = False

    def show(self, file: bytes) -> None:
        if self.way is not None:
            self.picture, self.shown = Image.open(io.BytesIO(file)).convert("RGB"), False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.picture is None:
            return
        shape = self.picture.width / self.picture.height
        columns = min(options.max_width, round(2 * ROWS * shape))
        rows = max(1, round(columns / 2 / shape))
        if self.way == "blocks":
            yield from blocks(self.picture, columns, rows)
            return
        yield from [Segment.line()] * rows
        if self.way == "iterm2" or not self.shown:  # there rich erases the picture with the lines; kitty keeps it
            out = io.BytesIO()
            self.picture.save(out, "PNG")
            png, size = out.getvalue(), (columns, rows)
            drawn = kitty(png, *size, self.id) if self.way == "kitty" else iterm2(png, *size)
            # Up to the first of the lines, which are there by now, and back.
            yield Segment(f"\x1b7\x1b[{rows}A\r{drawn}\x1b8", None, [(ControlType.CURSOR_UP, rows)])
            self.shown = True


def blocks(picture: Image.Image, columns: int, rows: int) -> Iterator[Segment]:
    """Two pixels a cell: the upper half in the foreground's colour, the lower in the background's."""
    small = picture.resize((columns, 2 * rows), Image.Resampling.LANCZOS).tobytes()
    width = 3 * columns
    for top in range(0, len(small), 2 * width):
        for at in range(top, top + width, 3):
            upper, lower = Color.from_rgb(*small[at : at + 3]), Color.from_rgb(*small[at + width : at + width + 3])
            yield Segment("▀", Style(color=upper, bgcolor=lower))
        yield Segment.line()


def kitty(png: bytes, columns: int, rows: int, id: int) -> str:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol: shown at once (a=T), answered by nothing (q=2)."""
    data = base64.b64encode(png).decode()
    parts = [data[i : i + CHUNK] for i in range(0, len(data), CHUNK)]
    heads = [f"a=T,f=100,i={id},p=1,c={columns},r={rows},C=1,q=2,"] + [""] * (len(parts) - 1)
    more = [1] * (len(parts) - 1) + [0]
    return "".join(
        f"\x1b_G{head}m={follows};{part}\x1b\\" for head, follows, part in zip(heads, more, parts, strict=True)
    )


def iterm2(png: bytes, columns: int, rows: int) -> str:
    """https://iterm2.com/documentation-images.html"""
    size = f"size={len(png)};width={columns};height={rows};preserveAspectRatio=1"
    return f"\x1b]1337;File=inline=1;{size}:{base64.b64encode(png).decode()}\x07"
