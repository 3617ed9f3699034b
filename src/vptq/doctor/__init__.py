"""Looks an installation over: what is missing or wrong, and the one command that helps.

Every check is a function that yields findings and changes nothing. What the package needs is read from its installed
metadata, which pyproject.toml has become, so there is no second list of versions to keep.
"""

from __future__ import annotations

from collections.abc import Iterator

from vptq.doctor import hub, kernels, machine, packages
from vptq.doctor.finding import Finding

__all__ = ["Finding", "examine"]

CHECKS = (
    packages.python,
    packages.required,
    packages.registered,
    kernels.cpu,
    kernels.gpu,
    packages.extras,
    machine.caches,
    machine.memory,
    machine.disk,
)


def examine(reach_hub: bool = False) -> Iterator[Finding]:
    """Findings as they are made; importing torch and transformers takes seconds.

    Args:
        reach_hub: Ask the Hugging Face hub too, the only check that uses the network.
    """
    for check in (*CHECKS, hub.hub) if reach_hub else CHECKS:
        try:
            yield from check()
        except ImportError as error:
            package = str(error.name).partition(".")[0]
            yield Finding(check.__name__, "problem", f"cannot be looked at: {error}", f"pip install {package}")
