"""Prompts whose words have weights, written as in the AUTOMATIC1111 web UI.

`(word)` weighs 1.1, `((word))` 1.21, `[word]` 1 / 1.1, `(word:1.5)` 1.5; brackets within brackets multiply. A bracket
left open weighs all that follows, one that closes nothing is text, and so is one behind a backslash. Without torch.
https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#attentionemphasis
"""

import re
from itertools import groupby
from typing import NamedTuple

EMPHASIS = 1.1
HEAVIEST = 4.0  # at two or three pictures fall apart
DEEPEST = 50  # brackets of a kind, one in another; those further in are text
NUMBER = r":\s{0,9}([+-]?(?:\d{1,9}\.?\d{0,9}|\.\d{1,9}))\s{0,9}"  # bounded, or a long one would take seconds
MARK = re.compile(rf"\\[()\[\]\\]?|[(\[\]]|(?:{NUMBER})?\)")


class Fragment(NamedTuple):
    text: str
    weight: float


def fragments(prompt: str) -> list[Fragment]:
    """The prompt's text, taken apart where its weight changes."""
    texts, weights, end = list[str](), list[float](), 0
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the fragments that they begin with

    def add(text: str) -> None:
        if text:
            texts.append(text)
            weights.append(1.0)

    def close(bracket: str, weight: float) -> None:
        since = opened[bracket].pop()
        weights[since:] = [weight * one for one in weights[since:]]

    for mark in MARK.finditer(prompt):
        add(prompt[end : mark.start()])
        sign, end = mark[0], mark.end()
        if sign in opened and len(opened[sign]) < DEEPEST:
            opened[sign].append(len(texts))
        elif sign.startswith("\\"):
            add(sign[1:])
        elif sign == "]" and opened["["]:
            close("[", 1 / EMPHASIS)
        elif sign.endswith(")") and opened["("]:
            close("(", float(mark[1] or EMPHASIS))
        else:
            add(sign)
    add(prompt[end:])
    for bracket, weight in (("(", EMPHASIS), ("[", 1 / EMPHASIS)):
        while opened[bracket]:
            close(bracket, weight)
    pairs = zip(texts, (round(weight, 6) for weight in weights), strict=True)
    found = [
        Fragment("".join(text for text, _ in some), weight) for weight, some in groupby(pairs, lambda pair: pair[1])
    ]
    return found or [Fragment("", 1.0)]


def words(prompt: str) -> str:
    """The prompt without its marks; where a weight changes, a word ends."""
    return " ".join(text for text, _ in fragments(prompt))
