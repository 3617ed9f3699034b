"""vLLM's own layers, run by the plugin: every rank of every kind of layer against the stored weight. Needs vLLM.

No engine: layers are made as a model makes them and get their tensors as a loader delivers them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from random_layers import random_weight
from torch import Tensor
from torch.nn import functional

from vptq.config import LayerConfig, QuantConfig
from vptq.errors import CheckpointError, ConfigError
from vptq.linear import VQuantLinear

vllm = pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.model_executor import parameter  # noqa: E402
from vllm.model_executor.layers import linear, vocab_parallel_embedding  # noqa: E402
from vllm.model_executor.layers.quantization import get_quantization_config  # noqa: E402
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper  # noqa: E402

from vptq import integrations  # noqa: E402

WIDTH, HEADS, HEAD = 48, 4, 12
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PARTS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
PLAIN: dict[str, Any] = {"vector_len": 8, "num_centroids": 32, "num_residual_centroids": 8}
GROUPS: dict[str, Any] = {
    "vector_len": 6,
    "num_centroids": 16,
    "num_groups": 3,
    "enable_perm": True,
    "enable_norm": True,
}
UNPACKED: dict[str, Any] = {"vector_len": 3, "num_centroids": 30, "is_packed": False, "enable_perm": True}
OUTLIERS: dict[str, Any] = {
    **{"vector_len": 8, "num_centroids": 16, "enable_perm": True, "enable_norm": True},
    **{"outlier_size": 4, "outlier_vector_len": 4, "outlier_num_centroids": 16},
}


@pytest.fixture(autouse=True)
def engine() -> Iterator[None]:
    integrations.register_with_vllm()
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def be_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Layers made from then on are those of one rank of several."""

    def be(rank: int, ranks: int) -> None:
        for module in (linear, vocab_parallel_embedding, parameter):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)

    be(0, 1)
    return be


class Checkpoint:
    """Stored layers by path: rows and a kind of quantization, or None for a dense one."""

    def __init__(self, width: int = WIDTH, dtype: torch.dtype = torch.float32, **layers: tuple[int, Any]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        configs = {}
        for seed, (name, (rows, kind)) in enumerate(layers.items()):
            path = f"model.{name}"
            if kind is None:
                self.weights[name] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
                self.tensors[f"{path}.weight"] = self.weights[name]
                continue
            configs[path] = LayerConfig(width, rows, **kind)
            weight = random_weight(configs[path], dtype, seed=seed)
            self.tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in weight.to_tensors(dtype).items()}
            self.weights[name] = VQuantLinear.from_weight(weight, dtype).dequantize()
        data = QuantConfig(configs).to_dict()
        self.config = get_quantization_config("vptq").from_config(data)
        self.config.packed_modules_mapping = PACKED

    def load(self, name: str, kind: type, *args: Any, **options: Any) -> Any:
        """A layer as a model holds it under `name`, its tensors delivered as from the checkpoint."""
        model = torch.nn.Module()
        model.model = torch.nn.Module()
        options |= {"quant_config": self.config, "prefix": f"model.{name}", "params_dtype": torch.float32}
        layer = kind(*args, **options)
        model.model.add_module(name, layer)
        stacked = {f".{stored}": (f".{name}", PARTS[stored]) for stored in PACKED.get(name, ())}
        AutoWeightsLoader(model).load_weights(self.tensors.items(), mapper=WeightsMapper(orig_to_new_stacked=stacked))
        layer.quant_method.process_weights_after_loading(layer)
        return layer


def weight_of(layer: Any, columns: int = WIDTH) -> Tensor:
    y: Tensor = layer.quant_method.apply(layer, torch.eye(columns))
    return y.T


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kinds", [(PLAIN, PLAIN, PLAIN), (PLAIN, GROUPS, OUTLIERS), (UNPACKED, None, PLAIN)])
def test_q_k_and_v_each_with_a_spec_of_its_own(kinds: Any, ranks: int, be_rank: Any) -> None:
    """Two key and value heads: four ranks hold each of them twice."""
    rows = {"q_proj": HEADS * HEAD, "k_proj": 2 * HEAD, "v_proj": 2 * HEAD}
    checkpoint = Checkpoint(**{name: (rows[name], kind) for name, kind in zip(rows, kinds, strict=True)})
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = checkpoint.load("qkv_proj", linear.QKVParallelLinear, WIDTH, HEAD, HEADS, 2, bias=False)
        q, k, v = checkpoint.weights.values()
        shared = min(ranks, 2)
        held = [q.chunk(ranks)[rank], *(w.chunk(shared)[rank * shared // ranks] for w in (k, v))]
        assert torch.equal(weight_of(layer), torch.cat(held))


@pytest.mark.parametrize("ranks", [1, 3])
def test_gate_and_up(ranks: int, be_rank: Any) -> None:
    checkpoint = Checkpoint(gate_proj=(30, GROUPS), up_proj=(30, OUTLIERS))
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = checkpoint.load("gate_up_proj", linear.MergedColumnParallelLinear, WIDTH, [30, 30], bias=False)
        expected = torch.cat([weight.chunk(ranks)[rank] for weight in checkpoint.weights.values()])
        assert torch.equal(weight_of(layer), expected)


@pytest.mark.parametrize("kind", [PLAIN, GROUPS, UNPACKED, OUTLIERS])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_layers_that_stand_alone(kind: Any, ranks: int, be_rank: Any) -> None:
    checkpoint = Checkpoint(proj=(18, kind))
    whole = checkpoint.weights["proj"]
    for rank in range(ranks):
        be_rank(rank, ranks)
        columns = checkpoint.load("proj", linear.ColumnParallelLinear, WIDTH, 18, bias=False)
        assert torch.equal(weight_of(columns), whole.chunk(ranks)[rank])
        rows = checkpoint.load("proj", linear.RowParallelLinear, WIDTH, 18, bias=False)
        assert torch.equal(weight_of(rows, WIDTH // ranks), whole.chunk(ranks, 1)[rank])
        replicated = checkpoint.load("proj", linear.ReplicatedLinear, WIDTH, 18, bias=False)
        assert torch.equal(weight_of(replicated), whole)


def test_a_bias_is_loaded_and_cut_by_vllm(be_rank: Any) -> None:
    rows = {"q_proj": HEADS * HEAD, "k_proj": 2 * HEAD, "v_proj": 2 * HEAD}
    kind = PLAIN | {"bias": True}
    checkpoint = Checkpoint(**{name: (count, kind) for name, count in rows.items()})
    x = torch.randn(3, WIDTH)
    for rank in range(2):
        be_rank(rank, 2)
        layer = checkpoint.load("qkv_proj", linear.QKVParallelLinear, WIDTH, HEAD, HEADS, 2, bias=True)
        biases = [checkpoint.tensors[f"model.{name}.bias"].chunk(2)[rank] for name in rows]
        expected = functional.linear(x, torch.cat([w.chunk(2)[rank] for w in checkpoint.weights.values()]))
        torch.testing.assert_close(layer(x)[0], expected + torch.cat(biases), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_head_whose_vocabulary_vllm_rounds_up(ranks: int, be_rank: Any) -> None:
    checkpoint = Checkpoint(lm_head=(100, PLAIN))
    for rank in range(ranks):
        be_rank(rank, ranks)
        layer = checkpoint.load("lm_head", vocab_parallel_embedding.ParallelLMHead, 100, WIDTH)
        whole = functional.pad(checkpoint.weights["lm_head"], (0, 0, 0, 28))
        assert torch.equal(weight_of(layer), whole.chunk(ranks)[rank])


def test_layers_that_are_not_quantized_are_vllm_s(be_rank: Any) -> None:
    checkpoint = Checkpoint(proj=(16, PLAIN))
    layer = linear.ReplicatedLinear(WIDTH, 16, bias=False, quant_config=checkpoint.config, prefix="model.other")
    assert type(layer.quant_method) is linear.UnquantizedLinearMethod
    layer = linear.ReplicatedLinear(WIDTH, 16, bias=False, quant_config=checkpoint.config)  # no prefix at all
    assert type(layer.quant_method) is linear.UnquantizedLinearMethod


def test_entries_follow_vllm_s_names_for_the_modules(be_rank: Any) -> None:
    checkpoint = Checkpoint(proj=(16, PLAIN))
    checkpoint.config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    made = linear.ReplicatedLinear(
        WIDTH, 16, bias=False, quant_config=checkpoint.config, prefix="language_model.model.proj"
    )
    assert type(made.quant_method).__name__ == "VptqLinearMethod"


def test_what_cannot_run_is_refused_in_one_line(be_rank: Any) -> None:
    experts = torch.nn.Module()
    checkpoint = Checkpoint(query_key_value=(48, PLAIN), embed=(100, PLAIN))
    config = checkpoint.config
    config.config = dataclasses.replace(
        config.config, layers={**config.config.layers, "model.experts.3.up_proj": LayerConfig(WIDTH, 8, **PLAIN)}
    )
    with pytest.raises(ConfigError, match=r"model\.experts\.3\.up_proj .*cannot run quantized experts.*vptq serve$"):
        config.get_quant_method(experts, "model.experts")
    with pytest.raises(ConfigError, match=r"model\.embed is a quantized embedding"):
        vocab_parallel_embedding.VocabParallelEmbedding(100, WIDTH, quant_config=config, prefix="model.embed")
    with pytest.raises(ConfigError, match=r"model\.query_key_value is stored stacked"):
        checkpoint.load("query_key_value", linear.QKVParallelLinear, WIDTH, 4, 4, bias=False)


def test_a_tied_head_cannot_be_quantized(be_rank: Any) -> None:
    config = Checkpoint(lm_head=(100, PLAIN)).config
    head = vocab_parallel_embedding.ParallelLMHead(100, WIDTH, quant_config=config, prefix="model.lm_head")
    with pytest.raises(ConfigError, match=r"model\.lm_head is quantized, but config\.json ties it"):
        head.tie_weights(vocab_parallel_embedding.VocabParallelEmbedding(100, WIDTH))


def test_a_bias_without_a_place_is_refused(be_rank: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.proj has a bias"):
        Checkpoint(proj=(16, PLAIN | {"bias": True})).load("proj", linear.ReplicatedLinear, WIDTH, 16, bias=False)


def test_a_missing_tensor_is_named(be_rank: Any) -> None:
    checkpoint = Checkpoint(proj=(16, GROUPS))
    del checkpoint.tensors["model.proj.perm"]
    with pytest.raises(CheckpointError, match=r"model\.proj: tensor perm is missing"):
        checkpoint.load("proj", linear.ReplicatedLinear, WIDTH, 16, bias=False)


def test_the_loader_may_use_its_memory_again(be_rank: Any) -> None:
    checkpoint = Checkpoint(proj=(16, GROUPS))
    expected = checkpoint.weights["proj"].clone()
    layer = checkpoint.load("proj", linear.ReplicatedLinear, WIDTH, 16, bias=False)
    for tensor in checkpoint.tensors.values():
        tensor.zero_()
    assert torch.equal(weight_of(layer), expected)
