"""What a quantized layer should cost on a GPU, from published figures: the prediction beside which measurements stand.

    python benchmarks/gpu_model.py [v8-k256-256 8192x28672 1]    # what each resource is busy for

A call keeps several parts of the GPU busy at once: memory, second-level cache, first-level cache lines, shared memory,
instruction issue, tensor cores. Its time is the busiest one's, plus what happens before and after: launches, and for
the CUDA kernel the filling of shared memory. That all parts overlap perfectly is too kind, so that a kernel may be
slower than predicted; a kernel that is faster shows that a figure here is wrong.

Where codebooks lie is asked of `cuda_plan`, and which kernel serves of `triton_paths`, so that the prediction follows
the code. Times are in microseconds.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from math import ceil, factorial

import torch
from gpu_devices import (
    DEVICES,
    ISSUED,
    LAUNCH,
    LINE,
    MEMORY_REACHED,
    NEXT_LAUNCH,
    READ,
    SECTOR,
    TENSOR_REACHED,
    WARP,
    Device,
    Prediction,
    Shape,
)

from vptq.config import LayerConfig
from vptq.ops import cuda_plan, triton_paths
from vptq.ops.cuda_plan import Kind
from vptq.spec import QuantSpec

CONFIGS = (
    *("v8-k256-256", "v8-k4096", "v6-k4096", "v4-k256", "v8-k65536", "v8-k65536-256", "v12-k4096-4096"),
    "v16-k65536-65536",
)
SHAPES: tuple[Shape, ...] = (
    *((8192, 28672), (4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192), (8192, 8192)),
    (1024, 8192),
)
"""Out x in: the layer of the project's aims, Llama-2-7B's, the rest of 70B's (its k and v come last)."""
TOKENS = (1, 2, 4, 8, 16, 64, 512)


@lru_cache
def layer(name: str, shape: Shape) -> LayerConfig:
    return QuantSpec.parse(name).for_layer(shape[1], shape[0], False)


def kind_of(device: Device, config: LayerConfig) -> Kind | None:
    return cuda_plan.kind_of(torch.float16, config.vector_len, config.index_bits, config.residual_bits, device.card)


def fp16(device: Device, shape: Shape, tokens: int) -> Prediction:
    """PyTorch's `linear`."""
    moved = 2 * (shape[0] * shape[1] + tokens * sum(shape))
    busy = {
        "memory": device.streamed(moved) / MEMORY_REACHED,
        "tensor cores": device.multiplied(shape, tokens) / TENSOR_REACHED,
    }
    return Prediction(busy, LAUNCH)


def predict(device: Device, name: str, shape: Shape, tokens: int) -> Prediction:
    """The kernel that serves so many tokens of a layer."""
    config = layer(name, shape)
    kind = kind_of(device, config)
    way = triton_paths.choose(tokens, kind is not None)
    if kind is not None and way == triton_paths.CUDA:
        return _cuda(device, config, kind, tokens)
    if way == triton_paths.DENSE:
        weight = _triton(device, config, 0)
        product = fp16(device, shape, tokens)
        return Prediction(product.busy, product.fixed - LAUNCH + NEXT_LAUNCH + weight.microseconds)
    return _triton(device, config, tokens)


def bound(device: Device, name: str, shape: Shape, tokens: int) -> float:
    """What a kernel cannot be faster than: bytes, lookups from the better home of the codebooks, multiplication.

    All at published rates; no launch, arithmetic, or staging, nor the lookups of a second block of tokens.
    """
    config = layer(name, shape)
    homes = [max(_lookups(device, config, kind).values()) for kind in (None, kind_of(device, config))]
    lookups = min(homes) * config.num_vectors * shape[1] / WARP
    return max(device.streamed(_moved(config, tokens)), lookups, device.multiplied(shape, tokens))


def _cuda(device: Device, config: LayerConfig, kind: Kind, tokens: int) -> Prediction:
    """`cuda/decode.cu`, cut by `cuda_plan.plan`."""
    groups, outputs = config.num_groups, config.out_features
    cut = cuda_plan.plan(kind, tokens, (outputs,), groups, config.in_features // groups, device.card)
    rows, slices = kind.rows(cut.tokens), cut.grid[1]
    # The busiest multiprocessor's: the others wait for it.
    warps = cut.steps * cut.threads // WARP * rows * cuda_plan.STEP // WARP * device.card.multiprocessors
    parts = _lookups(device, config, kind)
    words, lines = _index_loads(kind)
    # Indices come through the first-level cache, which is shared memory's other half; inputs from shared memory.
    staged = max(words, lines / device.lines) + cut.tokens / rows
    busy = {
        "memory": device.streamed(_moved(config, tokens)) / MEMORY_REACHED,
        "cache": parts["cache"] * config.num_vectors * config.in_features / WARP,
        "lines": (parts["lines"] + device.shared(lines / device.lines)) * warps,
        "shared memory": (parts["shared memory"] + device.shared(staged)) * warps,
        "instructions": device.shared(instructions(kind, cut.tokens) / ISSUED) * warps,
    }
    return Prediction(busy, LAUNCH + _staging(device, kind, cut) + _adding(device, slices * tokens * outputs, slices))


def _index_loads(kind: Kind) -> tuple[float, float]:
    """128 bytes that a warp's loads of indices return, and lines that they touch, for one vector in each lane."""
    width = kind.bits + kind.residual_bits
    together = 4 if width % 16 == 0 else 2 if width % 8 == 0 else 1
    words = ceil(width / 4) + (width % 4 != 0)
    return words / 8, words / together * ceil(width / 4) / 8


def _staging(device: Device, kind: Kind, cut: cuda_plan.Plan) -> float:
    """Before its first lookup half of each block fills the codebooks; the other half gathers inputs and scales."""
    held, half = [(book, copies) for book, copies in _held(kind) if copies], cut.threads // 2
    piece = 16 if kind.vector_len % 8 == 0 or kind.vector_len == 6 else 8
    gathered = cut.columns * (cut.tokens + 1)
    moved = sum(book // copies for book, copies in held) + SECTOR * gathered
    reached = [device.cached(device.card.multiprocessors * moved), device.alone(gathered / device.lines)]
    together = 8 if cut.tokens <= 2 else 4
    # Eight loads of a codebook are on the way together; the permutation is waited for, then what it points to.
    waits = sum(ceil(book / piece / half / 8) for book, _ in held), 2 * ceil(cut.columns / half / together)
    return max(*reached, device.alone(kind.book_bytes() / LINE)) + READ * max(waits)


def _adding(device: Device, parts: int, slices: int) -> float:
    """Float32 parts of the slices, written, read and added in one more launch."""
    return NEXT_LAUNCH + READ * ceil(slices / 16) + device.cached(2 * 4 * parts) if slices > 1 else 0.0


def instructions(kind: Kind, tokens: int) -> float:
    """Of a warp of the CUDA kernel, for one vector in each lane: adding, widening, multiplying, and finding them."""
    v, rows, books = kind.vector_len, kind.rows(tokens), 2 if kind.residual_bits else 1
    arithmetic = v * (1 + tokens) + v / 2 * (books - 1)
    step = (40 + 10 * rows) / (8 * rows)  # the loads of the next indices, as in the code that NVRTC makes
    return arithmetic + books * (4 + _pieces(v)) + tokens / (4 * rows) + step


def _triton(device: Device, config: LayerConfig, tokens: int) -> Prediction:
    """A Triton kernel over all tiles: for one token, for up to 64, or (0) writing the dense weight."""
    shape = (config.out_features, config.in_features)
    parts = _lookups(device, config, None)
    warps = config.num_vectors * config.in_features / WARP
    block = 0 if tokens <= triton_paths.VECTOR_TOKENS else max(16, 1 << (tokens - 1).bit_length())
    staged = 2 * 2 * WARP * config.vector_len / LINE if block else 0  # each weight in and out of shared memory once
    read_again = 2 * tokens * config.in_features * ceil(shape[0] / 128)  # each row of tiles reads all inputs
    written = 0 if tokens else 2 * shape[0] * shape[1]
    busy = {
        "memory": device.streamed(_moved(config, tokens) + written) / MEMORY_REACHED,
        "cache": parts["cache"] * warps + device.cached(read_again),
        "lines": (parts["lines"] + device.shared(staged)) * warps,
        "tensor cores": device.multiplied(shape, block) / TENSOR_REACHED,
    }
    padded = config.vector_len & (config.vector_len - 1) != 0
    launches = padded + bool(config.enable_perm and tokens != 1) + bool(tokens)  # padding, order, sum of the parts
    return Prediction(busy, LAUNCH + NEXT_LAUNCH * launches)


def _lookups(device: Device, config: LayerConfig, kind: Kind | None) -> dict[str, float]:
    """What one vector in each lane of a warp costs the GPU; without `kind` (Triton) nothing is in shared memory."""
    v = config.vector_len
    far, cycles = [], 0.0
    for book, copies in _held(kind) if kind else _tables(config):
        if copies:
            piece = 16 if v % 8 == 0 or v == 6 else 8
            cycles += _pieces(v) * wavefronts(piece, copies)
        else:
            far.append(book)
    length = v if kind else 1 << (v - 1).bit_length()  # Triton pads
    pieces = _pieces(v) if kind else ceil(2 * length / 16)
    missed = max(0.0, 1 - device.near / sum(far)) if far else 0.0
    return {
        "lines": device.shared(len(far) * pieces * WARP / device.lines),
        "cache": device.cached(len(far) * WARP * missed * ceil(2 * length / SECTOR) * SECTOR),
        "shared memory": device.shared(cycles),
    }


@lru_cache
def wavefronts(piece: int, copies: int) -> float:
    """Expected cycles of a warp's lookups of `piece` bytes at random places of `copies` interleaved tables.

    128 bytes a cycle go to a phase of 8 lanes (16 bytes each) or 16 (8 bytes), as long as no two want the same banks.
    """
    lanes = LINE // piece
    each = lanes // copies  # lanes of one copy, and the groups of banks that it lies in
    most = [_at_most(each, load) ** copies for load in range(each + 1)]
    return WARP / lanes * sum(load * (most[load] - most[load - 1]) for load in range(1, each + 1))


def _at_most(count: int, load: int) -> float:
    """Probability that of `count` balls in as many bins no bin has more than `load`."""
    ways = [1.0] + [0.0] * count  # coefficients of (sum over i <= load of z^i / i!)^count
    for _ in range(count):
        ways = [sum(ways[n - i] / factorial(i) for i in range(min(load, n) + 1)) for n in range(count + 1)]
    return ways[count] * factorial(count) / float(count) ** count


def _held(kind: Kind) -> list[tuple[int, int]]:
    """Bytes in shared memory (all copies; one stored copy where there is none) and copies of each codebook."""
    residual = kind.residual_bytes()
    books = [(kind.book_bytes() - residual or 2 * kind.vector_len << kind.bits, kind.copies)]
    if kind.residual_bits:
        books.append((residual or 2 * kind.vector_len << kind.residual_bits, kind.residual_copies))
    return books


def _tables(config: LayerConfig) -> list[tuple[int, int]]:
    """The same for Triton, which leaves them in global memory."""
    padded = 1 << (config.vector_len - 1).bit_length()
    return [(2 * padded * size, 0) for size in (config.num_centroids, config.num_residual_centroids) if size]


def _pieces(vector_len: int) -> int:
    """Loads of a vector in the CUDA kernel."""
    return ceil(vector_len / (8 if vector_len % 8 == 0 or vector_len == 6 else 4))


def _moved(config: LayerConfig, tokens: int) -> float:
    """Bytes from and to memory, each once."""
    return config.stored_bits / 8 + 2 * tokens * (config.in_features + config.out_features)


def main() -> None:
    name, size, count = sys.argv[1:] or ("v8-k256-256", "8192x28672", "1")
    shape, tokens = (int(size.split("x")[0]), int(size.split("x")[1])), int(count)
    for device in DEVICES.values():
        found, dense = predict(device, name, shape, tokens), fp16(device, shape, tokens)
        busy = ", ".join(f"{part} {time:.1f}" for part, time in found.busy.items())
        print(f"{device.name}: {found.microseconds:.1f} us; {busy}; before and after {found.fixed:.1f}")
        print(f"  bound {bound(device, name, shape, tokens):.1f}, float16 {dense.microseconds:.1f}")


if __name__ == "__main__":
    main()
