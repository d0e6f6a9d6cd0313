"""Words of options, and lines of reports."""

from __future__ import annotations

import textwrap


def words(text: str) -> list[str]:
    """The words of an option, which commas separate."""
    return [word for word in text.split(",") if word]


def wrapped(text: str, width: int = 120) -> str:
    """A line of a report, with what is too long for it below and further in."""
    indent = " " * (len(text) - len(text.lstrip()))
    lines = textwrap.wrap(text.strip(), width, initial_indent=indent, subsequent_indent=indent * 3)
    return "\n".join(lines)
