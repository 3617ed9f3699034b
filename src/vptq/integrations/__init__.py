"""Where other frameworks meet this package, and the hook that gets there without importing them.

transformers decides how to load a quantized checkpoint by looking its `quant_method` up in two dictionaries of
`transformers.quantizers.auto`. Its own entry for "vptq" refuses to run without CUDA and fails on every nested model, so
`vptq.integrations.transformers` puts better ones there. That has to happen whichever package the user imports first,
and `import vptq` must not pay for importing transformers (seconds). Hence a post-import hook: a finder on
`sys.meta_path` that waits for this one module, lets it load as usual, and then calls us. It takes itself away when it
has done so.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TARGET = "transformers.quantizers.auto"


def install_transformers_hook() -> None:
    """Register this package with transformers now if it is imported, else as soon as it is. Safe to call again."""
    module = sys.modules.get(_TARGET)
    if module is not None and hasattr(module, "AutoHfQuantizer"):  # else it is half way through its own import
        _register()
    elif not any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImportFinder())


def _register() -> None:
    try:
        importlib.import_module("vptq.integrations.transformers")  # registers when it has been imported
    except ImportError as error:
        # We are inside somebody's `import transformers`, who may not want a quantized model at all.
        warnings.warn(
            f"vptq cannot register with this version of transformers ({error}); VPTQ checkpoints will not load through "
            "it, install one of the versions that vptq asks for",
            stacklevel=2,
        )


class _PostImportFinder(MetaPathFinder):
    """Finds `_TARGET` through the other finders and wraps the loader they chose."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _PostImportFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _PostImportLoader(spec.loader)
                return spec
        return None


class _PostImportLoader(Loader):
    """Loads a module as the wrapped loader does, then registers this package with it."""

    def __init__(self, wrapped: Loader) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)  # get_source, get_data and the like: `inspect` and `pkgutil` ask for them

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._wrapped
        module.__loader__ = self._wrapped
        self._wrapped.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PostImportFinder)]
        _register()
