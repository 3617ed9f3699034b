"""Compiles the CUDA kernels at first use, by NVRTC through cuda-core, and keeps what it compiled on disk.

NVRTC is a library of one wheel, so an installation needs neither a compiler nor a toolkit. cuda-core's own cache of
programs keeps the binaries in `vptq/cuda` under $XDG_CACHE_HOME (~/.cache), by source, parameters, compute capability
and NVRTC's version; it writes a file under another name and renames it. Deleting the folder costs the time to compile
again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vptq.extras import missing as missing_extra
from vptq.ops.cuda_plan import TOKENS, Card, Kind

SOURCES = ("device.cuh", "lookup.cuh", "layers.cuh", "decode.cu")
Run = Callable[[tuple[int, ...], int, int, Sequence[Tensor | int | None]], None]
"""Launches a kernel: grid, threads of a block, bytes of shared memory, arguments."""


@cache
def missing() -> str:
    """Why kernels cannot be compiled here and what to do; empty where they can, as far as importing nothing tells."""
    if os.environ.get("VPTQ_BACKEND") == "triton":
        return "VPTQ_BACKEND=triton"
    for module in ("cuda", "cuda.core", "cuda.bindings"):
        if find_spec(module) is None:
            return missing_extra("compiling them", "cuda-core", "cuda")
    return ""


def source() -> str:
    """The kernels' text; VPTQ_KERNEL has to be defined as the parameters of `Kind`."""
    folder = Path(__file__).parent / "cuda"
    return "\n".join((folder / name).read_text() for name in SOURCES)


def compile_kernel(parameters: str, architecture: str, log: Any = None, options: tuple[str, ...] = ()) -> Any:
    """A compiled kernel (`cuda.core.ObjectCode`), from the cache where it is there.

    Args:
        parameters: From `Kind.parameters`.
        architecture: Such as "sm_90".
        log: Has a `write` for what the compiler says; nothing is then taken from the cache.
        options: For ptxas.

    Raises:
        RuntimeError: NVRTC is missing, or does not know the architecture.
    """
    from cuda.core import Program, ProgramOptions

    chosen = ProgramOptions(
        arch=architecture, std="c++17", define_macro=[("VPTQ_KERNEL", parameters)], ptxas_options=list(options) or None
    )
    program = Program(source(), "c++", chosen)
    try:
        if log is not None:
            return program.compile("cubin", logs=log)
        return program.compile("cubin", cache=_programs())
    finally:
        program.close()


@cache
def card(device: torch.device) -> Card:
    """What a device is, for `cuda_plan`."""
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Card(properties.multi_processor_count, shared_bytes)


@cache
def _loaded(kind: Kind, device: torch.device) -> dict[int, Any]:
    """The kernels of a kind for every number of tokens, on the device, which has to be the current one.

    All of them at once: a CUDA graph may be captured with another number of tokens than the model was warmed up with.
    """
    from cuda.bindings import driver
    from cuda.core import Device

    Device(device.index).set_current()
    major, minor = torch.cuda.get_device_capability(device)
    found = {}
    for tokens in TOKENS:
        code = compile_kernel(kind.parameters(tokens), f"sm_{major}{minor}")
        kernels = code.get_kernel("decode"), code.get_kernel("add_parts")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        limit = card(device).shared_bytes
        (status,) = driver.cuKernelSetAttribute(
            attribute, limit, driver.CUkernel(int(kernels[0].handle)), driver.CUdevice(device.index)
        )
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{limit} bytes of shared memory a block: {status.name}")
        for kernel in kernels:
            _ = kernel.attributes.num_regs  # has the driver load it now, which a capture does not allow
        found[tokens] = (code, *kernels)
    return found


def kernels(kind: Kind, tokens: int, device: torch.device) -> tuple[Run, Run] | None:
    """`decode` and `add_parts` for a kind, or None where a capture is under way and they are not loaded yet.

    Raises:
        Exception: They cannot be compiled or loaded; cuda-core's errors share no type.
    """
    if torch.cuda.is_current_stream_capturing() and (kind, device) not in _ready:
        return None
    _, decode, add_parts = _loaded(kind, device)[tokens]
    _ready.add((kind, device))
    return _runner(decode), _runner(add_parts)


class _CurrentStream:
    """PyTorch's current stream, in the protocol that cuda-core understands."""

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, torch.cuda.current_stream().cuda_stream


@lru_cache(maxsize=4096)
def _config(grid: tuple[int, ...], threads: int, shared_bytes: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes)


@cache
def _runner(kernel: Any) -> Run:
    from cuda.core import launch
    from numpy import int32

    def run(grid: tuple[int, ...], threads: int, shared_bytes: int, arguments: Sequence[Tensor | int | None]) -> None:
        values = [
            int32(value) if isinstance(value, int) else 0 if value is None else value.data_ptr() for value in arguments
        ]
        launch(_STREAM, _config(grid, threads, shared_bytes), kernel, *values)

    return run


@cache
def _programs() -> Any:
    """The cache on disk, or in memory where the folder cannot be written."""
    from cuda.core.utils import FileStreamProgramCache, InMemoryProgramCache

    try:
        return FileStreamProgramCache(cache_folder(), max_size_bytes=_CACHE_BYTES)
    except OSError as error:  # this process runs all the same; only the next one has to compile again
        logging.getLogger("vptq").info("compiled CUDA kernels are not kept: %s", error)
        return InMemoryProgramCache()


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vptq" / "cuda"


_CACHE_BYTES = 256 << 20
_STREAM = _CurrentStream()
_ready: set[tuple[Kind, torch.device]] = set()
