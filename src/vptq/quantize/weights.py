"""The original weights as files that are read one tensor at a time.

A folder whose safetensors hold the model's own parameter names is read in place. Everything else (a GGUF file, a model
in memory, a checkpoint that transformers renames or fuses while it loads) goes through transformers once and is
spilled to safetensors in the work folder, so that the pipeline knows one kind of source only.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vptq.checkpoint import save_tensors, staged_folder
from vptq.errors import CheckpointError, ConfigError
from vptq.transformers_versions import tied_weights

SPILL_SHARD_BYTES = 2 * 1024**3


class Tensors(Protocol):
    """The tensors of a model by name, none of which is in memory before it is asked for."""

    def __contains__(self, name: str) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def load(self, name: str) -> Tensor:
        """The tensor called `name`."""


class WeightFiles:
    """Tensors by name over the safetensors files of a folder; nothing is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self._where.update(dict.fromkeys(file.keys(), path))
            except Exception as error:
                raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def load(self, name: str) -> Tensor:
        """The tensor in its stored dtype.

        Raises:
            CheckpointError: when no file holds it.
        """
        if name not in self._where:
            raise CheckpointError(f"{name}: the model has this tensor, but none of its weight files does")
        with safe_open(self._where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def covers(files: WeightFiles, model: nn.Module) -> bool:
    """Whether the files hold every parameter of `model` that is not tied to another, under its own name."""
    tied = tied_weights(model)
    return all(name in files or name in tied for name, _ in model.named_parameters())


def spill(model: nn.Module, folder: Path) -> WeightFiles:
    """Writes the parameters and persistent buffers of `model` to `folder` and returns them as files."""
    seen: set[int] = set()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict().items():
            if tensor.is_meta:
                raise ConfigError(f"{name} is on the meta device: load the model's weights before quantizing it")
            if tensor.data_ptr() not in seen:  # tied tensors are stored once, under their first name
                seen.add(tensor.data_ptr())
                yield name, tensor.detach().to("cpu", torch.float32 if tensor.dtype == torch.float64 else tensor.dtype)

    with staged_folder(folder) as staging:
        save_tensors(staging, tensors(), max_shard_bytes=SPILL_SHARD_BYTES)
    return WeightFiles(folder)
