"""A GPU that is not there: its tensors lie on the CPU, but operators that mix them with others are refused.

What is tagged is memory, so views and parameters share their tag. Memory that only C++ code has seen (gradients on
their way) has none and mixes with everything. The tagged storages are kept, or another tensor might get their address.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
MOVES_BETWEEN_DEVICES = ("copy_", "__set__", "_has_compatible_shallow_copy_type")


class FakeGpu(TorchFunctionMode):
    """While this is entered, `cuda:0` is a device.

    Attributes:
        ran: names of the functions that ran on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()
        self._tags: dict[int, tuple[torch.device, Any]] = {}

    def tag(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Says where a tensor is, unless its memory is known already."""
        if not tensor.is_meta and tensor.numel():
            storage = tensor.untyped_storage()
            self._tags.setdefault(storage.data_ptr(), (device, storage))
        return tensor

    def where(self, tensor: Tensor) -> torch.device | None:
        """Where a tensor is; None where nobody knows."""
        known = None if tensor.is_meta else self._tags.get(tensor.untyped_storage().data_ptr())
        return known and known[0]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return self.where(args[0]) or func(*args)
        if name in ("to", "cpu"):
            return self._moved(name, func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == "cuda":
            kwargs["device"] = CPU
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = {self.where(tensor) for tensor in tensors if tensor.dim() or self.where(tensor) == GPU} - {None}
        picks = name in ("__getitem__", "__setitem__") and self.where(args[0]) == GPU  # CPU indices will do
        if len(places) > 1 and not picks and name not in MOVES_BETWEEN_DEVICES:
            shapes = [(tuple(tensor.shape), str(self.where(tensor))) for tensor in tensors]
            raise AssertionError(f"{name} mixes devices: {shapes}")
        place = torch.device(asked) if asked is not None else GPU if GPU in places else CPU if not tensors else None
        if asked is None and CPU in places and GPU not in places:
            place = CPU
        if place is not None and place.type == "cuda":
            self.ran.add(name)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and place is not None and place.type != "meta":
                self.tag(leaf, GPU if place.type == "cuda" else CPU)
        return result

    def _moved(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, *rest = args
        target: Any = CPU if name == "cpu" else kwargs.get("device")
        dtypes = [argument for argument in rest if isinstance(argument, torch.dtype)]
        for argument in rest:
            if isinstance(argument, str | torch.device):
                target = argument
            elif isinstance(argument, Tensor):
                target = self.where(argument) or CPU
                dtypes.append(argument.dtype)
        if target is None or torch.device(target).type == "meta":
            return self._kept(func(*args, **kwargs), tensor)
        place = GPU if torch.device(target).type == "cuda" else CPU
        kwargs.pop("device", None)
        result = tensor.to(CPU, *dtypes, **kwargs)
        if self.where(tensor) != place and result.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
            result = result.clone()
        return self.tag(result, place)

    def _kept(self, result: Tensor, tensor: Tensor) -> Tensor:
        place = self.where(tensor)
        return result if place is None else self.tag(result, place)
