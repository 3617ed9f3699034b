"""A part of a quantized model is loaded through plain transformers too: its bare decoder, or its first layers."""

from __future__ import annotations

import torch
import transformers

IDS = torch.arange(1, 13).reshape(2, 6)


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def test_a_bare_decoder_of_a_causal_model(make_checkpoint):
    """transformers strips "model." from the names; the entries keep it."""
    stored = make_checkpoint(dtype=torch.float32)
    decoder = transformers.AutoModel.from_pretrained(stored.folder)
    whole = load(stored.folder)
    with torch.no_grad():
        assert torch.equal(decoder(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    cast = transformers.AutoModel.from_pretrained(stored.folder, dtype=torch.bfloat16)
    assert cast.layers[0].self_attn.q_proj.dtype == torch.bfloat16


def test_a_bare_decoder_saved_again(make_checkpoint, tmp_path):
    stored = make_checkpoint(dtype=torch.float32)
    decoder = transformers.AutoModel.from_pretrained(stored.folder)
    decoder.save_pretrained(tmp_path / "bare")
    again = transformers.AutoModel.from_pretrained(tmp_path / "bare")
    with torch.no_grad():
        assert torch.equal(decoder(IDS).last_hidden_state, again(IDS).last_hidden_state)


def test_fewer_layers_than_were_stored(make_checkpoint):
    stored = make_checkpoint(dtype=torch.float32)
    model = load(stored.folder, num_hidden_layers=1)
    assert len(model.model.layers) == 1
