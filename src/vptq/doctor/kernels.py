"""What makes models fast here: the C++ kernels and their compiler, and GPUs with what their kernels need."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from vptq.doctor.finding import Finding
from vptq.doctor.packages import reinstall_command
from vptq.errors import BackendError
from vptq.extras import EXTRAS, install_command

COMPILERS = ("c++", "g++", "clang++")
# How the package managers of the common systems are told to install one.
COMPILER_COMMANDS = {
    "apt-get": "sudo apt-get install g++",
    "dnf": "sudo dnf install gcc-c++",
    "zypper": "sudo zypper install gcc-c++",
    "pacman": "sudo pacman -S gcc",
    "apk": "sudo apk add g++",
}
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def cpu() -> Iterator[Finding]:
    """The C++ kernels, the instruction set they have chosen, and a compiler where they have to be built."""
    try:
        from vptq.ops import backends
    except BackendError as error:
        yield Finding("C++ kernels", "problem", str(error), "unset VPTQ_BACKEND VPTQ_REQUIRE_BACKEND VPTQ_CPU_ISA")
        return
    (status,) = (backend for backend in backends() if backend.name == "cpu")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if status.active:
        yield Finding("C++ kernels", "ok", status.reason)
    elif status.reason.startswith("not loaded"):  # by the user's own choice
        yield Finding("C++ kernels", "problem", status.reason, "unset VPTQ_BACKEND")
    elif compiler is None:
        found = "not built, and there is no C++ compiler; PyTorch runs in their place, many times slower"
        yield Finding("C++ kernels", "problem", found, f"{_compiler_command()} && {reinstall_command()}")
    else:
        found = f"not usable, although there is {compiler}; PyTorch runs in their place, many times slower"
        yield Finding("C++ kernels", "problem", found, reinstall_command())
    if compiler:
        yield Finding("compiler", "ok", compiler)
    else:
        found = "none; torch.compile and Triton need one, running and quantizing models do not"
        yield Finding("compiler", "optional", found, _compiler_command())


def gpu() -> Iterator[Finding]:
    """GPUs that torch can use, and what their kernels need; or why it can use none."""
    import torch

    has_driver = NVIDIA_DRIVER.exists()
    built_for = torch.version.cuda or torch.version.hip
    if not torch.cuda.device_count():
        if has_driver and not built_for:
            found = f"there is an NVIDIA driver, but torch {torch.__version__} is built without CUDA"
            yield Finding("GPU", "problem", found, "pip install --force-reinstall torch")
        elif has_driver:
            found = f"there is an NVIDIA driver, but torch for CUDA {built_for} finds no device it can use"
            yield Finding("GPU", "problem", found, "nvidia-smi")
        elif torch.xpu.device_count():
            yield Finding("GPU", "ok", "an Intel GPU, by Triton's kernels")
        else:
            yield Finding("GPU", "ok", "none; models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        room = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        found = f"{device.name}, compute capability {device.major}.{device.minor}, {room}"
        yield Finding(f"GPU {index}", "ok", found)
    yield from _gpu_kernels()


def _gpu_kernels() -> Iterator[Finding]:
    import torch

    if find_spec("triton") is None:
        yield Finding("Triton", "problem", "not installed; PyTorch runs in its place, slowly", "pip install triton")
    elif shutil.which("cc") is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        yield Finding("Triton", "problem", "needs a C compiler for its launchers; there is none", _compiler_command())
    else:
        yield Finding("Triton", "ok", "kernels for GPUs")
    if torch.version.hip:
        return
    extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda"
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program  # noqa: F401

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        yield Finding("NVRTC", "optional", f"{EXTRAS['cuda']} needs it ({error})", install_command(extra))
        return
    if str(major) == (torch.version.cuda or "").partition(".")[0]:
        yield Finding("NVRTC", "ok", f"{major}.{minor}, for {EXTRAS['cuda']}")
    else:
        found = f"{major}.{minor}, while torch and the driver speak CUDA {torch.version.cuda}"
        yield Finding("NVRTC", "problem", found, install_command(extra))


def _compiler_command() -> str:
    known = (command for manager, command in COMPILER_COMMANDS.items() if shutil.which(manager))
    return next(known, "conda install -c conda-forge gxx")
