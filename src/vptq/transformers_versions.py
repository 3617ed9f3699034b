"""Where the supported versions of transformers differ: 4.57 on one side, 5 on the other.

The rest of the package is written for the newest one and asks here where an older one has another name for something,
or nothing at all. When 4.57 goes, so does this file. Nothing here imports transformers before it is called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from functools import wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vptq.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Renaming = Callable[[str], tuple[str, bool]]
"""From a stored tensor's name to the model's, and whether the model's tensor is computed from it."""

_checkpoint_files: ContextVar[list[str] | None] = ContextVar("checkpoint_files", default=None)


def gguf_arguments() -> dict[str, Any]:
    """What `from_pretrained` is told so that a GGUF file's weights become floats; 4.57 does nothing else."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def start_cache_layer(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Have a cache layer learn dtype and device from its first keys and values; 4.57 looks at the keys alone."""
    count = len(inspect.signature(layer.lazy_initialization).parameters)
    layer.lazy_initialization(*(keys, values)[:count])


def is_excluded(path: str, excluded: Iterable[str]) -> bool:
    """Whether `modules_to_not_convert` and the like cover a module path."""
    try:
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError:  # 4.57 has each quantization method decide for itself
        return any(path == name or path.startswith(f"{name}.") or path.endswith(name) for name in excluded)
    return not should_convert_module(path, list(excluded))


def tied_weights(model: Any) -> dict[str, str]:
    """Parameters that are another one under a second name, and are not stored -> that other one."""
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is not None or not hasattr(model, "get_output_embeddings"):
        return dict(tied or {})
    head = model.get_output_embeddings()  # from here on 4.57, where a decoder can tie nothing else
    if head is None or not model.config.get_text_config(decoder=True).tie_word_embeddings:
        return {}
    names = {module: name for name, module in model.named_modules()}
    return {f"{names[head]}.weight": f"{names[model.get_input_embeddings()]}.weight"}


def renaming(model: PreTrainedModel) -> Renaming:
    """How transformers calls stored tensors in a model, whose own tensors are on the meta device."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return _renaming_of_version_4(model)
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    parameters = model.state_dict()

    def rename(name: str) -> tuple[str, bool]:
        renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, parameters)
        return renamed, rename_source_key(name, renamings, converters)[1] is not None

    return rename


def _renaming_of_version_4(model: Any) -> Renaming:
    from transformers import modeling_utils

    prefix = f"{model.base_model_prefix}."
    parameters = model.state_dict()
    kind = type(model).__name__.lower()
    vlms: Iterable[str] = vars(modeling_utils)["VLMS"]  # the only ones whose mapping counts in 4.57
    patterns = model._checkpoint_conversion_mapping if any(name in kind for name in vlms) else None

    def rename(name: str) -> tuple[str, bool]:
        renamed = model._get_key_renaming_mapping([name], patterns)[name]
        for other in (renamed.removeprefix(prefix), prefix + renamed):
            if renamed not in parameters and other in parameters:
                return other, False
        return renamed, False

    return rename


def watch_checkpoint_files() -> None:
    """For 4.57, which does not tell a quantizer where the weights are: listen where `from_pretrained` finds them."""
    from transformers import modeling_utils

    find = modeling_utils._get_resolved_checkpoint_files
    if not _is_version_4() or hasattr(find, "__wrapped__"):
        return

    @wraps(find)
    def remember(*args: Any, **kwargs: Any) -> Any:
        found = find(*args, **kwargs)
        _checkpoint_files.set(found[0])
        return found

    modeling_utils._get_resolved_checkpoint_files = remember


def checkpoint_files() -> list[str] | None:
    """The files that `watch_checkpoint_files` has seen last in this thread; None for a model without any."""
    return _checkpoint_files.get()


def refuse_overlooked_configs() -> None:
    """Have transformers refuse a `quantization_config` inside `text_config` where it looks at the top alone.

    4.57 and 5.0 do, and an unknown number of versions after it: the quantized layers would be random. Hence no version
    is asked for, but whether a quantizer was found.
    """
    from transformers.quantizers import auto

    find: Callable[..., Any] = auto.get_hf_quantizer
    if hasattr(find, "__wrapped__"):
        return

    @wraps(find)
    def find_or_refuse(config: Any, *args: Any, **kwargs: Any) -> Any:
        found = find(config, *args, **kwargs)
        nested = getattr(config.get_text_config(decoder=True), "quantization_config", None)
        if found[0] is None and isinstance(nested, dict) and nested.get("quant_method") == "vptq":
            raise ConfigError(
                "config.json has its quantization_config inside text_config, which this version of transformers "
                "overlooks; move it to the top of config.json, or: pip install 'transformers>=5.17,<5.20'"
            )
        return found

    auto.get_hf_quantizer = find_or_refuse
    if (users := sys.modules.get("transformers.modeling_utils")) is not None:  # it took the name before
        vars(users)["get_hf_quantizer"] = find_or_refuse


def casts_every_float() -> bool:
    """Whether a quantized model's float tensors are all cast to its dtype, whatever the module declares: in 4.57."""
    return _is_version_4()


def _is_version_4() -> bool:
    return find_spec("transformers.core_model_loading") is None
