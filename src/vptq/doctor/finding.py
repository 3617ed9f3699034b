"""What the doctor says about one part of an installation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "optional", "problem"]


@dataclass(frozen=True)
class Finding:
    """One part, and what to do about it.

    Attributes:
        part: What was looked at.
        state: "ok"; "optional" where something is absent that not everybody wants; "problem" where something is wrong
            or slower than it has to be.
        found: What is there.
        remedy: The one command that helps; empty where nothing has to be done.
    """

    part: str
    state: State
    found: str
    remedy: str = ""
