"""Which way a layer is multiplied on a GPU: the crossovers, in one place, without Triton.

Four ways. "cuda": codebooks in shared memory, on NVIDIA GPUs with cuda-core, for the few tokens of decoding. "vector":
a Triton kernel for one token that sums in float32 registers. "tiles": tensor cores multiply each tile of the weight as
it is looked up; the lookups, which bind, are paid once for all tokens of a block. "dense": dequantize once, then the
vendor's matrix multiplication. PyTorch's own code is a fifth, for what the kernels do not take.

The crossovers follow from a model (docs/performance.md) and were not measured on a GPU. `make gpu` times all ways and
says where they cross; these constants are the place for what it finds.
"""

from __future__ import annotations

import torch

CUDA_TOKENS = 8
"""Up to so many tokens go to the CUDA kernel where it serves the layer: the most that it takes at once."""
GROUP_TOKENS = CUDA_TOKENS
"""Up to so many, layers that read the same input are launched together: more tokens keep a GPU busy by themselves."""
VECTOR_TOKENS = 1
"""Up to so many tokens are multiplied one by one."""
TILE_TOKENS = 64
"""Up to so many go through tiles: the most that one block of tokens holds, so that nothing is looked up twice."""
MAX_VECTOR_LEN = 64
"""Longer vectors do not fit a tile."""

CUDA, VECTOR, TILES, DENSE, TORCH = "cuda", "vector", "tiles", "dense", "torch"


def choose(tokens: int, cuda: bool = False) -> str:
    """The way for so many tokens, of a layer that the Triton kernels take, and the CUDA kernel too if `cuda`."""
    if cuda and 1 <= tokens <= CUDA_TOKENS:
        return CUDA
    return VECTOR if tokens <= VECTOR_TOKENS else TILES if tokens <= TILE_TOKENS else DENSE


def obstacle(vector_len: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> str:
    """Why the kernels cannot take a layer; empty where they can.

    Args:
        vector_len: v.
        dtype: The layer's float dtype.
        capability: An NVIDIA GPU's compute capability; None for other devices.
    """
    if vector_len > MAX_VECTOR_LEN:
        return f"vectors of {vector_len} do not fit a tile (at most {MAX_VECTOR_LEN})"
    if capability is not None and capability < (7, 5):
        return f"Triton does not compile for compute capability {capability[0]}.{capability[1]} (7.5 or newer)"
    if capability is not None and capability < (8, 0) and dtype == torch.bfloat16:
        return f"compute capability {capability[0]}.{capability[1]} has no bfloat16; load with dtype=torch.float16"
    return ""


def describe(
    vector_len: int, dtype: torch.dtype, capability: tuple[int, int] | None, cuda: str = ""
) -> list[tuple[str, str, str]]:
    """Tokens, way and reason, for people to read.

    Args:
        vector_len: v.
        dtype: The layer's float dtype.
        capability: An NVIDIA GPU's compute capability; None for other devices.
        cuda: What the CUDA kernel makes of the layer; empty where it does not serve it.
    """
    if why := obstacle(vector_len, dtype, capability):
        if cuda:
            return [(_span(1, CUDA_TOKENS), CUDA, cuda), (f"{CUDA_TOKENS + 1} or more", TORCH, why)]
        return [("any", TORCH, why)]
    few = [(_span(1, VECTOR_TOKENS), VECTOR, "float32 sums, columns shared by programs")]
    if cuda:
        few = [(_span(1, CUDA_TOKENS), CUDA, cuda)]
    return [
        *few,
        (
            _span((CUDA_TOKENS if cuda else VECTOR_TOKENS) + 1, TILE_TOKENS),
            TILES,
            "one lookup serves all tokens, tensor cores multiply",
        ),
        (f"{TILE_TOKENS + 1} or more", DENSE, "dequantize once, then the vendor's matrix multiplication"),
    ]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
