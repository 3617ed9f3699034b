"""What the process holds: how much at most, and handing back what it no longer needs."""

from __future__ import annotations

import ctypes
import resource
import sys

import torch


def device_memory_bytes(device: torch.device) -> int:
    """Memory of a GPU, used or free; 0 for a CPU, which shares the process's own."""
    if device.type == "cpu":
        return 0
    return int(torch.get_device_module(device).get_device_properties(device).total_memory)


def peak_memory_bytes() -> int:
    """Most memory this process has held at once, resident."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


M_MMAP_THRESHOLD = -3
LARGE_TENSOR_BYTES = 32 << 20


def keep_large_tensors_out_of_the_heap() -> None:
    """Lets the C library map what is larger than 32 MiB by itself, so that it goes back to the system when it is freed.

    Left alone, glibc raises that limit up to there by itself, and what it holds depends on the order of things. Lower
    limits cost time: what a pass allocates is then made of new pages again and again, which took a fifth of all time
    at 1 MiB (four blocks of SmolLM2: 130 s and 1.48 GB there, 102 s and 1.59 GB here).
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_TENSOR_BYTES)


def return_freed_memory() -> None:
    """Hands memory that is free inside the C library's heap back to the system, where the library can.

    A block's passes and solves allocate and free thousands of tensors between those that stay, and glibc keeps the
    gaps: two runs of SmolLM2 with 64 sequences (302 MB of hidden states) grew from block to block to 1.6 and 3.0 GB.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
