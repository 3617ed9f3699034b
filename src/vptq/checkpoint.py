"""A quantized model's folder: what it promises in config.json, held against what its shards store.

Opening reads config.json and the headers of all shards. What they can tell (a missing tensor, a wrong shape or dtype)
is found before anything is allocated; what only the data can tell (an index out of range) when a layer is read. The
files themselves are the business of `vptq.shards`, whose functions are part of this module's interface.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vptq.config import LayerConfig, QuantConfig
from vptq.errors import CheckpointError, ConfigError
from vptq.shards import (
    MAX_SHARD_BYTES,
    check_index,
    find_shards,
    opened,
    read_header,
    read_headers,
    read_json,
    save_tensors,
    staged_folder,
    write_json,
)
from vptq.weight import QuantizedWeight, check_stored

__all__ = [
    "Checkpoint",
    "check_layers",
    "find_shards",
    "load_layer",
    "read_headers",
    "read_quant_config",
    "save_checkpoint",
    "save_tensors",
    "staged_folder",
    "write_json",
]


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model's folder, its headers read.

    Attributes:
        folder: Where it is.
        config: Its `quantization_config`.
        headers: Every stored tensor on the meta device, by full name.
        files: The shard that holds each tensor.
    """

    folder: Path
    config: QuantConfig
    headers: Mapping[str, Tensor]
    files: Mapping[str, Path]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and the headers of all shards.

        Raises:
            CheckpointError: A file is missing, damaged, not safetensors, or not a VPTQ checkpoint.
            ConfigError: An entry of `quantization_config` is invalid.
        """
        folder = Path(folder)
        headers: dict[str, Tensor] = {}
        files: dict[str, Path] = {}
        for path in find_shards(folder):
            found = read_header(path)
            files.update(dict.fromkeys(found, path))
            headers.update(found)
        check_index(folder, files)
        return cls(folder, read_quant_config(folder), headers, files)

    def layers(self) -> dict[str, LayerConfig]:
        """The quantized layers by module path, each checked against its stored tensors.

        Raises:
            CheckpointError: A layer's tensors contradict its entry, or quantized tensors have no entry.
        """
        paths = dict.fromkeys(self.config.layers)
        paths.update(dict.fromkeys(name.removesuffix(".indices") for name in self.headers if name.endswith(".indices")))
        return {path: self._checked_layer(path) for path in paths}

    def load_layer(self, path: str) -> QuantizedWeight:
        """Read one layer, in whatever carriers it was stored.

        Raises:
            CheckpointError: There is no such layer, its tensors contradict its entry, or an index is out of range.
        """
        config = self._checked_layer(path)
        tensors = {}
        for name in self._stored(path):
            full_name = f"{path}.{name}"
            with opened(self.files[full_name]) as shard:
                tensors[name] = shard.get_tensor(full_name)
        return QuantizedWeight.from_tensors(config, tensors, where=path)

    def _checked_layer(self, path: str) -> LayerConfig:
        config = self.config.layer_for(path)
        if config is None:
            raise CheckpointError(f"{path}: {self.folder} has no quantized layer of this name in its config.json")
        stored = self._stored(path)
        # transformers takes the bias from the model and not from the entry, so old entries may not mention it.
        config = dataclasses.replace(config, bias=config.bias or "bias" in stored)
        check_stored(config, stored, path)
        return config

    def _stored(self, path: str) -> dict[str, Tensor]:
        prefix = path + "."
        return {name.removeprefix(prefix): header for name, header in self.headers.items() if name.startswith(prefix)}


def check_layers(folder: str | Path, config: QuantConfig) -> dict[str, LayerConfig]:
    """Hold every quantized layer of a folder against `config`, from the headers alone.

    Raises:
        CheckpointError: See `Checkpoint.layers`.
    """
    return dataclasses.replace(Checkpoint.open(folder), config=config).layers()


def load_layer(folder: str | Path, path: str) -> QuantizedWeight:
    """Read one layer of a folder; `Checkpoint.open` once is cheaper for many.

    Raises:
        CheckpointError: See `Checkpoint.load_layer`.
    """
    return Checkpoint.open(folder).load_layer(path)


def read_quant_config(folder: str | Path) -> QuantConfig:
    """The `quantization_config` of a model folder: top level of config.json, or inside its text model.

    Raises:
        CheckpointError: There is no readable config.json, or it is not a VPTQ model's.
        ConfigError: An entry is invalid.
    """
    config = read_json(Path(folder, "config.json"))
    text_config = config.get("text_config") or {}
    data = config.get("quantization_config") or text_config.get("quantization_config")
    if data is None:
        raise CheckpointError(f"{folder}: config.json has no quantization_config; this is not a quantized model")
    try:
        return QuantConfig.from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{Path(folder, 'config.json')}: {error}") from None


def save_checkpoint(
    folder: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    config_json: Mapping[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a whole model folder, or nothing: shards, their index and config.json.

    Raises:
        CheckpointError: See `staged_folder` and `save_tensors`.
    """
    with staged_folder(folder, overwrite) as staging:
        save_tensors(staging, tensors, max_shard_bytes)
        write_json(staging / "config.json", config_json)
