"""Predicted GPU times: computed by hand, true of any GPU, and with the instructions that the compiler makes."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vptq.ops import cuda_compile

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_model
from gpu_devices import DEVICES, H200, LAUNCH, NEXT_LAUNCH, READ, Device, Shape
from gpu_model import CONFIGS, SHAPES, TOKENS, bound, fp16, kind_of, layer, predict, wavefronts

SQUARE = (4096, 4096)
CELLS = st.tuples(st.sampled_from(sorted(DEVICES)).map(DEVICES.get), st.sampled_from(CONFIGS), st.sampled_from(SHAPES))


def test_dense_layers_by_hand() -> None:
    """33.6 MB at 4.32 TB/s; 17.2 GFLOP at 692 TFLOP/s; and the launch."""
    assert fp16(H200, SQUARE, 1).microseconds == pytest.approx(3 + 7.77, abs=0.02)
    assert fp16(H200, SQUARE, 512).microseconds == pytest.approx(3 + 24.8, abs=0.05)
    assert fp16(H200, SQUARE, 1).binds == "memory"
    assert fp16(H200, SQUARE, 512).binds == "tensor cores"


def test_bank_conflicts_by_hand() -> None:
    """Without conflicts 4 cycles for 512 bytes. Of two lanes that share two groups of banks, half collide."""
    assert wavefronts(16, 8) == 4
    assert wavefronts(8, 16) == 2
    assert wavefronts(16, 4) == pytest.approx(4 * (1 + 15 / 16))  # 1 only if none of four pairs collides
    drawn = torch.randint(8, (200_000, 8), generator=torch.Generator().manual_seed(0))
    loads = torch.nn.functional.one_hot(drawn, 8).sum(1).amax(1).double().mean()
    assert wavefronts(16, 1) == pytest.approx(4 * float(loads), rel=0.005)


@pytest.mark.parametrize(
    ("name", "microseconds"),
    [("v8-k256-256", 2.3), ("v4-k256", 1.1), ("v8-k4096", 2.7), ("v6-k4096", 3.6), ("v8-k65536", 9.1)],
)
def test_bounds_are_the_lookups_of_the_performance_page(name: str, microseconds: float) -> None:
    assert bound(H200, name, SQUARE, 1) == pytest.approx(microseconds, abs=0.1)


def test_staging_by_hand() -> None:
    """28672 columns in 16 slices: 1792 inputs and scales, a sector of the second-level cache each, and 64 KB.

    Codebooks are read 8 pieces a thread at a time: 128 KB in pieces of 16 bytes by half of 512 threads take four waits.
    The sums' parts are then written and read.
    """
    before_and_after = predict(H200, "v8-k4096", SHAPES[0], 1).fixed
    staged = 132 * (65536 + 2 * 1792 * 32) / 6.25e6 + 4 * READ
    added = NEXT_LAUNCH + READ + 2 * 16 * 8192 * 4 / 6.25e6
    assert before_and_after == pytest.approx(LAUNCH + staged + added)


def test_the_busiest_multiprocessor_by_hand() -> None:
    """1024 vector rows by 28672 columns: 8 blocks of 16 slices, 128 of 132. A vector: lookups of 8, index and input."""
    vectors = 1024 * 28672 / 128 / 32
    found = predict(H200, "v8-k256-256", SHAPES[0], 1).busy["shared memory"]
    assert found == pytest.approx(vectors * (8 + 0.5 + 0.25) / 1755)


@given(cell=CELLS, tokens=st.sampled_from(TOKENS))
def test_nothing_is_faster_than_its_bound(cell: tuple[Device, str, Shape], tokens: int) -> None:
    assert bound(*cell, tokens) < predict(*cell, tokens).microseconds


@given(cell=CELLS, tokens=st.sampled_from(TOKENS), more=st.sampled_from(TOKENS))
def test_more_tokens_are_not_faster(cell: tuple[Device, str, Shape], tokens: int, more: int) -> None:
    """Of dense layers, bounds, and tiles. The CUDA kernel may cut columns otherwise for more, but computes more."""
    device, name, shape = cell
    fewer, more = min(tokens, more), max(tokens, more)
    assert fp16(device, shape, fewer).microseconds <= fp16(device, shape, more).microseconds
    assert bound(*cell, fewer) <= bound(*cell, more)
    assert predict(*cell, 16).microseconds <= predict(*cell, 64).microseconds
    kind = kind_of(device, layer(name, shape))
    assert kind is not None
    assert gpu_model.instructions(kind, min(fewer, 8)) <= gpu_model.instructions(kind, min(more, 8))


@given(cell=CELLS, tokens=st.sampled_from(TOKENS), part=st.sampled_from(("memory", "cache", "tensor", "gigahertz")))
def test_a_slower_gpu_is_not_faster(cell: tuple[Device, str, Shape], tokens: int, part: str) -> None:
    device, name, shape = cell
    slower = replace(device, **{part: getattr(device, part) / 2})
    for time in (bound, lambda *where: predict(*where).microseconds):
        assert time(device, name, shape, tokens) <= time(slower, name, shape, tokens)


@given(device=st.sampled_from(sorted(DEVICES)).map(DEVICES.get), name=st.sampled_from(CONFIGS))
def test_more_weights_are_not_faster(device: Device, name: str) -> None:
    for tokens in TOKENS:
        times = [predict(device, name, shape, tokens).microseconds for shape in ((4096, 4096), (11008, 4096))]
        assert times[0] < times[1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens"), [("v8-k256-256", 1), ("v8-k4096", 8)])
def test_instructions_are_those_of_the_compiled_kernel(name: str, tokens: int, tmp_path: Path) -> None:
    """The loop's, in the machine code for sm_90, to a seventh."""
    triton = pytest.importorskip("triton")
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if cuda_compile.missing() or not shutil.which(str(disassembler)):
        pytest.skip("no NVRTC, or no disassembler")
    config = layer(name, (8192, 28672))
    kind = kind_of(H200, config)
    assert kind is not None
    binary = tmp_path / "decode.cubin"
    binary.write_bytes(cuda_compile.compile_kernel(kind.parameters(tokens), "sm_90", io.StringIO()).code)
    text = subprocess.run([disassembler, "-c", binary], capture_output=True, text=True, check=True).stdout
    blocks = re.split(r"\n\.L_x_\d+:", text[text.index(".text.decode") :])
    loop = max(blocks, key=lambda block: block.count("FFMA"))
    counted = len(re.findall(r"/\*[0-9a-f]{4,}\*/ +\S", loop)) / (8 * kind.rows(tokens))
    assert gpu_model.instructions(kind, tokens) == pytest.approx(counted, rel=1 / 7)
