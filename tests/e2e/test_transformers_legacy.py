"""What the published versions wrote besides the current layout is loaded through plain transformers too."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from versions import IS_VERSION_4, needs_transformers

from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.linear import VQuantLinear

IDS = torch.arange(1, 13).reshape(2, 6)
INDEX_NAMES = ("indices", "res_indices", "outlier_indices", "perm")
UNPACKED = (
    {"vector_len": 4, "num_centroids": 13, "is_packed": False},
    {"vector_len": 8, "num_centroids": 20, "num_residual_centroids": 7, "enable_perm": True, "is_packed": False},
    {
        **{"vector_len": 4, "num_centroids": 16, "is_packed": False, "enable_norm": True, "enable_perm": True},
        **{"outlier_size": 4, "outlier_vector_len": 2, "outlier_num_centroids": 9},
    },
)


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def entries_of(stored):
    return stored.config["quantization_config"]["config_for_layers"]


def assert_loads_as(folder, canonical):
    """The checkpoint at `folder` is loaded as the tensors of `canonical`, and is from then on stored like it."""
    model = load(folder)
    expected = canonical.tensors
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    return model


def rewritten(stored, folder, carrier):
    """The checkpoint with every 16-bit (or unpacked perm) index tensor passed through `carrier`."""
    legacy = copy.deepcopy(stored)
    for name, tensor in legacy.tensors.items():
        if name.rpartition(".")[2] in INDEX_NAMES and tensor.dtype != torch.int32:
            legacy.tensors[name] = carrier(tensor)
    legacy.folder = legacy.write(folder)
    return legacy


def as_float16(tensor):
    return tensor.to(torch.int16).view(torch.float16)


def as_uint16(tensor):
    return tensor.to(torch.int16).view(torch.uint16)


def as_int64(tensor):
    return tensor.to(torch.int64) & 0xFFFF


@pytest.mark.parametrize("carrier", [as_float16, as_uint16, as_int64])
@pytest.mark.parametrize("kinds", [None, UNPACKED], ids=["packed", "unpacked"])
def test_legacy_index_carriers(make_checkpoint, tmp_path, carrier, kinds):
    stored = make_checkpoint(**{"kinds": kinds} if kinds else {})
    legacy = rewritten(stored, tmp_path / "legacy", carrier)
    for entry in entries_of(legacy).values():
        entry["indices_as_float"] = carrier is as_float16
    (legacy.folder / "config.json").write_text(json.dumps(legacy.config))

    model = assert_loads_as(legacy.folder, stored)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["quantization_config"] == stored.config["quantization_config"]
    assert_loads_as(tmp_path / "saved", stored)


def test_float16_carriers_survive_a_change_of_dtype(make_checkpoint, tmp_path):
    stored = make_checkpoint(kinds=UNPACKED)
    legacy = rewritten(stored, tmp_path / "legacy", as_float16)
    if IS_VERSION_4:  # casts them by value
        with pytest.raises(ConfigError, match=r"holds indices as torch\.float16.*load with dtype=torch\.float16"):
            load(legacy.folder, dtype=torch.float32)
        return
    model = load(legacy.folder, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored.tensors[name].to(tensor.dtype)), name
        assert not tensor.is_floating_point() or tensor.dtype == torch.float32


def test_unpacked_layers_run_and_are_saved_as_they_are(make_checkpoint, tmp_path):
    stored = make_checkpoint(dtype=torch.float32, kinds=UNPACKED)
    model = load(stored.folder)
    model.save_pretrained(tmp_path / "saved")
    for name, tensor in load_file(tmp_path / "saved/model.safetensors").items():
        assert torch.equal(tensor, stored.tensors[name]), name
    dense = load(stored.folder).dequantize()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


def test_keys_of_the_algorithm_branch(make_checkpoint, tmp_path):
    stored = make_checkpoint(dtype=torch.float32)
    legacy = copy.deepcopy(stored)
    legacy.config["quantization_config"]["enable_proxy_error"] = None
    for entry in entries_of(legacy).values():
        entry.update(norm_dim=0, enable_proxy_error=True, indices_as_float=None, unheard_of=[1, 2])
    assert_loads_as(legacy.write(tmp_path / "legacy"), stored)


def test_entries_without_a_bias_key_take_the_models_word(make_checkpoint, tmp_path):
    stored = make_checkpoint("qwen2")
    legacy = copy.deepcopy(stored)
    for entry in entries_of(legacy).values():
        del entry["bias"]
    model = assert_loads_as(legacy.write(tmp_path / "legacy"), stored)
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert model.model.layers[0].self_attn.o_proj.bias is None


def shared_by_tail(stored):
    """Move the entries of equal layers into `shared_layer_config`, keyed by the last name."""
    config = stored.config["quantization_config"]
    config["shared_layer_config"] = {path.rpartition(".")[2]: entry for path, entry in entries_of(stored).items()}
    config["config_for_layers"] = {}


ONE_KIND = ({"vector_len": 4, "num_centroids": 16, "enable_perm": True},)


def test_shared_layer_config(make_checkpoint, tmp_path):
    stored = make_checkpoint(dtype=torch.float32, kinds=ONE_KIND)
    legacy = copy.deepcopy(stored)
    shared_by_tail(legacy)
    model = assert_loads_as(legacy.write(tmp_path / "shared"), stored)
    model.save_pretrained(tmp_path / "saved")
    assert_loads_as(tmp_path / "saved", stored)


def test_a_shared_entry_does_not_mean_a_layer_stored_dense(make_checkpoint, tmp_path):
    stored = make_checkpoint(dtype=torch.float32, kinds=ONE_KIND)
    legacy = copy.deepcopy(stored)
    shared_by_tail(legacy)
    path = "model.layers.1.mlp.up_proj"
    for name in [name for name in legacy.tensors if name.startswith(path)]:
        del legacy.tensors[name]
    legacy.tensors[f"{path}.weight"] = torch.randn(88, 64)
    model = load(legacy.write(tmp_path / "mixed"))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, legacy.tensors[f"{path}.weight"])
    assert isinstance(model.model.layers[0].mlp.up_proj, VQuantLinear)


@pytest.mark.parametrize("listed", [None, [], ["lm_head"], ["lm_head", "model.layers.1.mlp"], ["up_proj", "lm_head"]])
def test_modules_to_not_convert(make_checkpoint, tmp_path, listed):
    stored = make_checkpoint(dtype=torch.float32)
    legacy = copy.deepcopy(stored)
    legacy.config["quantization_config"]["modules_to_not_convert"] = listed
    dense_paths = {path for path in stored.weights if any(word in path for word in listed or [])}
    for path in dense_paths:
        del entries_of(legacy)[path]
        config: LayerConfig = stored.weights[path].config
        legacy.tensors = {name: t for name, t in legacy.tensors.items() if not name.startswith(f"{path}.")}
        legacy.tensors[f"{path}.weight"] = torch.randn(config.out_features, config.in_features)
    model = load(legacy.write(tmp_path / "partly"))
    found = {path for path, module in model.named_modules() if isinstance(module, VQuantLinear)}
    assert found == stored.weights.keys() - dense_paths
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["quantization_config"] == legacy.config["quantization_config"]


def test_the_output_embedding_may_be_quantized(make_checkpoint, tmp_path):
    stored = make_checkpoint(dtype=torch.float32)
    legacy = copy.deepcopy(stored)
    path, donor = "lm_head", stored.weights["model.layers.0.mlp.up_proj"]
    config = LayerConfig(64, 96, vector_len=8, num_centroids=16)
    assert donor.config.in_features == 64
    indices = torch.randint(16, (1, 12, 64))
    from vptq.weight import QuantizedWeight

    weight = QuantizedWeight(config, codebook=torch.randn(1, 16, 8), indices=indices)
    del legacy.tensors["lm_head.weight"]
    legacy.tensors.update({f"{path}.{name}": t for name, t in weight.to_tensors(torch.float32).items()})
    entries_of(legacy)[path] = config.to_entry()
    model = load(legacy.write(tmp_path / "head"))
    assert isinstance(model.lm_head, VQuantLinear)
    assert logits(model).shape == (2, 6, 96)
    decoder = transformers.AutoModel.from_pretrained(tmp_path / "head")  # which has no place for the head, nor needs it
    with torch.no_grad():
        assert torch.equal(decoder(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@needs_transformers("5.17", "has no such model")
def test_the_text_model_of_a_composite_checkpoint(make_checkpoint, tmp_path):
    """AutoModelForCausalLM takes the text model out of some composites, and renames everything on the way."""
    stored = make_checkpoint("qwen3.5 text", torch.float32)
    alone = load(stored.folder)
    composite = copy.deepcopy(stored)

    def inner(path):
        return path.replace("model.", "model.language_model.", 1)

    composite.tensors = {inner(name): tensor for name, tensor in stored.tensors.items()}
    quant_config = composite.config.pop("quantization_config")
    quant_config["config_for_layers"] = {inner(path): e for path, e in quant_config["config_for_layers"].items()}
    composite.config = {
        **{"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "dtype": "float32"},
        **{"text_config": composite.config, "quantization_config": quant_config},
    }
    model = load(composite.write(tmp_path / "composite"))
    assert type(model) is type(alone)
    assert model.state_dict().keys() == alone.state_dict().keys()
    assert {path for path, module in model.named_modules() if isinstance(module, VQuantLinear)} == stored.weights.keys()
    assert torch.equal(logits(model), logits(alone))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(alone))


@needs_transformers("5.0", "has experts of linear layers")
def test_quantized_attention_beside_dense_experts(make_checkpoint, tmp_path):
    """transformers fuses the experts' weights while loading: their stored shapes are nobody's parameters."""
    stored = copy.deepcopy(make_checkpoint("mixtral", torch.float32))
    assert stored.weights.keys() == {
        f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in ("q", "k", "v", "o")
    }
    fused = {name: stored.tensors.pop(name) for name in list(stored.tensors) if ".mlp." in name}
    dense = transformers.MixtralForCausalLM(transformers.MixtralConfig(**stored.config | {"quantization_config": None}))
    dense.load_state_dict(fused, strict=False)
    dense.save_pretrained(tmp_path / "dense")  # one tensor an expert, as the hub has them
    apart = {k: t for k, t in load_file(tmp_path / "dense/model.safetensors").items() if ".block_sparse_moe." in k}
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in apart
    stored.tensors |= apart
    model = load(stored.write(tmp_path / "hub"))
    assert fused
    for name, tensor in fused.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert saved.keys() == stored.tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in stored.tensors.items())
