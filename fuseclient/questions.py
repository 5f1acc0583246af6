"""What a channel asks its worker, and what that answers: JSON objects, one a line, over a stream of their own."""

from __future__ import annotations

from typing import Any

import msgspec


class Question(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``name`` says what is wanted. One with ``id`` 0 is not answered."""

    name: str
    id: int = 0
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Answers the question of this ``id``; ``error``: there is no answer, for a reason that is a line for the user."""

    id: int
    answer: dict[str, Any] = {}
    error: str | None = None


#: The mount is gone, so the session may be ended.
UNMOUNTED = Question(name="unmounted")


def encode(message: Question | Reply) -> bytes:
    """Return a message's line."""
    return msgspec.json.encode(message) + b"\n"
