"""A picture in a terminal, as `darkroom generate` shows it: what the terminal is sent, through a pty."""

import base64
import io
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from app.local import LocalService
from app.terminal import ROWS, Screen, way

SAYS_NOTHING = {"TERM": "xterm", "COLORTERM": "", "TERM_PROGRAM": "", "LC_TERMINAL": "", "COLUMNS": "", "LINES": ""}
KITTY = {"TERM": "xterm-kitty"}
ITERM2 = {"TERM_PROGRAM": "iTerm.app"}
COLOURS = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}


def generate(service: LocalService, folder: Path, *arguments: str, **terminal: str) -> str:
    """What a terminal that says this of itself is sent."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (50, 100))
    environment = {name: value for name, value in os.environ.items() if name != "TMUX"}
    environment |= SAYS_NOTHING | {"PYTHONPATH": str(Path(__file__).parent.parent)} | terminal
    command = [sys.executable, "-m", "app.cli", "generate", "a red apple on a blue background", "--url", service.url]
    process = subprocess.Popen([*command, "--steps", "20", *arguments], cwd=folder, env=environment, stderr=follower)
    os.close(follower)
    said = b""
    try:
        while data := os.read(leader, 65536):
            said += data
    except OSError:  # how Linux says that nobody has the other end any more
        pass
    os.close(leader)
    assert process.wait(60) == 0, said
    return said.decode()


def test_kitty_is_sent_pngs_under_one_id_the_last_one_the_picture(service: LocalService, tmp_path: Path):
    said = generate(service, tmp_path, "-o", "apple.png", **KITTY)
    pictures = re.findall(r"\x1b_Ga=T,f=100,i=(\d+),p=1,c=32,r=16,C=1,q=2,((?:.*?;.*?\x1b\\(?:\x1b_G)?)+)", said)
    assert len(pictures) >= 2  # at least one preview
    assert len({id for id, _ in pictures}) == 1
    parts = re.findall(r"m=([01]);([^\x1b]*)", pictures[-1][1])
    assert [more for more, _ in parts] == ["1"] * (len(parts) - 1) + ["0"]
    assert all(len(part) <= 4096 for _, part in parts)
    shown = Image.open(io.BytesIO(base64.b64decode("".join(part for _, part in parts))))
    assert shown.tobytes() == Image.open(tmp_path / "apple.png").convert("RGB").tobytes()


def test_iterm2_is_sent_inline_files_where_the_lines_are(service: LocalService, tmp_path: Path):
    said = generate(service, tmp_path, "-o", "apple.webp", **ITERM2)
    pattern = (
        r"\x1b7\x1b\[16A\r\x1b\]1337;File=inline=1;size=(\d+);width=32;height=16;preserveAspectRatio=1:(\S+?)\x07\x1b8"
    )
    pictures = re.findall(pattern, said)
    assert len({data for _, data in pictures}) >= 2
    for size, data in pictures:
        assert len(base64.b64decode(data)) == int(size)


def test_another_with_true_colour_is_sent_half_blocks(service: LocalService, tmp_path: Path):
    said = generate(service, tmp_path, "-o", "apple.png", **COLOURS)
    last = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;\d+;\d+;\d+m▀", said)[-32 * ROWS :]
    assert len(last) == 32 * ROWS
    red, _, blue = map(int, last[0])
    assert blue > red + 50  # the background
    red, _, blue = map(int, last[32 * ROWS // 2 + 16])
    assert red > blue + 50  # the apple
    assert "step 20 of 20" in said


def test_nothing_is_shown_where_it_is_not_wanted(service: LocalService, tmp_path: Path):
    assert not re.search("▀|\x1b_G|1337", generate(service, tmp_path, "--no-preview", **KITTY))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (KITTY, "kitty"),
        (KITTY | {"TMUX": "/tmp/tmux"}, "blocks"),
        ({"TERM": "xterm-ghostty"}, "kitty"),
        (ITERM2, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "tmux-256color", "LC_TERMINAL": "iTerm2"}, "blocks"),
        (COLOURS, "blocks"),
    ],
)
def test_the_way_is_what_the_terminal_says_of_itself(environment: dict[str, str], expected: str):
    able = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    assert way(able, environment) == expected
    assert way(Console(file=io.StringIO(), force_terminal=True, color_system="256"), {"TERM": "xterm"}) is None
    assert way(Console(file=io.StringIO()), environment) is None
    assert way(Console(file=io.StringIO(), force_terminal=True, height=ROWS), environment) is None


def test_a_wide_picture_keeps_its_shape_within_the_terminal():
    out = io.StringIO()
    screen = Screen("blocks")
    picture = io.BytesIO()
    Image.new("RGB", (640, 64), "red").save(picture, "PNG")
    screen.show(picture.getvalue())
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=60)
    console.print(screen)
    assert out.getvalue().count("▀") == 60 * 3
