"""Tile sizes of the Triton kernels: a small set for each kernel, the fastest of which is measured once and kept.

The first call of a kernel for a layer's shape on a device times the whole set; the winners are kept in this process and
in `vptq/triton-tiles.json` under $XDG_CACHE_HOME (~/.cache). Deleting the file costs the time to measure again, and
VPTQ_TRITON_TUNE=0 takes the first of each set. So does whoever may not wait: the capture of a CUDA graph, and Triton's
interpreter. Sums do not depend on who measured, but their order does on the tile: the last bits of an output may differ
between machines, never between calls.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
import triton

VERSION = 2
"""To be raised with every change of the kernels or the sets."""
TUNE_VARIABLE = "VPTQ_TRITON_TUNE"


@dataclass(frozen=True)
class Tile:
    """How much of a layer one program takes at a time.

    Attributes:
        outputs: Rows of the weight, vectors' padding included.
        columns: Columns a step.
        warps: Warps a program.
        stages: Steps whose loads are in flight together.
    """

    outputs: int
    columns: int
    warps: int
    stages: int = 2

    def rows(self, padded_len: int) -> int:
        """Vector rows of this tile, at least one."""
        return max(1, self.outputs // padded_len)


# First the one that the model of docs/performance.md prefers. Not measured on a GPU.
VECTOR_TILES = (Tile(64, 64, 4), Tile(32, 128, 4), Tile(64, 128, 4), Tile(128, 64, 8))
MATRIX_TILES = (Tile(128, 64, 4), Tile(64, 64, 4), Tile(64, 128, 4), Tile(128, 64, 8, 3))
DENSE_TILES = (Tile(64, 64, 4), Tile(128, 64, 8), Tile(64, 128, 8))

Key = tuple[object, ...]
_chosen: dict[str, Tile] = {}


def fastest(
    kernel: str, key: Key, tiles: tuple[Tile, ...], device: torch.device, run: Callable[[Tile], object]
) -> Tile:
    """The tile of `tiles` that runs fastest, measured the first time.

    Args:
        kernel: The kernel's name.
        key: What decides how fast it is.
        tiles: What to try.
        device: Where.
        run: Runs the kernel with a tile; its result is thrown away.
    """
    name = json.dumps([kernel, *key, str(device)])
    known = _chosen.get(name)
    if known is not None:
        return known
    if device.type == "cpu" or os.environ.get(TUNE_VARIABLE) == "0":
        return _chosen.setdefault(name, tiles[0])
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return tiles[0]
    stored = _machine(device) + name
    kept = _read()
    tile = Tile(*kept[stored]) if stored in kept else _measure(kernel, tiles, run)
    if stored not in kept:
        _keep(stored, tile)
    return _chosen.setdefault(name, tile)


def _measure(kernel: str, tiles: tuple[Tile, ...], run: Callable[[Tile], object]) -> Tile:
    times: dict[Tile, float] = {}
    failure: Exception | None = None
    for tile in tiles:
        try:
            times[tile] = triton.testing.do_bench(lambda tile=tile: run(tile), warmup=5, rep=20)
        except triton.runtime.errors.OutOfResources as error:  # more shared memory or registers than this GPU has
            failure = error
    if not times:
        raise RuntimeError(f"no tile of the Triton kernel {kernel} fits this GPU") from failure
    best = min(times, key=lambda tile: times[tile])
    logging.getLogger("vptq").info("tuned %s: %s of %s", kernel, best, {astuple(t): ms for t, ms in times.items()})
    return best


def _machine(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return f"{VERSION} triton {triton.__version__} {module.get_device_name(device)} "


def cache_path() -> Path:
    """Where measured choices are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return folder / "vptq" / "triton-tiles.json"


def _read() -> dict[str, list[int]]:
    try:
        found = json.loads(cache_path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep(stored: str, tile: Tile) -> None:
    """Adds a choice to the file; two processes at once may lose one of theirs, which is measured again."""
    path = cache_path()
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**_read(), stored: astuple(tile)}, indent=0))
        partial.replace(path)
    except OSError as error:  # the choice is made; only the next process has to make it again
        logging.getLogger("vptq").info("tile sizes are not kept: %s", error)
