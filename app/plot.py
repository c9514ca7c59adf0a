"""Curves in panels, drawn with Pillow: matplotlib would be a dependency for one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, COLUMNS = 560, 300, 2  # of a panel, and how many side by side
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 44, 44
COLOURS = ("#1f5fa8", "#c4511d", "#2f8f4e", "#7b4aa5", "#8a7a1c")
INK, GRID = "#333333", "#dddddd"


class Panel(NamedTuple):
    title: str
    across: str  # what the x axis is
    curves: Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[Panel], path: Path) -> None:
    rows = -(-len(panels) // COLUMNS)
    image = Image.new("RGB", (COLUMNS * WIDTH, rows * HEIGHT), "white")
    on = ImageDraw.Draw(image)
    for i, panel in enumerate(panels):
        draw_panel(on, panel, i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT)
    image.save(path, optimize=True)


def draw_panel(on: ImageDraw.ImageDraw, panel: Panel, x0: int, y0: int) -> None:
    """From zero up, so that flat looks flat."""
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    left, right, top, bottom = x0 + LEFT, x0 + WIDTH - RIGHT, y0 + TOP, y0 + HEIGHT - BOTTOM
    points = [point for curve in panel.curves.values() for point in curve]
    highest, furthest = (nice(max((point[axis] for point in points), default=1)) for axis in (1, 0))
    on.text((left, y0 + 6), panel.title, INK, bold)
    on.text(((left + right) // 2, bottom + 24), panel.across, INK, font, anchor="mt")
    for i in range(5):
        y, x = bottom - (bottom - top) * i // 4, left + (right - left) * i // 4
        on.line((left, y, right, y), GRID)
        on.text((left - 8, y), f"{highest * i / 4:g}", INK, font, anchor="rm")
        on.text((x, bottom + 8), f"{furthest * i / 4:g}", INK, font, anchor="mt")
    on.line((left, top, left, bottom, right, bottom), INK)
    beside = right
    for (name, curve), colour in zip(panel.curves.items(), COLOURS, strict=False):
        line = [(left + (right - left) * x / furthest, bottom - (bottom - top) * value / highest) for x, value in curve]
        on.line(line, colour, 2)
        if len(panel.curves) > 1:
            on.text((beside, y0 + 25), name, colour, font, anchor="rt")
            beside -= round(on.textlength(name, font)) + 14


def nice(largest: float) -> float:
    """The next 1, 1.5, 2, 3, 4, 5, 6 or 8 times a power of ten."""
    power = 1.0
    while power * 10 <= largest:
        power *= 10
    while power > largest:
        power /= 10
    return next((step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8) if step * power >= largest), 10 * power)
