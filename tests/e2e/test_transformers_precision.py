"""A GPU without bfloat16 gets float16, told once; what does not fit is an error. The GPU is pretended."""

from __future__ import annotations

import pytest
import torch
import transformers
from versions import needs_transformers

from vptq.errors import CheckpointError
from vptq.integrations import precision


@pytest.fixture(params=[False, True], ids=["old card", "new card"])
def has_bfloat16(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An old card")
    return request.param


@pytest.mark.parametrize("device_map", ["auto", "cuda", {"": 0}, {"model": "cuda:0", "lm_head": "cpu"}])
def test_only_bfloat16_on_a_card_without_it_changes(has_bfloat16, device_map, caplog):
    assert precision.dtype_for(torch.float32, device_map) == torch.float32
    assert precision.dtype_for(torch.float16, device_map) == torch.float16
    for nowhere in (None, "cpu", {"": "cpu"}, {"a": "disk", "b": "cpu"}):
        assert precision.dtype_for(torch.bfloat16, nowhere) == torch.bfloat16
    assert not caplog.messages
    expected = torch.bfloat16 if has_bfloat16 else torch.float16
    assert precision.dtype_for(torch.bfloat16, device_map) == expected
    assert caplog.messages == ([] if has_bfloat16 else ["An old card has no bfloat16: the model runs in float16"])


@needs_transformers("5.0", "settles the dtype before it is told of devices")
def test_a_checkpoint_runs_as_float16_if_it_fits(make_checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(precision, "_without_bfloat16", lambda device_map: f"a card of {device_map}")
    stored = make_checkpoint("llama", torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(stored.folder, device_map={"": "cpu"})
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.float16}
    assert "a card of {'': 'cpu'} has no bfloat16: the model runs in float16" in caplog.messages[0]
    weight = model.model.layers[0].self_attn.v_proj.weight_scale
    weight.data[0] = torch.inf
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.v_proj\.weight_scale holds numbers beyond"):
        precision.check_fits(model)


@needs_transformers("5.0", "settles the dtype before it is told of devices")
def test_numbers_beyond_float16_are_found_while_loading(make_checkpoint, monkeypatch, tmp_path):
    stored = make_checkpoint("llama", torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(stored.folder)
    model.model.norm.weight.data[3] = 1e6
    model.save_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(precision, "_without_bfloat16", lambda device_map: "a card")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds numbers beyond float16's 65504"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
