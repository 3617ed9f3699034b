"""What this machine's processor can do, for tests that need instructions by name."""

from __future__ import annotations

from pathlib import Path


def processor_has(*flags: str) -> bool:
    """Whether Linux lists all of `flags`; False elsewhere."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return words.issuperset(flags)
