"""Where other frameworks meet this package, and the hook that gets there without importing them.

transformers decides how to load a quantized checkpoint by looking its `quant_method` up in two dictionaries, and peft
finds the class that attaches an adapter in another. The modules here put ours there. That has to happen whichever
package the user imports first, and `import vptq` must not pay for importing theirs (seconds). Hence a post-import hook:
for each of them a finder on `sys.meta_path` that waits for one module, lets it load as usual, and then imports ours,
which registers itself. It takes itself away when it has done so.
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

# The module to wait for, and ours that registers with it by being imported.
_INTEGRATIONS = {
    "transformers.quantizers.auto": "vptq.integrations.transformers",
    "peft": "vptq.integrations.peft",
}


def install_hooks() -> None:
    """Register with each framework now if it is imported, else as soon as it is. Safe to call again."""
    for target in _INTEGRATIONS:
        module = sys.modules.get(target)
        # While a module is half way through its own import, `_initializing` is true: importlib itself goes by that.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _register(target)
        elif not any(isinstance(finder, _PostImportFinder) and finder.target == target for finder in sys.meta_path):
            sys.meta_path.insert(0, _PostImportFinder(target))


def register_with_vllm() -> None:
    """Teach vLLM the format: the entry point `vllm.general_plugins`, which every process of vLLM calls when it starts.

    It starts for other models too, where this package happens to be installed: so nothing that goes wrong here may stop
    it, and a VPTQ checkpoint is then refused by vLLM as unknown.
    """
    try:
        importlib.import_module("vptq.integrations.vllm")
    except Exception as error:
        warnings.warn(
            f"vptq cannot register with this version of vllm ({error}); VPTQ models will not work with it", stacklevel=2
        )


def _register(target: str) -> None:
    try:
        importlib.import_module(_INTEGRATIONS[target])
    except ImportError as error:
        # We are inside somebody's import of that package, who may not want a quantized model at all.
        package = target.partition(".")[0]
        warnings.warn(
            f"vptq cannot register with this version of {package} ({error}); VPTQ models will not work with it, "
            "install one of the versions that vptq asks for",
            stacklevel=2,
        )


class _PostImportFinder(MetaPathFinder):
    """Finds `target` through the other finders and wraps the loader they chose."""

    def __init__(self, target: str) -> None:
        self.target = target

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.target:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _PostImportLoader(spec.loader, self)
                return spec
        return None


class _PostImportLoader(Loader):
    """Loads a module as the wrapped loader does, then registers this package with it."""

    def __init__(self, wrapped: Loader, finder: _PostImportFinder) -> None:
        self._wrapped = wrapped
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)  # get_source, get_data and the like: `inspect` and `pkgutil` ask for them

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._wrapped
        module.__loader__ = self._wrapped
        self._wrapped.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register(self._finder.target)
