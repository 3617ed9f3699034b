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


@needs_transformers("5.0", "settles the dtype before it is told of devices")
@pytest.mark.parametrize(("scale", "fits"), [(30000.0, True), (60000.0, False)])
def test_weights_made_of_numbers_that_fit_are_checked_too(make_checkpoint, monkeypatch, tmp_path, scale, fits):
    """An entry of 2 times a scale; that another column has a large bias does not matter."""
    stored = make_checkpoint("llama", torch.bfloat16)
    for name, tensor in stored.tensors.items():
        if name.endswith("layers.1.self_attn.q_proj.centroids.weight"):
            tensor.fill_(2.0)
        elif name.endswith("layers.1.self_attn.q_proj.res_centroids.weight"):
            tensor.fill_(0.0)
        elif name.endswith("layers.1.self_attn.q_proj.weight_scale"):
            tensor[5] = scale
        elif name.endswith("layers.1.self_attn.q_proj.weight_bias"):
            tensor[6] = 60000.0
    folder = stored.write(tmp_path / "large")
    transformers.AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(precision, "_without_bfloat16", lambda device_map: "a card")
    if fits:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.float16
        assert model.model.layers[1].self_attn.q_proj.dequantize().abs().max() > 59000
    else:
        with pytest.raises(
            CheckpointError, match=r"the weight of model\.layers\.1\.self_attn\.q_proj holds numbers beyond"
        ):
            transformers.AutoModelForCausalLM.from_pretrained(folder)


@needs_transformers("5.0", "settles the dtype before it is told of devices")
@pytest.mark.parametrize("dtype", [None, "auto", torch.bfloat16])
def test_the_dtype_asked_for_changes_nothing_about_it(make_checkpoint, monkeypatch, caplog, dtype):
    """On an old card; the outputs are those of float16."""
    stored = make_checkpoint("llama", torch.bfloat16)
    asked = {} if dtype is None else {"dtype": dtype}
    expected = transformers.AutoModelForCausalLM.from_pretrained(stored.folder, dtype=torch.float16)
    monkeypatch.setattr(precision, "_without_bfloat16", lambda device_map: "An old card")
    model = transformers.AutoModelForCausalLM.from_pretrained(stored.folder, **asked)
    assert caplog.messages == ["An old card has no bfloat16: the model runs in float16"]
    ids = torch.arange(1, 9)[None]
    with torch.inference_mode():
        found = model(ids).logits
        assert found.isfinite().all()
        assert torch.equal(found, expected(ids).logits)
