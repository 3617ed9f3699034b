"""Folders of safetensors shards: read header first, complete before they are visible.

Knows files and tensors, nothing of quantization. Reading a header finds a truncated file, a missing shard, a pickle in
safetensors' place, before anything is allocated; only safetensors is read, because a pickle runs code. Writing goes to
a temporary name in the same place and is renamed at the end, so a folder or shard that is there is whole. Tensors are
taken from an iterator and leave memory with their shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vptq.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_SHARD_BYTES = 4 * 1024**3

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def find_shards(folder: str | Path) -> list[Path]:
    """The safetensors files of a model folder, all present.

    Raises:
        CheckpointError: A shard is missing, or there are only pickle files, or no weights at all.
    """
    folder = Path(folder)
    index = folder / INDEX_NAME
    if index.is_file():
        shards = sorted(folder / name for name in set(_read_weight_map(index).values()))
        for shard in shards:
            if shard.parent != folder:
                raise CheckpointError(f"{index}: shard {shard} lies outside the folder")
            if not shard.is_file():
                raise CheckpointError(f"{index} names {shard.name}, which is missing; download or copy it again")
        return shards
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder}: {pickles[0]} is a pickle, which can run code and is not read; convert it to {SINGLE_NAME}"
        )
    raise CheckpointError(f"{folder}: there is no {SINGLE_NAME} and no {INDEX_NAME}")


def check_index(folder: Path, files: Mapping[str, Path]) -> None:
    """Hold a folder's index, if it has one, against what the shards' headers say.

    Raises:
        CheckpointError: A tensor is not in the shard that the index names.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        for name, shard in _read_weight_map(index).items():
            if name not in files or files[name].name != shard:
                raise CheckpointError(f"{index} places tensor {name} in {shard}, which does not hold it")


def read_headers(files: Iterable[str | Path]) -> dict[str, Tensor]:
    """Names, shapes and dtypes of all tensors in some safetensors files, as tensors on the meta device.

    Raises:
        CheckpointError: A file is missing, truncated, or not safetensors.
    """
    headers: dict[str, Tensor] = {}
    for path in files:
        headers.update(read_header(Path(path)))
    return headers


@contextmanager
def staged_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends well, and disappears when it does not.

    Args:
        folder: The final folder; its parents are created.
        overwrite: Replace a folder that exists. It is there until the new one is complete.

    Raises:
        CheckpointError: `folder` exists and `overwrite` is off, or it cannot be written (disk full, no permission).
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; choose another folder, or overwrite it")
    staging = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
        staging.mkdir(parents=True)
        yield staging
        if folder.exists():
            replaced = folder.with_name(f".{folder.name}.replaced")
            folder.rename(replaced)
            staging.rename(folder)
            shutil.rmtree(replaced)
        else:
            staging.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_tensors(
    folder: str | Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write safetensors shards and their index into an existing folder.

    Args:
        folder: Where to.
        tensors: Names and tensors, taken one after the other; those of one shard are in memory together.
        max_shard_bytes: A shard ends before it would grow beyond this; a larger tensor gets a shard of its own.

    Raises:
        CheckpointError: A name comes twice, or the disk is full. No unfinished file stays behind.
    """
    folder = Path(folder)
    shards: list[dict[str, int]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        if pending:
            shards.append({name: tensor.nbytes for name, tensor in pending.items()})
            _save_shard(pending, folder / _unfinished_name(len(shards)))
            pending.clear()

    weight_map: dict[str, str] = {}
    try:
        for name, tensor in tensors:
            if name in pending or any(name in shard for shard in shards):
                raise CheckpointError(f"tensor {name} comes twice")
            if sum(other.nbytes for other in pending.values()) + tensor.nbytes > max_shard_bytes:
                flush()
            pending[name] = _standalone(tensor, pending)
        flush()
        for number, shard in enumerate(shards, start=1):
            final = f"model-{number:05}-of-{len(shards):05}.safetensors"
            (folder / _unfinished_name(number)).replace(folder / final)
            weight_map.update(dict.fromkeys(shard, final))
    finally:
        for number in range(1, len(shards) + 1):
            (folder / _unfinished_name(number)).unlink(missing_ok=True)
    total_size = sum(sum(shard.values()) for shard in shards)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name, then rename it.

    Raises:
        CheckpointError: It cannot be written.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def _standalone(tensor: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """The tensor in memory of its own: safetensors refuses tensors that share any."""
    tensor = tensor.detach().to("cpu").contiguous()
    storage = tensor.untyped_storage()
    shared = any(storage.data_ptr() == other.untyped_storage().data_ptr() for other in others.values())
    return tensor.clone() if shared or storage.nbytes() > tensor.nbytes else tensor


def _unfinished_name(number: int) -> str:
    return f"model-{number:05}.safetensors.partial"


def _save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        path.touch()
        permissions = path.stat().st_mode  # what the user's umask leaves; safetensors would leave 0600
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(permissions)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); is the disk full?") from error


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file for reading, as `safetensors.safe_open` gives it.

    Raises:
        CheckpointError: It is missing, truncated, a pickle, or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {_damage(path, error)}") from error


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, on the meta device."""
    header = {}
    with opened(path) as shard:
        for name in shard.keys():  # noqa: SIM118 (not a dictionary)
            tensor = shard.get_slice(name)
            dtype = _DTYPES.get(tensor.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{path}: {name} is stored as {tensor.get_dtype()}, a dtype this version does not know"
                )
            header[name] = torch.empty(tensor.get_shape(), dtype=dtype, device="meta")
    return header


def _damage(path: Path, error: Exception) -> str:
    if not path.is_file():
        return "no such file"
    with path.open("rb") as file:
        if file.read(4).startswith(_PICKLE_STARTS):
            return "is a pickle, which can run code and is not read; convert it to safetensors"
    return f"is truncated or not a safetensors file ({error}); download or copy it again"


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: It is missing, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not a {type(data).__name__}")
    return data
