"""Which backends exist here, which are in use, and why.

A backend is a set of kernels registered for a device: loading it is choosing it, and the dispatcher does the rest.
`VPTQ_BACKEND` is therefore read once, when the operators are first imported: `reference` loads no kernels, `cpu` or
`triton` insist on theirs, and without it everything that loads is used. A fast path that should be there and is not is
told once, by name, with the remedy.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch

from vptq.errors import BackendError
from vptq.ops.schemas import OPERATORS

ENVIRONMENT_VARIABLE = "VPTQ_BACKEND"
CHOICES = ("reference", "cpu", "triton")


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


def load(requested: str) -> tuple[BackendStatus, ...]:
    """Load the kernels that `requested` (the value of VPTQ_BACKEND, empty for all) allows.

    Raises:
        BackendError: The value is unknown, or the backend it names cannot be used.
    """
    if requested and requested not in CHOICES:
        allowed = ", ".join(CHOICES)
        raise BackendError(f"{ENVIRONMENT_VARIABLE} is {requested!r}; choose one of {allowed}, or leave it unset")
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
    return tuple(statuses)


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
    return BackendStatus("triton", False, False, "this version has no Triton kernels; GPUs run the reference")


def _covered(dispatch_key: str) -> str:
    """The operators with a kernel of their own under a dispatch key."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return (
        ", ".join(f"vptq::{name}" for name in OPERATORS if has_kernel(f"vptq::{name}", dispatch_key)) or "no operator"
    )


_LOADERS: dict[str, Callable[[], BackendStatus]] = {"cpu": _load_cpu, "triton": _load_triton}
_STATUSES = load(os.environ.get(ENVIRONMENT_VARIABLE, ""))
if not os.environ.get(ENVIRONMENT_VARIABLE):
    for _status in _STATUSES:
        if _status.name == "cpu" and not _status.active:
            warnings.warn(f"vptq runs without its fast CPU path: {_status.reason}", RuntimeWarning, stacklevel=2)


def backends() -> list[BackendStatus]:
    """Every backend of this version, and whether and why it is used in this process."""
    return list(_STATUSES)
