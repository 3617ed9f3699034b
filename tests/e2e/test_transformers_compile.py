"""Loaded models under torch.compile."""

from __future__ import annotations

import pytest
import torch
import transformers

from vptq import shared_input

DEVICES = (
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]),
)


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


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_generate_with_reduced_overhead_gives_the_same_tokens(device, make_checkpoint, monkeypatch):
    """What transformers does by itself on a GPU: one CUDA graph a token there, Inductor's C++ on a CPU.

    Layers that read the same input run together, on the CPU as well, which has no graphs but the same compiler.
    """
    monkeypatch.setattr(shared_input, "_pays", lambda device: True)
    stored = make_checkpoint(dtype=torch.float32, kinds=({"vector_len": 8, "num_centroids": 32, "enable_perm": True},))
    model = transformers.AutoModelForCausalLM.from_pretrained(stored.folder).to(device)
    prompt = torch.arange(1, 6, device=device).reshape(1, 5)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(prompt, **arguments, disable_compile=True)
    compile_config = transformers.CompileConfig(mode="reduce-overhead", fullgraph=True)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):  # the second time from graphs that are there
        found = model.generate(prompt, **arguments, cache_implementation="static", compile_config=compile_config)
        assert found.tolist() == expected.tolist()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    blocks = [module for name, module in model.named_modules() if name.endswith(("self_attn", "mlp"))]
    shared = [block._modules.get("q_proj", block._modules.get("gate_proj")).shared_input for block in blocks]
    assert len(shared) == 4
    assert all(group is not None for group in shared), "they read the same input all the way"
