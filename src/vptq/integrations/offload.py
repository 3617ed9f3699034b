"""Quantized layers under accelerate's CPU and disk offload.

accelerate brings an offloaded tensor back when the module that holds it is called. The codebooks of a quantized layer
are held by submodules (so that they have their names in the checkpoint), which are never called: the layer reads them
itself. Its hook is therefore made to move the layer with all it holds, as `dispatch_model` does for the classes in its
`preload_module_classes`, an argument that transformers does not pass on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vptq.linear import VQuantLinear


def keep_layers_whole(model: nn.Module) -> None:
    """Make the offload hook of every quantized layer move its codebooks as well, each tensor in its own dtype.

    Does nothing without such hooks.
    """
    for module in model.modules():
        if isinstance(module, VQuantLinear):
            for hook in _offload_hooks(module):
                hook.place_submodules = True
                _keep_dtypes(module, hook.weights_map)


def is_offloaded(layer: nn.Module, name: str) -> bool:
    """Whether this tensor of the layer is in memory only while the layer runs."""
    return layer.state_dict()[name].is_meta and bool(_offload_hooks(layer))


def index_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's tensors that hold plain indices, by name.

    Packed indices are left out: whatever their bits are, they are in range. Offloaded tensors are read from where they
    are; those on the meta device for any other reason hold no data, and are left out as well.
    """
    found = {}
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point() or tensor.dtype == torch.int32:
            continue
        if not tensor.is_meta:
            found[name] = tensor
        elif hooks := _offload_hooks(layer):
            found[name] = hooks[0].weights_map[name]
    return found


def _keep_dtypes(layer: nn.Module, weights: Any) -> None:
    """Has every tensor come back from disk in its own dtype: transformers 4.57 casts all to one, indices by value."""
    index = getattr(getattr(weights, "dataset", None), "index", None) or {}
    for name, tensor in layer.state_dict().items():
        if entry := index.get(f"{weights.prefix}{name}"):
            entry["dtype"] = str(tensor.dtype).removeprefix("torch.")


def _offload_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [single for single in getattr(hook, "hooks", (hook,)) if getattr(single, "offload", False)]
