"""Damaged, lying and full: each is one line that names the file or tensor, before anything is allocated or shown."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_layers import random_weight
from safetensors.torch import load_file, save_file

from vptq.checkpoint import Checkpoint, find_shards, read_quant_config, save_checkpoint
from vptq.config import LayerConfig, QuantConfig
from vptq.errors import CheckpointError, ConfigError, VPTQError

PATH = "model.layers.0.q_proj"
CONFIG = LayerConfig(
    40,
    24,
    vector_len=8,
    num_centroids=60,
    num_residual_centroids=9,
    outlier_size=2,
    outlier_vector_len=4,
    outlier_num_centroids=7,
    enable_norm=True,
    enable_perm=True,
    is_packed=False,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good model of one layer in two shards."""
    stored = random_weight(CONFIG).to_tensors(torch.float16)
    named = ((f"{PATH}.{name}", tensor) for name, tensor in stored.items())
    config = {"quantization_config": QuantConfig({PATH: CONFIG}).to_dict()}
    save_checkpoint(tmp_path / "model", named, config, max_shard_bytes=1200)
    assert len(find_shards(tmp_path / "model")) > 1
    return tmp_path / "model"


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for shard in find_shards(folder):
        tensors = load_file(shard)
        if f"{PATH}.{name}" in tensors:
            tensors[f"{PATH}.{name}"] = change(tensors[f"{PATH}.{name}"].clone()).contiguous()
            save_file(tensors, shard)


def refused(folder: Path, said: str, error: type[VPTQError] = CheckpointError) -> None:
    """Opening, checking and loading says what is wrong in one line."""

    def read() -> None:
        checkpoint = Checkpoint.open(folder)
        checkpoint.layers()
        checkpoint.load_layer(PATH)

    with pytest.raises(error, match=said) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_the_model_is_good(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.layers() == {PATH: CONFIG}
    assert torch.equal(checkpoint.load_layer(PATH).indices, random_weight(CONFIG).indices)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, -1])
def test_truncated_shard(folder: Path, keep: int) -> None:
    shard = find_shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(folder, rf"{shard.name}: is truncated or not a safetensors file .*; download or copy it again")


def test_every_truncation_of_a_shard_is_found_from_its_header(folder: Path) -> None:
    shard = find_shards(folder)[0]
    whole = shard.read_bytes()
    for keep in range(0, len(whole), 97):
        shard.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match="truncated"):
            Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [([2**40, 2**20], [0, 8]), ([4], [0, 2**50]), ([4], [8, 0]), ([-4], [0, 8]), ([4], [0, 4])],
)
def test_header_that_promises_more_than_the_file_holds(folder: Path, shape: list[int], offsets: list[int]) -> None:
    shard = find_shards(folder)[0]
    header = json.dumps({f"{PATH}.perm": {"dtype": "I16", "shape": shape, "data_offsets": offsets}}).encode()
    shard.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refused(folder, f"{shard.name}: is truncated or not a safetensors file")


def test_missing_shard(folder: Path) -> None:
    shard = find_shards(folder)[1]
    shard.unlink()
    refused(folder, f"names {shard.name}, which is missing")


def test_shard_outside_the_folder(folder: Path) -> None:
    outside = folder.parent / "elsewhere.safetensors"
    find_shards(folder)[0].rename(outside)
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda data: data["weight_map"].update({"x": "../elsewhere.safetensors"}))
    refused(folder, "lies outside the folder")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}])
def test_index_that_is_none(folder: Path, weight_map: object) -> None:
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda data: data.update(weight_map=weight_map))
    refused(folder, "weight_map must map tensor names to file names")


def test_index_and_shards_disagree(folder: Path) -> None:
    first, second = (shard.name for shard in find_shards(folder)[:2])
    index = folder / "model.safetensors.index.json"
    for change in ({"made.up": first}, {f"{PATH}.centroids.weight": second}):
        edit_json(index, lambda data, change=change: data["weight_map"].update(change))
        refused(folder, f"places tensor {next(iter(change))} in .*, which does not hold it")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_instead_of_safetensors(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    refused(tmp_path, f"{name} is a pickle, which can run code and is not read")


@pytest.mark.parametrize("legacy", [True, False])
def test_pickle_under_the_name_of_safetensors(folder: Path, legacy: bool) -> None:
    shard = find_shards(folder)[0]
    torch.save({"a": torch.ones(2)}, shard, _use_new_zipfile_serialization=not legacy)
    refused(folder, f"{shard.name}: is a pickle")


def test_no_model_at_all(tmp_path: Path) -> None:
    refused(tmp_path, r"there is no model\.safetensors")
    refused(tmp_path / "nowhere", "no such folder")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"config\.json: cannot be read \(No such file"),
        ("{", r"config\.json: is not JSON"),
        ("[]", r"config\.json: must hold a JSON object, not a list"),
        ("{}", "has no quantization_config"),
    ],
)
def test_bad_config_file(folder: Path, text: str | None, said: str) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refused(folder, said)
    with pytest.raises(CheckpointError, match=said):
        read_quant_config(folder)


def test_another_method(folder: Path) -> None:
    edit_json(folder / "config.json", lambda data: data["quantization_config"].update(quant_method="gptq"))
    refused(folder, "quant_method is 'gptq'", ConfigError)


def test_entry_for_a_layer_that_is_not_stored(folder: Path) -> None:
    def add(data: dict) -> None:
        data["quantization_config"]["config_for_layers"]["model.layers.9.q_proj"] = CONFIG.to_entry()

    edit_json(folder / "config.json", add)
    refused(folder, r"^model\.layers\.9\.q_proj: tensor centroids\.weight is missing")


def test_stored_layer_without_an_entry(folder: Path) -> None:
    edit_json(folder / "config.json", lambda data: data["quantization_config"].update(config_for_layers={}))
    refused(folder, rf"^{PATH}: .* has no quantized layer of this name in its config\.json")


@pytest.mark.parametrize("name", list(random_weight(CONFIG).to_tensors(torch.float16)))
def test_shape_and_dtype_are_found_without_reading_data(folder: Path, name: str) -> None:
    edit_tensor(folder, name, lambda tensor: tensor[..., :-1])
    with pytest.raises(CheckpointError, match=rf"^{PATH}: {name} has shape .*entry means"):
        Checkpoint.open(folder).layers()
    edit_tensor(folder, name, lambda tensor: tensor.to(torch.uint8))
    with pytest.raises(CheckpointError, match=rf"^{PATH}: {name} (is torch.uint8|has shape)"):
        Checkpoint.open(folder).layers()


@pytest.mark.parametrize(
    ("name", "value"), [("indices", 60), ("res_indices", 9), ("outlier_indices", 7), ("perm", 40), ("perm", -1)]
)
def test_index_out_of_range(folder: Path, name: str, value: int) -> None:
    def damage(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    edit_tensor(folder, name, damage)
    said = "perm is not a permutation of the 40 input columns" if name == "perm" else f"{name} holds {value}"
    refused(folder, rf"^{PATH}: {said}")


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let a file grow, as on a full disk; in a process of its own, for the limit's sake."""
    script = """
import resource, sys, torch
from vptq.checkpoint import save_checkpoint
from vptq.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
tensors = [("small", torch.ones(100)), ("large", torch.ones(100_000))]
try:
    save_checkpoint(sys.argv[1], tensors, {}, max_shard_bytes=1000)
except CheckpointError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "cannot be written" in result.stdout
    assert "is the disk full?" in result.stdout
    assert len(result.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
