"""Tiny models with random quantized linears, written the way the published checkpoints are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from random_layers import random_weight
from safetensors.torch import save_file

from vptq.config import LayerConfig, QuantConfig
from vptq.weight import QuantizedWeight


@dataclass
class Stored:
    """A written checkpoint and what it holds."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    weights: dict[str, QuantizedWeight]

    def write(self, folder: Path, shards: int = 1) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        names = sorted(self.tensors)
        files = {name: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}" for i, name in enumerate(names)}
        if shards == 1:
            files = dict.fromkeys(names, "model")
        for file in set(files.values()):
            held = {name: self.tensors[name].contiguous() for name in names if files[name] == file}
            save_file(held, folder / f"{file}.safetensors", metadata={"format": "pt"})
        if shards > 1:
            weight_map = {name: f"{file}.safetensors" for name, file in files.items()}
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    ),
    "tied llama": lambda: transformers.LlamaConfig(
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2": lambda: transformers.Qwen2Config(  # q, k and v have biases
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(  # other names, other nesting, biases everywhere
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 64},
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4},
    ),
    "qwen3.5 text": lambda: transformers.AutoConfig.for_model(
        "qwen3_5_text",
        **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 2, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8},
        **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    ),
}

# In turn over the layers of a model, so that one checkpoint holds every kind.
KINDS = (
    {"vector_len": 4, "num_centroids": 16},
    {"vector_len": 8, "num_centroids": 32, "num_residual_centroids": 8, "enable_perm": True},
    {"vector_len": 6, "num_centroids": 16, "num_groups": 2, "enable_norm": True},
    {
        **{"vector_len": 8, "num_centroids": 64, "enable_perm": True, "enable_norm": True},
        **{"outlier_size": 4, "outlier_vector_len": 4, "outlier_num_centroids": 16},
    },
)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Stored]:
    """Quantized checkpoints: make_checkpoint(family, dtype, kinds, shards) writes one and says what is in it.

    `sizes` are those of the model's configuration that shall differ.
    """

    def make(
        family: str = "llama",
        dtype: torch.dtype = torch.float16,
        kinds: tuple[dict[str, Any], ...] = KINDS,
        shards: int = 1,
        **sizes: int,
    ) -> Stored:
        hf_config = CONFIGS[family]()
        for name, size in sizes.items():
            setattr(hf_config, name, size)
        hf_config.dtype = dtype
        torch.manual_seed(0)
        dense = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
        hf_config.architectures = [type(dense).__name__]
        tensors = {name: tensor.detach().clone() for name, tensor in dense.state_dict().items()}
        if hf_config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        weights: dict[str, QuantizedWeight] = {}
        head = dense.get_output_embeddings()
        for path, module in dense.named_modules():
            if not isinstance(module, torch.nn.Linear) or module is head:
                continue
            kind = kinds[len(weights) % len(kinds)]
            config = LayerConfig(module.in_features, module.out_features, bias=module.bias is not None, **kind)
            weights[path] = weight = random_weight(config, dtype, seed=len(weights))
            del tensors[f"{path}.weight"]
            tensors.update({f"{path}.{name}": tensor for name, tensor in weight.to_tensors(dtype).items()})
        quant_config = QuantConfig({path: weight.config for path, weight in weights.items()})
        config_json = hf_config.to_dict() | {"quantization_config": quant_config.to_dict()}
        config_json = json.loads(json.dumps(config_json, default=str).replace('"torch.', '"'))
        stored = Stored(Path(), config_json, tensors, weights)
        folder = tmp_path_factory.mktemp("checkpoint") / "model"
        return replace(stored, folder=stored.write(folder, shards))

    return make
