"""Tiny random models of several architectures, and what the quantization pipeline makes of them before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vptq.quantize.job import Job
from vptq.quantize.setup import prepare

SIZES = {
    "vocab_size": 63,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
}
GROUPED = {"num_key_value_heads": 2}
# What differs from one to the next: names and nesting, biases, fused projections, parallel attention and MLP, norms
# after as well as before, masks that differ between blocks, learned positions, weights in one place for two uses.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "gpt_neox": {},
    "phi": GROUPED,
    "phi3": GROUPED | {"pad_token_id": 0},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 16, "tie_word_embeddings": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    "falcon": {"new_decoder_architecture": False},
}


def tiny(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose predictions are far enough from uniform to tell models apart."""
    options = SIZES | FAMILIES.get(family, {}) | {"initializer_range": 0.2, "init_std": 0.2} | changes
    config = AutoConfig.for_model(family, **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def like_trained(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with random biases and norm weights: fresh ones are zeros and ones, which hide what is done to them."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator) * 2 + 0.2
    return model


def job_for(model: PreTrainedModel | str | Path, output: Path, spec: str | None = "v4-k16", **changes: Any) -> Job:
    """A checked request with its work folder open: little text, one model's inputs, and the defaults for the rest."""
    options: dict[str, Any] = {"sequences": 4, "seqlen": 16, "device": "cpu", "hessian_inputs": "quantized"}
    job = prepare(model, output, spec, **(options | changes))
    job.enter_workspace()
    return job


def random_tokens(sequences: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    """Token ids of the models above."""
    return torch.randint(3, SIZES["vocab_size"], (sequences, seqlen), generator=torch.Generator().manual_seed(seed))
