"""Folders: what is written is read back, in shards of the size asked for, and appears only when it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_layers import random_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vptq import reference
from vptq.checkpoint import (
    Checkpoint,
    check_layers,
    load_layer,
    read_headers,
    read_quant_config,
    save_checkpoint,
    save_tensors,
    staged_folder,
)
from vptq.config import LayerConfig, QuantConfig
from vptq.errors import CheckpointError

PACKED = LayerConfig(40, 24, vector_len=8, num_centroids=64, num_residual_centroids=16, enable_perm=True, bias=True)
UNPACKED = LayerConfig(
    43,
    24,
    vector_len=6,
    num_centroids=60,
    outlier_size=3,
    outlier_vector_len=4,
    outlier_num_centroids=9,
    enable_norm=True,
    enable_perm=True,
    is_packed=False,
)
LAYERS = {"model.layers.0.q_proj": PACKED, "model.layers.1.q_proj": PACKED, "model.layers.1.up_proj": UNPACKED}


def stored_tensors(carrier: torch.dtype = torch.int16) -> dict[str, torch.Tensor]:
    """A model of three quantized layers and a dense one."""
    tensors = {"lm_head.weight": torch.ones(5, 40)}
    for seed, (path, config) in enumerate(LAYERS.items()):
        for name, tensor in random_weight(config, seed=seed).to_tensors(torch.float16).items():
            tensors[f"{path}.{name}"] = tensor.view(carrier) if tensor.dtype == torch.int16 else tensor
    return tensors


def config_json(**quantization: Any) -> dict[str, Any]:
    return {"model_type": "llama", "quantization_config": QuantConfig(LAYERS).to_dict() | quantization}


def write_by_hand(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """A folder as another program leaves it: one file and no index."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("max_shard_bytes", [1, 3000, 1 << 30])
def test_round_trip(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = stored_tensors()
    folder = tmp_path / "deep" / "model"
    save_checkpoint(folder, tensors.items(), config_json(), max_shard_bytes)

    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards == [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {path.name for path in folder.iterdir()} == {*shards, "config.json", "model.safetensors.index.json"}
    for shard in shards:
        held = load_file(folder / shard)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= max_shard_bytes
        assert all(torch.equal(tensor, tensors.pop(name)) for name, tensor in held.items())
        with safe_open(folder / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert not tensors

    assert check_layers(folder, read_quant_config(folder)) == LAYERS
    for seed, (path, config) in enumerate(LAYERS.items()):
        loaded, original = load_layer(folder, path), random_weight(config, seed=seed)
        assert loaded.config == config
        assert torch.equal(*(reference.dequantize(config, w.to_tensors(torch.float16)) for w in (loaded, original)))


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save_checkpoint(tmp_path / name, stored_tensors().items(), config_json(), max_shard_bytes=3000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", stored_tensors().items(), config_json())
    modes = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("carrier", [torch.uint16, torch.float16])
def test_legacy_carriers(tmp_path: Path, carrier: torch.dtype) -> None:
    folder = write_by_hand(tmp_path / "m", stored_tensors(carrier), config_json())
    checkpoint = Checkpoint.open(folder)
    for seed, (path, config) in enumerate(checkpoint.layers().items()):
        assert torch.equal(checkpoint.load_layer(path).indices, random_weight(config, seed=seed).indices)


def test_shared_entries_and_text_models(tmp_path: Path) -> None:
    shared = {"q_proj": PACKED.to_entry(), "up_proj": UNPACKED.to_entry()}
    config = config_json(config_for_layers={}, shared_layer_config=shared)
    folder = write_by_hand(tmp_path / "m", stored_tensors(), {"text_config": config})
    assert Checkpoint.open(folder).layers() == LAYERS


def test_a_bias_that_the_entry_does_not_mention(tmp_path: Path) -> None:
    entries = {path: layer.to_entry() for path, layer in LAYERS.items()}
    del entries["model.layers.0.q_proj"]["bias"]
    folder = write_by_hand(tmp_path / "m", stored_tensors(), config_json(config_for_layers=entries))
    assert load_layer(folder, "model.layers.0.q_proj").bias is not None


def test_headers_allocate_nothing(tmp_path: Path) -> None:
    folder = write_by_hand(tmp_path / "m", stored_tensors(), config_json())
    headers = read_headers([folder / "model.safetensors"])
    assert all(header.is_meta for header in headers.values())
    assert {name: (h.shape, h.dtype) for name, h in headers.items()} == {
        name: (t.shape, t.dtype) for name, t in stored_tensors().items()
    }


def test_tensors_that_share_memory_are_stored_each_on_its_own(tmp_path: Path) -> None:
    base = torch.arange(2000.0)
    tensors = {
        "a": base[:1200],
        "b": base[800:],
        "c": base.view(2, 1000).t(),
        "d": base,
        "e": base.view(40, 50),
        "f": base[:0],
    }
    save_tensors(tmp_path, tensors.items())
    (shard,) = tmp_path.glob("*.safetensors")
    held = load_file(shard)
    assert list(held) == list(tensors)
    assert all(torch.equal(held[name], tensor) for name, tensor in tensors.items())
    assert shard.stat().st_size < sum(tensor.nbytes for tensor in tensors.values()) + 1000


def test_a_failure_leaves_no_unfinished_shard(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(2)
        yield "b", torch.ones(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_tensors(tmp_path, tensors(), max_shard_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_comes_twice(tmp_path: Path) -> None:
    tensors = [("a", torch.ones(2)), ("b", torch.ones(2)), ("a", torch.ones(2))]
    for max_shard_bytes in (1, 1000):
        with pytest.raises(CheckpointError, match="tensor a comes twice"):
            save_checkpoint(tmp_path / "m", tensors, {}, max_shard_bytes)
        assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_told_and_only_when_done(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(CheckpointError, match="exists; choose another folder, or overwrite it"):
        save_checkpoint(folder, stored_tensors().items(), config_json())
    with pytest.raises(ZeroDivisionError), staged_folder(folder, overwrite=True):
        _ = 1 / 0
    assert [path.name for path in folder.iterdir()] == ["old"]
    save_checkpoint(folder, stored_tensors().items(), config_json(), overwrite=True)
    assert not (folder / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "junk").touch()
    save_checkpoint(tmp_path / "m", stored_tensors().items(), config_json())
    assert not (tmp_path / "m" / "junk").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
