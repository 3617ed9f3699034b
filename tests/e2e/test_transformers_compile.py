"""Loaded models under torch.compile."""

from __future__ import annotations

import pytest
import torch
import transformers


@pytest.mark.slow
def test_a_loaded_model_compiles_without_a_graph_break(make_checkpoint):
    stored = make_checkpoint(dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(stored.folder)
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
