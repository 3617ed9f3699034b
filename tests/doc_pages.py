"""What README and the pages of docs/ give a reader to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(language: str) -> Iterator[str]:
    for page in PAGES:
        yield from re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    """Every different line, without its comment."""
    joined = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = (" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in joined.splitlines())
    return list(dict.fromkeys(filter(None, lines)))


def words_of(line: str) -> tuple[list[str], dict[str, str]]:
    """The words of a shell line, and its redirections: {"<": file, ">": file}."""
    words, files = shlex.split(line), {}
    for sign in ("<", ">"):
        if sign in words:
            place = words.index(sign)
            files[sign] = words[place + 1]
            del words[place : place + 2]
    return words, files


def arguments_of(words: list[str]) -> list[str] | None:
    """What a command of ours is given; None where the words are somebody else's command."""
    if words[0] == "vptq":
        return words[1:]
    return words[3:] if words[:3] == ["python", "-m", "vptq"] else None
