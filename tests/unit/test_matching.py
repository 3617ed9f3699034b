"""Which linears a checkpoint replaces, decided from names and headers alone. The e2e tests cover the rest."""

from __future__ import annotations

import pytest
import torch
import transformers

from vptq.config import LayerConfig, QuantConfig
from vptq.errors import CheckpointError
from vptq.integrations.matching import match_layers


@pytest.fixture
def mixture_of_experts() -> transformers.PreTrainedModel:
    """A model whose stored experts are transposed by transformers while loading."""
    config = transformers.Qwen3VLMoeConfig(
        text_config={"num_hidden_layers": 1, "num_experts": 4, "hidden_size": 64, "moe_intermediate_size": 24},
        vision_config={"depth": 1, "deepstack_visual_indexes": []},
    )
    with torch.device("meta"):
        return transformers.Qwen3VLMoeForConditionalGeneration(config)


def test_shapes_that_loading_changes_are_not_compared(mixture_of_experts: transformers.PreTrainedModel) -> None:
    stored = mixture_of_experts.state_dict()
    experts = [name for name in stored if ".experts." in name]
    assert experts
    stored |= {name: stored[name].transpose(1, 2) for name in experts}
    assert match_layers(mixture_of_experts, QuantConfig(), stored, lambda _: False) == []

    name = "model.language_model.embed_tokens.weight"
    stored[name] = stored[name].T
    with pytest.raises(CheckpointError, match=f"^{name} has shape"):
        match_layers(mixture_of_experts, QuantConfig(), stored, lambda _: False)


def test_without_files_the_entries_decide() -> None:
    """A state dict is handed to from_pretrained: there are no headers, so exclusions are taken at their word."""
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=10)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    up, down = LayerConfig(64, 96, vector_len=4, num_centroids=4), LayerConfig(96, 64, vector_len=4, num_centroids=4)
    entries = QuantConfig({"model.layers.0.mlp.up_proj": up}, shared_layers={"down_proj": down})
    matches = match_layers(model, entries, None, lambda _: False)
    assert {match.path: match.config for match in matches} == {
        "model.layers.0.mlp.up_proj": up,
        "model.layers.0.mlp.down_proj": down,
    }
    assert match_layers(model, entries, None, lambda path: "mlp" in path) == []
