"""Layer and model configs: every dialect is read, one is written, contradictions are refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from random_layers import FLOATS, layer_configs, random_weight

from vptq.config import LayerConfig, QuantConfig, tensor_specs
from vptq.errors import ConfigError

WRITTEN_KEYS = [
    "in_features",
    "out_features",
    "vector_lens",
    "num_centroids",
    "num_res_centroids",
    "group_num",
    "group_size",
    "outlier_size",
    "indices_as_float",
    "enable_norm",
    "enable_perm",
    "is_indice_packed",
    "bias",
]


def entry(**changes: Any) -> dict[str, Any]:
    """A valid on-disk entry with some keys changed, or left out where the change is `...`."""
    base = LayerConfig(64, 48, vector_len=8, num_centroids=256, num_residual_centroids=16).to_entry() | changes
    return {key: value for key, value in base.items() if value is not ...}


@given(layer_configs())
def test_entry_round_trip_writes_exactly_the_published_keys(config: LayerConfig) -> None:
    written = config.to_entry()
    assert list(written) == WRITTEN_KEYS
    assert LayerConfig.from_entry(written) == config


@given(layer_configs())
def test_tensor_specs_describe_what_is_stored(config: LayerConfig) -> None:
    stored = random_weight(config).to_tensors(torch.float16)
    specs = tensor_specs(config, torch.float16)
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in specs.items()
    }
    bits = sum(tensor.nbytes * 8 for name, tensor in stored.items() if name != "bias")
    assert config.stored_bits == bits
    assert config.bits_per_weight == bits / (config.in_features * config.out_features)


@pytest.mark.parametrize("is_packed", [True, False])
def test_tensor_specs_of_the_format(is_packed: bool) -> None:
    """The table of the format's documentation, for one layer that has everything."""
    config = LayerConfig(
        100,
        50,
        vector_len=8,
        num_centroids=256,
        num_residual_centroids=16,
        num_groups=3,
        outlier_size=10,
        outlier_vector_len=4,
        outlier_num_centroids=64,
        enable_norm=True,
        enable_perm=True,
        is_packed=is_packed,
        bias=True,
    )
    expected = {
        "centroids.weight": ((3, 256 * 8), torch.bfloat16),
        "res_centroids.weight": ((3, 16 * 8), torch.bfloat16),
        "outlier_centroids.weight": ((1, 64 * 4), torch.bfloat16),
        "outlier_indices": ((1, 13, 10), torch.int16),
        "weight_scale": ((100,), torch.bfloat16),
        "weight_bias": ((100,), torch.bfloat16),
        "bias": ((50,), torch.bfloat16),
    }
    if is_packed:
        expected |= {"indices": ((3, 7, 12), torch.int32), "perm": ((100,), torch.int16)}  # 30 * 12 bits: 12 words
    else:
        expected |= {"indices": ((3, 7, 30), torch.int16), "res_indices": ((3, 7, 30), torch.int16)}
        expected |= {"perm": ((100,), torch.int64)}
    specs = tensor_specs(config, torch.bfloat16)
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == expected


def test_float_dtypes() -> None:
    config = LayerConfig(8, 8, vector_len=8, num_centroids=4)
    for dtype in FLOATS:
        assert tensor_specs(config, dtype)["centroids.weight"].dtype == dtype
    with pytest.raises(ConfigError, match="float64"):
        tensor_specs(config, torch.float64)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"num_res_centroids": [-1, 0]}, {"num_res_centroids": [-1, -1]}),
        ({"num_res_centroids": [0, 16]}, {}),
        ({"indices_as_float": None}, {}),
        ({"enable_norm": ..., "enable_perm": ..., "bias": ...}, {}),
        ({"is_indice_packed": 1}, {}),
        ({"is_indice_packed": ...}, {"is_indice_packed": False}),
        ({"group_size": -1}, {}),
        ({"group_size": ..., "group_num": ..., "outlier_size": ...}, {}),
        ({"enable_proxy_error": True, "norm_dim": 0, "vector_quant_dim": "out", "made_up": {}}, {}),
        ({"norm_dim": 1}, {}),  # without norm it has no meaning
        # Outliers are off without their codebook, whatever the other two keys say.
        ({"vector_lens": [4, 8], "outlier_size": 5}, {}),
        ({"vector_lens": [1, 8], "num_centroids": [16, 256]}, {}),
    ],
)
def test_dialects(changes: dict[str, Any], same: dict[str, Any]) -> None:
    assert LayerConfig.from_entry(entry(**changes)) == LayerConfig.from_entry(entry(**same))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vector_lens": ...}, "vector_lens"),
        ({"vector_lens": [8]}, "vector_lens"),
        ({"vector_lens": [-1, 8.0]}, "vector_lens"),
        ({"vector_lens": [-1, 0]}, "vector_len is 0"),
        ({"num_centroids": [-1, 257]}, "num_centroids is 257.*power of two"),
        ({"num_centroids": [-1, 131072]}, "num_centroids is 131072"),
        ({"num_centroids": [-1, 1]}, "power of two"),
        ({"num_res_centroids": [-1, 1]}, "num_residual_centroids is 1"),
        ({"vector_lens": [4, 8], "num_centroids": [16, 256], "num_res_centroids": [16, 16]}, "outliers cannot have"),
        ({"vector_lens": [4, 8], "num_centroids": [16, 256]}, "outlier_size 0"),
        ({"group_num": 0}, "num_groups is 0"),
        ({"group_num": 3, "group_size": 21}, "cover 63 of 64"),
        ({"group_num": 3, "group_size": -1}, "cover 63 of 64"),
        ({"group_num": "1"}, "group_num is '1'"),
        ({"bias": "yes"}, "bias is 'yes'"),
        ({"in_features": ...}, "in_features is missing"),
        ({"in_features": 64.0}, "in_features is 64.0"),
        ({"vector_quant_dim": "in"}, "vector_quant_dim"),
        ({"enable_norm": True, "norm_dim": 1}, "norm_dim is 1"),
        ({"in_features": 70000, "group_size": 70000, "enable_perm": True}, "in_features is 70000"),
    ],
)
def test_refusals_name_the_layer_and_the_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.q_proj: .*{said}") as caught:
        LayerConfig.from_entry(entry(**changes), where="model.q_proj")
    assert "\n" not in str(caught.value)


def test_features_come_from_the_entry_or_the_module() -> None:
    bare = entry(in_features=..., out_features=-1)
    assert LayerConfig.from_entry(bare, in_features=64, out_features=48) == LayerConfig.from_entry(entry())
    with pytest.raises(ConfigError, match="in_features is 64, but the model's linear layer has 32"):
        LayerConfig.from_entry(entry(), in_features=32)


@pytest.mark.parametrize("count", [1, 3, 256, 257, 65535])
def test_unpacked_codebooks_need_no_power_of_two(count: int) -> None:
    config = LayerConfig(8, 8, vector_len=2, num_centroids=count, is_packed=False)
    assert 2**config.index_bits >= count > 2 ** (config.index_bits - 1) - 1


def test_known_bit_counts() -> None:
    # 4096 x 4096, v8-k65536: 2 bits of indices and a 1 MiB codebook, (2 * 2**24 + 2**23) / 2**24.
    assert LayerConfig(4096, 4096, vector_len=8, num_centroids=65536).bits_per_weight == 2.5
    packed = LayerConfig(100, 64, vector_len=8, num_centroids=8192)
    assert (packed.row_words, packed.num_vectors) == (41, 8)  # 1300 bits


def test_model_config_round_trip_and_lookup() -> None:
    small, large = LayerConfig(8, 8, vector_len=8, num_centroids=4), LayerConfig(8, 8, vector_len=8, num_centroids=16)
    config = QuantConfig({"model.layers.0.q_proj": large}, {"q_proj": small}, modules_to_not_convert=("lm_head",))
    written = config.to_dict()
    assert list(written) == [
        "quant_method",
        "config_for_layers",
        "shared_layer_config",
        "modules_to_not_convert",
        "enable_proxy_error",
    ]
    assert QuantConfig.from_dict(written) == config
    assert config.layer_for("model.layers.0.q_proj") == large
    assert config.layer_for("model.layers.1.q_proj") == small
    assert config.layer_for("q_proj") == small
    assert config.layer_for("model.layers.1.k_proj") is None


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "quant_method is None"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "vptq", "config_for_layers": []}, None),
        ({"quant_method": "vptq", "config_for_layers": [1]}, "config_for_layers is a list"),
        ({"quant_method": "vptq", "config_for_layers": {"a.b": 3}}, r"config_for_layers\['a.b'\]: the entry is a int"),
        ({"quant_method": "vptq", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
    ],
)
def test_model_config_refusals(data: dict[str, Any], said: str | None) -> None:
    if said is None:
        assert QuantConfig.from_dict(data) == QuantConfig()
        return
    with pytest.raises(ConfigError, match=said):
        QuantConfig.from_dict(data)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LayerConfig(8, 8, vector_len=8, num_centroids=4).bias = True  # type: ignore[misc]
