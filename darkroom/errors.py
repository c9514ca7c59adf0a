"""What can go wrong for who uses the client.

DarkroomError
 ├─ Refused       the service will not: its problem document
 ├─ NotDrawn      it would, but the generation failed, was canceled or expired
 └─ Unreachable   nobody answers, or somebody else does
"""

from collections.abc import Sequence
from typing import Self

import httpx2
from pydantic import ValidationError

from app.schemas import FieldError, Generation, Problem


class DarkroomError(Exception):
    """Base of all errors of the client."""


class Refused(DarkroomError):
    """What the service answered: RFC 9457. `errors` names each wrong field."""

    def __init__(self, problem: Problem, retry_after: float | None = None):
        super().__init__(f"{problem.status}: {problem.detail}")
        self.status, self.detail = problem.status, problem.detail
        self.type, self.title = problem.type, problem.title
        self.errors: Sequence[FieldError] = problem.errors or ()
        self.retry_after = retry_after  # seconds

    @classmethod
    def by(cls, answer: httpx2.Response) -> Self:
        try:
            problem = Problem.model_validate_json(answer.content)
        except ValidationError:  # of a proxy in between
            status, said = answer.status_code, answer.reason_phrase
            detail = answer.text[:200].strip() or said
            problem = Problem(type="about:blank", title=said, status=status, detail=detail, errors=None)
        return cls(problem, seconds(answer.headers.get("retry-after")))


class NotDrawn(DarkroomError):
    """A generation ended without pictures."""

    def __init__(self, generation: Generation):
        why = f": {generation.error.detail}" if generation.error else ""
        super().__init__(f"{generation.model}: {generation.status}{why}")
        self.generation = generation


class Unreachable(DarkroomError):
    """Nobody answers, or not as Darkroom does."""


def seconds(text: str | None) -> float | None:
    """Of `Retry-After`; a date, which Darkroom does not send, is as if there were none."""
    return float(text) if text and text.isdecimal() else None
