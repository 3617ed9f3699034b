"""Which backends exist here, which are in use, and why.

A backend is a set of kernels registered for a device: loading it is choosing it, and the dispatcher does the rest.
`VPTQ_BACKEND` is therefore read once, when the operators are first imported: `reference` loads no kernels, `cpu` or
`triton` load and insist on theirs, and without it everything that loads is used. Triton itself is imported by the first
call on a GPU, since it takes a while and a CPU has no use for it. CUDA kernels for decoding stand beside Triton's where
cuda-core is installed; `VPTQ_BACKEND=triton` leaves them out. A fast path that should be there and
is not is told once, by name, with the remedy, when it is first missed; `VPTQ_REQUIRE_BACKEND=cpu` makes that an error
at once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from vptq.errors import BackendError
from vptq.ops import cuda_compile
from vptq.ops.schemas import LIBRARY, OPERATORS

ENVIRONMENT_VARIABLE = "VPTQ_BACKEND"
REQUIRED_VARIABLE = "VPTQ_REQUIRE_BACKEND"
CHOICES = ("reference", "cpu", "triton")
DISPATCH_KEYS = {"cpu": "CPU", "triton": "CUDA"}
TRITON_OPERATORS = {
    **dict.fromkeys(("dequantize", "linear", "linear_group"), "vptq.ops.triton_ops"),
    **dict.fromkeys(("nearest", "assign_columns"), "vptq.ops.triton_search"),
}
"""Operator -> the module that implements it with Triton kernels."""


@dataclass(frozen=True)
class BackendStatus:
    """One backend, for people to read.

    Attributes:
        name: "reference", "cpu" or "triton".
        available: It could run on this machine.
        active: Its kernels are registered and used.
        reason: Why, or why not and what to do.
    """

    name: str
    available: bool
    active: bool
    reason: str


def load(requested: str, required: str = "") -> tuple[BackendStatus, ...]:
    """Load the kernels that `requested` (the value of VPTQ_BACKEND, empty for all) allows.

    Args:
        requested: The backend to load, or empty for all.
        required: A backend that must be in use then (the value of VPTQ_REQUIRE_BACKEND), or empty.

    Raises:
        BackendError: A value is unknown, or a backend it names cannot be used.
    """
    for variable, value in ((ENVIRONMENT_VARIABLE, requested), (REQUIRED_VARIABLE, required)):
        if value and value not in CHOICES:
            raise BackendError(f"{variable} is {value!r}; choose one of {', '.join(CHOICES)}, or leave it unset")
    reference = BackendStatus(
        "reference", True, True, "PyTorch; runs whatever no other active backend has a kernel for"
    )
    statuses = [reference]
    for name, loader in _LOADERS.items():
        if requested and requested != name:
            statuses.append(BackendStatus(name, False, False, f"not loaded: {ENVIRONMENT_VARIABLE}={requested}"))
            continue
        status = loader()
        if requested and not status.active:
            raise BackendError(f"{ENVIRONMENT_VARIABLE}={name}, but {status.reason}")
        statuses.append(status)
    for status in statuses:
        if status.name == required and not status.active:
            raise BackendError(f"{REQUIRED_VARIABLE}={required}, but {status.reason}")
    return tuple(statuses)


def tell_when_missed(implementations: Mapping[str, Callable[..., Any]]) -> None:
    """Lets the PyTorch code say so, once, where it runs because kernels that should be there are not.

    Args:
        implementations: PyTorch functions by operator name. Kernels that are there are not touched, so this costs
            nothing where all is well.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return  # the user chose
    for status in _STATUSES:
        if not status.active:
            for name, function in implementations.items():
                LIBRARY.impl(name, _told(function, status), DISPATCH_KEYS[status.name])


def _told(function: Callable[..., Any], status: BackendStatus) -> Callable[..., Any]:
    @wraps(function)
    def run(*arguments: Any) -> Any:
        if status.name not in _missed:
            _missed.add(status.name)
            logging.getLogger("vptq").warning("vptq runs without its fast %s path: %s", status.name, status.reason)
        return function(*arguments)

    return run


def _load_cpu() -> BackendStatus:
    try:
        extension = import_module("vptq._C")
    except ImportError as error:
        reason = (
            f"the C++ kernels are not usable ({error}); install a C++ compiler and reinstall vptq with "
            "pip install --no-build-isolation"
        )
        return BackendStatus("cpu", False, False, reason)
    try:
        isa = extension.isa()
    except RuntimeError as error:
        raise BackendError(str(error)) from None
    return BackendStatus("cpu", True, True, f"C++ kernels ({isa}) for {_covered('CPU')}")


def _load_triton() -> BackendStatus:
    if find_spec("triton") is None:
        return BackendStatus("triton", False, False, "Triton is not installed; pip install triton")
    key, where = _triton_device()
    if not key:
        return BackendStatus("triton", False, False, where)
    for name, module in TRITON_OPERATORS.items():
        LIBRARY.impl(name, _first_imported(module, name), key)
    few = f"; {_decode_kernels()}" if where == "CUDA" else ""
    return BackendStatus("triton", True, True, f"Triton kernels on {where} for {_covered(key)}{few}")


def _decode_kernels() -> str:
    """Whether the few tokens of decoding have CUDA kernels beside Triton's."""
    why = cuda_compile.missing()
    return f"no CUDA kernels for decoding: {why}" if why else "CUDA kernels for decoding, compiled at first use"


def _triton_device() -> tuple[str, str]:
    """The dispatch key of the devices that Triton serves here and their name; no key, and why, where there are none.

    Counting devices starts no context on them.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        if os.environ.get(ENVIRONMENT_VARIABLE) == "triton":
            return "CPU", "the CPU, interpreted (slowly)"
        return "", f"TRITON_INTERPRET=1 without {ENVIRONMENT_VARIABLE}=triton"
    if torch.cuda.device_count():
        return "CUDA", "ROCm" if torch.version.hip else "CUDA"
    if torch.xpu.device_count():
        return "XPU", "XPU"
    return "", "there is no GPU that this torch can use; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"


def _first_imported(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that is imported when first called."""
    found: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not found:
            found.append(getattr(import_module(module), name))
        return found[0](*arguments)

    return call


def _covered(dispatch_key: str) -> str:
    """The operators with a kernel of their own under a dispatch key."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return (
        ", ".join(f"vptq::{name}" for name in OPERATORS if has_kernel(f"vptq::{name}", dispatch_key)) or "no operator"
    )


_LOADERS: dict[str, Callable[[], BackendStatus]] = {"cpu": _load_cpu, "triton": _load_triton}
_STATUSES = load(os.environ.get(ENVIRONMENT_VARIABLE, ""), os.environ.get(REQUIRED_VARIABLE, ""))
_missed: set[str] = set()


def backends() -> list[BackendStatus]:
    """Every backend of this version, and whether and why it is used in this process."""
    return list(_STATUSES)
