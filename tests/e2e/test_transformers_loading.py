"""Plain `transformers.AutoModelForCausalLM.from_pretrained` loads what the format holds, exactly."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import vptq
from vptq import reference
from vptq.linear import VQuantLinear

IDS = torch.arange(1, 13).reshape(2, 6)


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def quantized_layers(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, VQuantLinear)}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].cpu(), tensor), name


def dense_twin(stored, dtype=torch.float32):
    """The same model with plain linear layers that hold the dequantized weights."""
    config = copy.deepcopy(stored.config)
    del config["quantization_config"]
    config = transformers.AutoConfig.for_model(**config)
    twin = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    state = {}
    for path, weight in stored.weights.items():
        tensors = weight.to_tensors(weight.codebook.dtype)
        state[f"{path}.weight"] = reference.dequantize(weight.config, tensors)
        if weight.bias is not None:
            state[f"{path}.bias"] = weight.bias
    dense = {name: tensor for name, tensor in stored.tensors.items() if name in twin.state_dict()}
    twin.load_state_dict({**dense, **state}, strict=False)
    return twin


@pytest.mark.parametrize("family", ["llama", "tied llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_tensor_arrives_unchanged(make_checkpoint, family, dtype):
    stored = make_checkpoint(family, dtype)
    model = load(stored.folder)
    expected = dict(stored.tensors)
    if family == "tied llama":
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert quantized_layers(model).keys() == stored.weights.keys()
    assert_same_tensors(model.state_dict(), expected)
    assert model.dtype == dtype
    assert not model.training
    assert not any(
        parameter.requires_grad for layer in quantized_layers(model).values() for parameter in layer.parameters()
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_the_model_computes_what_its_dequantized_twin_computes(make_checkpoint, family):
    stored = make_checkpoint(family, torch.float32)
    with torch.no_grad():
        found = load(stored.folder)(IDS).logits
        expected = dense_twin(stored)(IDS).logits
    # The kernel adds in another order than a matrix multiplication; a wrong weight would show in the first digit.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "device_map", [None, "cpu", "auto", "sequential", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}]
)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_device_map_and_sharded_files(make_checkpoint, device_map, shards):
    stored = make_checkpoint(shards=shards)
    model = load(stored.folder, device_map=device_map)
    assert_same_tensors(model.state_dict(), stored.tensors)


def test_meta_device(make_checkpoint):
    stored = make_checkpoint()
    model = load(stored.folder, device_map="meta")
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    assert shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in stored.tensors.items()}


@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "float32"])
def test_another_dtype_converts_floats_and_leaves_indices(make_checkpoint, keyword, dtype):
    stored = make_checkpoint()
    model = load(stored.folder, **{keyword: dtype})
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    expected = {
        name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in stored.tensors.items()
    }
    assert_same_tensors(model.state_dict(), expected)


def test_save_pretrained_gives_the_same_checkpoint(make_checkpoint, tmp_path):
    stored = make_checkpoint("qwen2", torch.bfloat16)
    load(stored.folder).save_pretrained(tmp_path / "again")
    assert_same_tensors(load_file(tmp_path / "again/model.safetensors"), stored.tensors)
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert config["quantization_config"] == stored.config["quantization_config"]
    load(tmp_path / "again").save_pretrained(tmp_path / "thrice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "thrice" / name).read_bytes()


def test_generate(make_checkpoint):
    stored = make_checkpoint("llama", torch.float32)
    prompt = IDS[:1]
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = load(stored.folder).generate(prompt, **arguments)
    expected = dense_twin(stored).generate(prompt, **arguments)
    assert found.tolist() == expected.tolist()


def test_the_package_entry_point_is_the_same_path(make_checkpoint):
    stored = make_checkpoint()
    model = vptq.AutoModelForCausalLM.from_pretrained(stored.folder, device_map="auto", torch_dtype="auto")
    assert_same_tensors(model.state_dict(), stored.tensors)
    assert type(model) is transformers.LlamaForCausalLM
