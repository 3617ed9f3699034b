"""Room to work in: folders that can be written, memory, disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vptq.doctor.finding import Finding

# A 135M model takes 1.3 GB to quantize and less to run: with less than this, nothing can be done.
LEAST_MEMORY = 2e9
LEAST_DISK = 2e9
# Limits of a container: what it may use and uses, in cgroup's second version.
CGROUP = Path("/sys/fs/cgroup")


def caches() -> Iterator[Finding]:
    """The folders for downloads and for what this package measures and compiles once."""
    for part, variable, folder in _cache_folders():
        if os.access(_existing(folder), os.W_OK):
            yield Finding(part, "ok", str(folder))
        else:
            yield Finding(part, "problem", f"{folder} cannot be written", f'export {variable}="$PWD/cache"')


def memory() -> Iterator[Finding]:
    """Memory that is free, within a container's limit."""
    available, total = available_memory()
    found = f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available"
    if available < LEAST_MEMORY:
        found += f"; even the smallest model takes {LEAST_MEMORY / 1e9:.0f} GB"
        yield Finding("memory", "problem", found, "ps aux --sort=-rss | head")
    else:
        yield Finding("memory", "ok", found)


def disk() -> Iterator[Finding]:
    """Room for downloads, and for what is written to the current folder."""
    places = {"disk of hub cache": _hub_cache(), "disk of this folder": Path.cwd()}
    for part, folder in places.items():
        free = shutil.disk_usage(_existing(folder)).free
        found = f"{free / 1e9:.1f} GB free"
        if free < LEAST_DISK:
            command = "hf cache ls" if part == "disk of hub cache" else f"du -xsh {folder}/* | sort -h"
            yield Finding(part, "problem", found, command)
        else:
            yield Finding(part, "ok", found)


def available_memory() -> tuple[int, int]:
    """Bytes this process may still take, and all there are, the machine's or the container's."""
    import psutil

    machine = psutil.virtual_memory()
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or "max": no limit
        return machine.available, machine.total
    return min(machine.available, limit - used), min(machine.total, limit)


def _cache_folders() -> Iterator[tuple[str, str, Path]]:
    from vptq.ops.cuda_compile import cache_folder

    yield "cache", "XDG_CACHE_HOME", cache_folder().parent
    yield "hub cache", "HF_HOME", _hub_cache()


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _existing(folder: Path) -> Path:
    """The folder, or what it would be made in."""
    return next(place for place in (folder, *folder.parents) if place.exists())
