"""The two ways a run stops: what the user wrote, and what happened while it ran."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, told in one line: the key, the value found there and what is allowed.

    Args:
        key: dotted config key or the thing that was named, e.g. ``data.text``.
        value: what was found.
        allowed: what may stand there, as a phrase, e.g. ``"one of: title, body"``.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.key = printable(key, 200)
        self.value = value
        self.allowed = printable(" ".join(allowed.split()), 1000)
        super().__init__(f"{self.key} = {_short(value)}: {self.allowed}")

    def __reduce__(self) -> tuple[type[InputError], tuple[str, object, str]]:
        return InputError, (self.key, self.value, self.allowed)  # it may come out of another process


class RunError(RuntimeError):
    """A run that cannot go on, e.g. every client of a round failed."""


def choices(value: object, options: Iterable[str]) -> str:
    """The phrase ``one of: a, b, c``, led by the nearest option when one is close."""
    listed = [printable(option, 60) for option in options]
    near = difflib.get_close_matches(str(value), listed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(listed[:20]) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
    return f"{hint}one of: {shown}"


def first_line(error: Exception, limit: int = 160) -> str:
    """The first line of what a library says, or the kind of its error when it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def printable(text: str, limit: int) -> str:
    """Text from a file or a client, fit for one line of a terminal or a ledger."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[:limit])
    return shown if len(text) <= limit else shown[: limit - 3] + "..."


def _short(value: object, limit: int = 80) -> str:
    """A value in few letters; the end of a path says more than its middle."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # too many digits, or too deep, for Python to write out
        text = type(value).__name__
    if len(text) > limit:
        text = f"{text[: limit // 2 - 3]}...{text[-limit // 2 :]}"
    return printable(text, limit)
