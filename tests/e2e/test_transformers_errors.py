"""A checkpoint that contradicts itself or the model is refused before anything is allocated, naming the culprit."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import transformers
from versions import IS_VERSION_4, needs_transformers

import vptq
from vptq.errors import CheckpointError, ConfigError
from vptq.integrations.transformers import VptqConfig
from vptq.linear import VQuantLinear

Q_PROJ = "model.layers.0.self_attn.q_proj"
LOADS_A_TENSOR = (
    "transformers.modeling_utils._load_parameter_into_model"
    if IS_VERSION_4
    else "transformers.core_model_loading._materialize_copy"
)


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """Write a damaged copy, and see it refused while the model is still empty."""

    def check(stored, error, message, family=load):
        folder = stored.write(tmp_path / "damaged")
        with monkeypatch.context() as patch:
            loaded = []
            patch.setattr(LOADS_A_TENSOR, lambda *_: loaded.append(1))
            with pytest.raises(error, match=message) as caught:
                family(folder)
        assert not loaded, "tensors were read before the checkpoint was refused"
        assert "\n" not in str(caught.value)

    return check


def wrong_shape(tensor):
    return tensor[..., :-1]


def wrong_dtype(tensor):
    return tensor.to(torch.int64) if tensor.is_floating_point() else tensor.to(torch.float32)


NAMES = [
    "centroids.weight",
    "res_centroids.weight",
    "indices",
    "outlier_indices",
    "perm",
    "weight_scale",
    "weight_bias",
]
PATHS = dict.fromkeys(NAMES, "model.layers.0.self_attn.o_proj")
PATHS["res_centroids.weight"] = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize("damage", [wrong_shape, wrong_dtype])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_contradicts_its_entry(make_checkpoint, refused, name, damage):
    stored = copy.deepcopy(make_checkpoint())
    full_name = f"{PATHS[name]}.{name}"
    stored.tensors[full_name] = damage(stored.tensors[full_name])
    refused(stored, CheckpointError, rf"{PATHS[name]}\W+.*{name}.* (has shape|is torch)")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor(make_checkpoint, refused, name):
    stored = copy.deepcopy(make_checkpoint())
    del stored.tensors[f"{PATHS[name]}.{name}"]
    refused(stored, CheckpointError, rf"{PATHS[name]}.*{name}.*missing")


def test_a_transposed_tensor_of_the_right_size(make_checkpoint, refused):
    stored = copy.deepcopy(make_checkpoint())
    name = f"{Q_PROJ}.indices"
    stored.tensors[name] = stored.tensors[name].transpose(1, 2)
    refused(stored, CheckpointError, f"{Q_PROJ}.*indices.*shape")


@pytest.mark.parametrize(("key", "value"), [("in_features", 60), ("out_features", 72)])
def test_an_entry_that_contradicts_the_model(make_checkpoint, refused, key, value):
    stored = copy.deepcopy(make_checkpoint())
    entry = stored.config["quantization_config"]["config_for_layers"][Q_PROJ]
    entry[key] = value
    entry["group_size"] = entry["in_features"]
    refused(stored, ConfigError, f"{Q_PROJ}.*{value}.*64")


def test_an_invalid_entry(make_checkpoint, refused):
    stored = copy.deepcopy(make_checkpoint())
    stored.config["quantization_config"]["config_for_layers"][Q_PROJ]["num_centroids"] = [-1, 12]
    refused(stored, ConfigError, f"{Q_PROJ}.*12.*power of two")


def test_a_config_made_by_hand_is_checked_when_it_is_made():
    entry = {"vector_lens": [-1, 4], "num_centroids": [-1, 12], "num_res_centroids": [-1, -1]}
    with pytest.raises(ConfigError, match="power of two"):
        VptqConfig(config_for_layers={Q_PROJ: entry | {"in_features": 8, "out_features": 8, "is_indice_packed": True}})


def test_a_dense_weight_where_an_entry_promises_codebooks(make_checkpoint, refused):
    stored = copy.deepcopy(make_checkpoint())
    for name in [name for name in stored.tensors if name.startswith(f"{Q_PROJ}.")]:
        del stored.tensors[name]
    stored.tensors[f"{Q_PROJ}.weight"] = torch.zeros(64, 64)
    refused(stored, CheckpointError, Q_PROJ)


@pytest.mark.parametrize("path", ["model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.act_fn", "model.norm"])
def test_an_entry_for_what_is_no_linear_layer(make_checkpoint, refused, path):
    stored = copy.deepcopy(make_checkpoint())
    entries = stored.config["quantization_config"]["config_for_layers"]
    entries[path] = entries[Q_PROJ]
    refused(stored, ConfigError, rf"config_for_layers\['{path}'\].*transformers version")


DENSE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight"]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("damage", [lambda t: t[:-1], lambda t: t.to(torch.int32)], ids=["shape", "dtype"])
def test_a_dense_tensor_that_contradicts_the_model(make_checkpoint, refused, name, damage):
    stored = copy.deepcopy(make_checkpoint())
    stored.tensors[name] = damage(stored.tensors[name])
    refused(stored, CheckpointError, rf"^{name} (has shape|is torch.int32).*the model's is")


def test_quantized_tensors_without_an_entry(make_checkpoint, refused):
    stored = copy.deepcopy(make_checkpoint())
    del stored.config["quantization_config"]["config_for_layers"][Q_PROJ]
    refused(stored, CheckpointError, f"{Q_PROJ} is stored quantized, but quantization_config has no entry")


def test_a_tied_output_embedding_cannot_be_quantized(make_checkpoint, refused):
    stored = copy.deepcopy(make_checkpoint("tied llama"))
    entries = stored.config["quantization_config"]["config_for_layers"]
    entries["lm_head"] = entries[Q_PROJ] | {"out_features": 96}
    for name in [name for name in stored.tensors if name.startswith(f"{Q_PROJ}.")]:
        stored.tensors[name.replace(Q_PROJ, "lm_head")] = stored.tensors[name].clone()
    indices = stored.tensors["lm_head.indices"]
    stored.tensors["lm_head.indices"] = torch.cat([indices, indices[:, :8]], dim=1)
    refused(stored, ConfigError, "lm_head is quantized.*tie_word_embeddings")


def test_an_index_beyond_its_codebook(make_checkpoint, tmp_path):
    unpacked = ({"vector_len": 4, "num_centroids": 13, "is_packed": False},)
    stored = copy.deepcopy(make_checkpoint(kinds=unpacked))
    stored.tensors[f"{Q_PROJ}.indices"][0, 3, 5] = 13
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}.*indices holds 13.*0..12"):
        load(stored.write(tmp_path / "damaged"))


def test_a_permutation_that_is_none(make_checkpoint, tmp_path):
    stored = copy.deepcopy(make_checkpoint())
    perm = stored.tensors["model.layers.0.self_attn.k_proj.perm"]
    perm[3] = perm[4]
    with pytest.raises(CheckpointError, match=r"k_proj.*not a permutation"):
        load(stored.write(tmp_path / "damaged"))


@pytest.mark.parametrize("keep", [4, 100, 20_000])
def test_a_truncated_file(make_checkpoint, tmp_path, keep):
    folder = make_checkpoint().write(tmp_path / "damaged")
    file = folder / "model.safetensors"
    os.truncate(file, keep)
    with pytest.raises(CheckpointError, match="damaged"):
        vptq.AutoModelForCausalLM.from_pretrained(folder)
    if not IS_VERSION_4:  # which opens a single file before it asks anybody
        with pytest.raises(CheckpointError, match="truncated"):
            load(folder)


def test_a_missing_shard(make_checkpoint, tmp_path):
    folder = make_checkpoint().write(tmp_path / "damaged", shards=3)
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.safetensors.*(missing|no such file)"):
        vptq.AutoModelForCausalLM.from_pretrained(folder)


def test_a_pickle_is_not_read(make_checkpoint, tmp_path):
    stored = make_checkpoint()
    folder = stored.write(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(stored.tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        load(folder)


@needs_transformers("5.0", "opens a single file before it asks anybody")
def test_a_disguised_pickle_is_not_read(make_checkpoint, tmp_path):
    stored = make_checkpoint()
    folder = stored.write(tmp_path / "pickled")
    torch.save(stored.tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_gpu_utilization_is_a_share(make_checkpoint, share):
    with pytest.raises(ConfigError, match="gpu_utilization"):
        vptq.AutoModelForCausalLM.from_pretrained(make_checkpoint().folder, gpu_utilization=share)


ON_CPU = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("whole", [True, False], ids=["layers", "inner modules"])
def test_layers_offloaded_to_disk_compute_the_same(make_checkpoint, tmp_path, whole):
    """With a device boundary between blocks, and with one right through a block."""
    stored = make_checkpoint(dtype=torch.float32)
    ids = torch.arange(12).reshape(2, 6)
    if whole:
        device_map = ON_CPU | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    else:
        device_map = ON_CPU | {"model.layers.0": "cpu", "model.layers.1.mlp": "cpu", "model.layers.1.self_attn": "disk"}
        device_map |= {"model.layers.1.input_layernorm": "cpu", "model.layers.1.post_attention_layernorm": "cpu"}
    model = load(stored.folder, device_map=device_map, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        expected = load(stored.folder)(ids).logits
        for _ in range(2):  # the second call finds what the first one has put back
            assert torch.equal(model(ids).logits, expected)
    layer = model.model.layers[1].self_attn.q_proj
    assert isinstance(layer, VQuantLinear)
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(ids).logits, expected)


def test_offloaded_layers_in_another_dtype(make_checkpoint, tmp_path):
    stored = make_checkpoint(dtype=torch.float16)
    ids = torch.arange(12).reshape(2, 6)
    device_map = ON_CPU | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(stored.folder, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(stored.folder, dtype=torch.float32)(ids).logits)


def test_offloaded_layers_are_checked_too(make_checkpoint, tmp_path):
    stored = copy.deepcopy(make_checkpoint())
    stored.tensors["model.layers.1.self_attn.q_proj.outlier_indices"][0, 0, 0] = 16
    device_map = ON_CPU | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(CheckpointError, match=r"layers.1.*outlier_indices holds 16"):
        load(stored.write(tmp_path / "bad"), device_map=device_map, offload_folder=tmp_path / "offload")


def test_legacy_carriers_cannot_be_offloaded(make_checkpoint, tmp_path):
    stored = copy.deepcopy(make_checkpoint())
    name = "model.layers.1.self_attn.q_proj.perm"
    stored.tensors[name] = stored.tensors[name].view(torch.float16)
    device_map = ON_CPU | {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(ConfigError, match=rf"{name} is stored as torch.float16.*without offload"):
        load(stored.write(tmp_path / "old"), device_map=device_map, offload_folder=tmp_path / "offload")


@needs_transformers("5.0", "cannot put a whole model on disk")
def test_no_device_boundary_inside_a_layer(make_checkpoint, monkeypatch, tmp_path):
    """A model that names no unsplittable blocks is cut wherever memory ends, but not between indices and codebooks."""
    for model_class in (transformers.LlamaPreTrainedModel, transformers.LlamaModel, transformers.LlamaForCausalLM):
        monkeypatch.setattr(model_class, "_no_split_modules", [])
    stored = make_checkpoint(dtype=torch.float32)
    placed: set[str] = set()
    for limit in range(30_000, 90_000, 4_000):
        memory = {"cpu": limit, "disk": 10**9}
        model = load(stored.folder, device_map="sequential", max_memory=memory, offload_folder=tmp_path / "offload")
        placed |= getattr(model, "hf_device_map", {}).keys()
    assert placed & stored.weights.keys(), "no limit fell inside a block: the test shows nothing"
    assert not [path for path in placed for layer in stored.weights if path.startswith(f"{layer}.")]
