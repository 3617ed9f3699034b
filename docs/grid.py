"""A table in Markdown; a module, because three others make some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(lines: Iterable[Sequence[str]]) -> str:
    """The first line is the heading."""
    heading, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [heading, ["---"] * len(heading), *rows])
