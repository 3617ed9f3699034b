"""Quantizing a model: calibration, Hessians, codebooks, the second-order passes, and the pipeline that runs them.

This package is also the function: `vptq.quantize(model, folder, spec=...)` calls `vptq.quantize.pipeline.quantize`.
Python binds a subpackage's name in its parent whenever one of its modules is imported, so a function of that name in
`vptq` would disappear at the first `import vptq.quantize.solver`. A callable package means the same thing always.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize a model; see `vptq.quantize.pipeline.quantize`."""
        from vptq.quantize.pipeline import quantize

        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
