"""Vector post-training quantization (VPTQ) of Hugging Face language models to 1-4 bits per weight.

    import vptq, transformers

    vptq.quantize("HuggingFaceTB/SmolLM2-135M-Instruct", "smol-3bit", spec="v4-k64-64")
    model = transformers.AutoModelForCausalLM.from_pretrained("smol-3bit")

Importing is quick and quiet: neither torch nor transformers is imported before something here needs it. The one thing
it does is to leave hooks that fix transformers' own VPTQ support and teach peft about quantized layers when those are
imported, or right away when they already are (`vptq.integrations`), so that the plain transformers call above works, on
a CPU too, and so does `peft.get_peft_model`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vptq import integrations as _integrations

if TYPE_CHECKING:
    from vptq.config import LayerConfig, QuantConfig, TensorSpec, tensor_specs
    from vptq.errors import BackendError, CalibrationError, CheckpointError, ConfigError, VPTQError
    from vptq.evaluate import evaluate
    from vptq.linear import VQuantLinear
    from vptq.model import AutoModelForCausalLM
    from vptq.quantize.finetune_folder import finetune
    from vptq.quantize.pipeline import quantize
    from vptq.quantize.plan import Plan
    from vptq.quantize.planner import plan
    from vptq.spec import QuantSpec, spec_for_bits
    from vptq.weight import QuantizedWeight

    __version__: str

__all__ = [
    "AutoModelForCausalLM",
    "BackendError",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "LayerConfig",
    "Plan",
    "QuantConfig",
    "QuantSpec",
    "QuantizedWeight",
    "TensorSpec",
    "VPTQError",
    "VQuantLinear",
    "__version__",
    "evaluate",
    "finetune",
    "plan",
    "quantize",
    "spec_for_bits",
    "tensor_specs",
]

_HOME = {
    "AutoModelForCausalLM": "vptq.model",
    "BackendError": "vptq.errors",
    "CalibrationError": "vptq.errors",
    "CheckpointError": "vptq.errors",
    "ConfigError": "vptq.errors",
    "LayerConfig": "vptq.config",
    "Plan": "vptq.quantize.plan",
    "QuantConfig": "vptq.config",
    "QuantSpec": "vptq.spec",
    "QuantizedWeight": "vptq.weight",
    "TensorSpec": "vptq.config",
    "VPTQError": "vptq.errors",
    "VQuantLinear": "vptq.linear",
    "finetune": "vptq.quantize.finetune_folder",
    "plan": "vptq.quantize.planner",
    "spec_for_bits": "vptq.spec",
    "tensor_specs": "vptq.config",
}
# A source tree on PYTHONPATH has no metadata. transformers asks for at least 0.0.4 before it loads a VPTQ model.
_SOURCE_TREE_VERSION = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used (PEP 562)."""
    if name == "__version__":
        value: Any = _installed_version()
    elif name in ("evaluate", "quantize"):
        # Package and function share this name, and importing any of its submodules binds the package here. So the
        # package is what this name always means, and the package is callable.
        return importlib.import_module(f"vptq.{name}")
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vptq")
    except PackageNotFoundError:
        return _SOURCE_TREE_VERSION


_integrations.install_hooks()
