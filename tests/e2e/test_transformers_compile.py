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


@pytest.mark.slow
def test_generate_compiles_the_model_with_a_static_cache(make_checkpoint):
    stored = make_checkpoint(dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(stored.folder)
    prompt = torch.arange(1, 6).reshape(1, 5)
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompt, **arguments)
    compile_config = transformers.CompileConfig(backend="aot_eager", fullgraph=True)
    compile_config._compile_all_devices = True  # generate compiles by itself on accelerators only
    torch._dynamo.reset()
    found = model.generate(prompt, **arguments, cache_implementation="static", compile_config=compile_config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert found.tolist() == expected.tolist()
