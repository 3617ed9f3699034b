"""Tiles are measured once for each shape and device, and kept on disk; nobody has to measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from vptq.ops import triton_launch, triton_tiles
from vptq.ops.triton_layer import LayerSizes
from vptq.ops.triton_tiles import DENSE_TILES, MATRIX_TILES, VECTOR_TILES, Tile, fastest

TILES = (Tile(64, 64, 4), Tile(32, 64, 4), Tile(128, 64, 8))
GPU = torch.device("cuda", 0)


class Bench:
    """Stands in for a GPU and Triton's stopwatch: a tile takes as long as it is said to."""

    def __init__(self, patch: pytest.MonkeyPatch, milliseconds: dict[Tile, float | Exception]) -> None:
        self.milliseconds, self.measured, self.capturing = milliseconds, [], False
        self.last: Tile | None = None
        patch.setattr(triton_tiles, "_chosen", {})
        patch.setattr(triton_tiles, "_machine", lambda device: "a machine ")
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(triton_tiles.triton.testing, "do_bench", self.do_bench)

    def do_bench(self, work, **_: object) -> float:  # type: ignore[no-untyped-def]
        work()
        assert self.last is not None
        self.measured.append(self.last)
        result = self.milliseconds[self.last]
        if isinstance(result, Exception):
            raise result
        return result

    def run(self, tile: Tile) -> None:
        self.last = tile

    def choose(self, key: int = 1) -> Tile:
        return fastest("kernel", (key,), TILES, GPU, self.run)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(triton_tiles.TUNE_VARIABLE, raising=False)
    return tmp_path / "vptq" / "triton-tiles.json"


def test_the_fastest_is_taken_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {TILES[0]: 2.0, TILES[1]: 1.0, TILES[2]: 3.0})
    assert [bench.choose(), bench.choose()] == [TILES[1], TILES[1]]
    assert bench.measured == list(TILES), "once each"
    assert list(json.loads(cache.read_text()).values()) == [[32, 64, 4, 2]]
    later = Bench(monkeypatch, {})
    assert later.choose() == TILES[1], "the next process reads it"
    assert later.measured == []
    bench = Bench(monkeypatch, {TILES[0]: 1.0, TILES[1]: 2.0, TILES[2]: 3.0})
    assert bench.choose(key=2) == TILES[0], "another shape is measured on its own"
    assert len(json.loads(cache.read_text())) == 2


def test_a_tile_that_does_not_fit_is_passed_over(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    full = OutOfResources(300000, 200000, "shared memory")
    assert Bench(monkeypatch, {TILES[0]: full, TILES[1]: 2.0, TILES[2]: 3.0}).choose() == TILES[1]
    with pytest.raises(RuntimeError, match="no tile of the Triton kernel kernel fits"):
        Bench(monkeypatch, dict.fromkeys(TILES, full)).choose(key=2)


def test_nobody_has_to_measure(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, {TILES[0]: 2.0, TILES[1]: 1.0, TILES[2]: 3.0})
    bench.capturing = True
    assert bench.choose() == TILES[0], "the capture of a graph does not wait"
    bench.capturing = False
    assert bench.choose() == TILES[1], "and decides nothing for later"
    monkeypatch.setenv(triton_tiles.TUNE_VARIABLE, "0")
    assert bench.choose(key=2) == TILES[0]
    assert fastest("kernel", (1,), TILES, torch.device("cpu"), bench.run) == TILES[0]
    assert len(bench.measured) == len(TILES)


@pytest.mark.parametrize("damage", ["", "[1, 2]", "{"])
def test_a_damaged_file_costs_a_measurement(cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    cache.parent.mkdir()
    cache.write_text(damage)
    bench = Bench(monkeypatch, {TILES[0]: 2.0, TILES[1]: 1.0, TILES[2]: 3.0})
    assert bench.choose() == TILES[1]
    assert len(json.loads(cache.read_text())) == 1


def test_a_folder_that_cannot_be_written_keeps_nobody_from_running(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_text("a file where the folder should be")
    bench = Bench(monkeypatch, {TILES[0]: 2.0, TILES[1]: 1.0, TILES[2]: 3.0})
    assert bench.choose() == TILES[1]


def test_every_tile_is_one_that_kernels_can_take() -> None:
    for tile in (*VECTOR_TILES, *MATRIX_TILES, *DENSE_TILES):
        for number in (tile.outputs, tile.columns, tile.warps):
            assert number & (number - 1) == 0, "Triton's blocks are powers of two"
    for tile in MATRIX_TILES:
        assert min(tile.outputs, tile.columns) >= 16, "a matrix multiplication takes no less"


@pytest.mark.parametrize("outliers", [0, 600])
@pytest.mark.parametrize("columns", [700, 768, 4096, 11008])
@pytest.mark.parametrize("wanted", [1, 100, 1056])
def test_programs_share_the_columns_and_none_goes_idle(columns: int, wanted: int, outliers: int) -> None:
    """No more of them than wanted where blocks of rows allow that, and as many as whole steps allow."""
    sizes = LayerSizes({"in_features": columns, "outlier_size": outliers, "VP": 8}, torch.float16)
    tile, blocks = Tile(64, 64, 4), (16, 2)
    (rows, splits, tokens), arguments = triton_launch._shared(tile, sizes, blocks, wanted)
    assert (rows, tokens) == blocks
    each, looked_up = arguments["columns_a_split"], columns - outliers
    assert each % tile.columns == 0
    assert (splits - 1) * each < looked_up <= splits * each
    assert splits == 1 or splits * rows * tokens <= wanted
    assert each == tile.columns or (splits + 1) * rows * tokens > wanted / 2
