"""A `quantization_config` inside `text_config` is read, or refused where transformers overlooks it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from packaging.version import Version
from versions import INSTALLED, needs_transformers

from vptq.errors import ConfigError
from vptq.linear import VQuantLinear
from vptq.transformers_versions import refuse_overlooked_configs

IDS = torch.arange(1, 13).reshape(2, 6)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def write_nested(make_checkpoint, folder):
    """A composite model as the algorithm branch wrote it, and the paths of its quantized layers."""
    stored = make_checkpoint(dtype=torch.float32)
    text = {key: value for key, value in stored.config.items() if key != "architectures"}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    composite = {"model_type": "llava", "text_config": text, "vision_config": vision, "image_token_index": 5}
    nested = copy.deepcopy(stored)
    config = transformers.AutoConfig.for_model(**composite)
    dense = transformers.LlavaForConditionalGeneration(copy.deepcopy(config)).to(torch.float32)

    moved = {path: path.replace("model.", "model.language_model.", 1) for path in stored.weights}
    own = {name: t for name, t in dense.state_dict().items() if not name.startswith("model.language_model.layers")}
    nested.tensors = {name: tensor.detach().clone() for name, tensor in own.items()}
    for name, tensor in stored.tensors.items():
        if ".layers." in name:
            nested.tensors[name.replace("model.", "model.language_model.", 1)] = tensor
    entries = text["quantization_config"]["config_for_layers"]
    text["quantization_config"]["config_for_layers"] = {moved[path]: entry for path, entry in entries.items()}
    nested.config = {"architectures": ["LlavaForConditionalGeneration"], "dtype": "float32", **composite}
    nested.write(folder)
    return nested, set(moved.values())


@needs_transformers("5.17", "looks for it at the top alone")
def test_quantization_config_inside_the_text_config(make_checkpoint, tmp_path):
    folder = tmp_path / "llava"
    nested, layers = write_nested(make_checkpoint, folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    found = {path for path, module in model.named_modules() if isinstance(module, VQuantLinear)}
    assert found == layers
    for name, tensor in model.model.language_model.layers.state_dict().items():
        assert torch.equal(tensor, nested.tensors[f"model.language_model.layers.{name}"]), name
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["quantization_config"]["config_for_layers"].keys() == layers
    assert "quantization_config" not in saved["text_config"]
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


def test_a_quantization_config_that_transformers_overlooks_is_refused(make_checkpoint, tmp_path, monkeypatch):
    write_nested(make_checkpoint, tmp_path / "llava")
    if Version("5.17") <= INSTALLED:  # it overlooks nothing
        for module in (transformers.quantizers.auto, transformers.modeling_utils):
            monkeypatch.setattr(module, "get_hf_quantizer", lambda *_, **__: (None,))
        refuse_overlooked_configs()
    with pytest.raises(ConfigError, match=r"inside text_config.*move it to the top") as caught:
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    assert "\n" not in str(caught.value)


def test_the_remedy_that_the_refusal_names_helps(make_checkpoint, tmp_path):
    nested, layers = write_nested(make_checkpoint, tmp_path / "llava")
    nested.config["quantization_config"] = nested.config["text_config"].pop("quantization_config")
    (tmp_path / "llava/config.json").write_text(json.dumps(nested.config))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "llava")
    assert {path for path, module in model.named_modules() if isinstance(module, VQuantLinear)} == layers
