"""Weights survive storing, whatever carried their indices; stored layers that contradict their config are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from random_layers import FLOATS, layer_configs, random_weight

from vptq import reference
from vptq.config import LayerConfig
from vptq.errors import CheckpointError, ConfigError
from vptq.weight import QuantizedWeight, check_stored, normalize


def equal(one: QuantizedWeight, other: QuantizedWeight) -> bool:
    """Whether two weights hold the same config and the same numbers."""
    pairs = ((getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@given(layer_configs())
def test_storing_round_trips(config: LayerConfig) -> None:
    weight = random_weight(config)
    assert equal(QuantizedWeight.from_tensors(config, weight.to_tensors(torch.float16)), weight)


@given(layer_configs())
def test_carriers_of_every_version_mean_the_same(config: LayerConfig) -> None:
    weight = random_weight(config)
    stored = weight.to_tensors(torch.float16)
    for carrier in (torch.uint16, torch.float16):
        legacy = {
            name: tensor.view(carrier) if tensor.dtype == torch.int16 else tensor for name, tensor in stored.items()
        }
        assert equal(QuantizedWeight.from_tensors(config, legacy), weight)
        normal = normalize(config, legacy, torch.float16)
        assert all(torch.equal(normal[name], tensor) for name, tensor in stored.items())
        assert all(normal[name].dtype == tensor.dtype for name, tensor in stored.items())


@given(layer_configs())
def test_absorbing_the_permutation_keeps_the_matrix(config: LayerConfig) -> None:
    weight = random_weight(config)
    absorbed = weight.absorb_perm()
    free = config.num_groups == 1 and not config.has_outliers
    assert absorbed.config.enable_perm == (config.enable_perm and not free)
    assert (absorbed is weight) == (not config.enable_perm or not free)
    assert torch.equal(*(reference.dequantize(w.config, w.to_tensors(torch.float16)) for w in (weight, absorbed)))


def test_absorbing_reorders_both_stages() -> None:
    config = LayerConfig(9, 8, vector_len=4, num_centroids=16, num_residual_centroids=8, enable_perm=True)
    weight = random_weight(config)
    absorbed = weight.absorb_perm()
    for name in ("indices", "residual_indices"):
        assert torch.equal(getattr(absorbed, name)[..., weight.perm], getattr(weight, name))


@given(layer_configs())
def test_dequantizing_is_the_definition(config: LayerConfig) -> None:
    """Element by element, from the format's formula, in float32 (where nothing rounds visibly)."""
    assume(config.in_features * config.out_features < 1500)
    w = random_weight(config, torch.float32)
    dense = reference.dequantize(config, w.to_tensors(torch.float32))
    for row in range(config.out_features):
        for position in range(config.in_features):
            p = position - config.outlier_size
            if p < 0:
                r, e = divmod(row, config.outlier_vector_len)
                value = w.outlier_codebook[w.outlier_indices[r, position], e]  # type: ignore[index]
            else:
                (g, j), (r, e) = divmod(p, config.group_size), divmod(row, config.vector_len)
                value = w.codebook[g, w.indices[g, r, j], e]
                if w.residual_codebook is not None:
                    value = value + w.residual_codebook[g, w.residual_indices[g, r, j], e]  # type: ignore[index]
            column = position if w.perm is None else int(w.perm[position])
            if w.weight_scale is not None:
                value = value * w.weight_scale[column] + w.weight_bias[column]  # type: ignore[index]
            assert dense[row, column] == value


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_stored_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    config = LayerConfig(8, 8, vector_len=4, num_centroids=16, enable_norm=True, bias=True)
    stored = random_weight(config, torch.float32).to_tensors(dtype)
    assert {tensor.dtype for name, tensor in stored.items() if name != "indices"} == {dtype}


@pytest.mark.parametrize("shape", [(1, 15, 4), (2, 16, 4), (1, 16, 2)])
def test_a_weight_that_contradicts_its_config_is_not_stored(shape: tuple[int, ...]) -> None:
    weight = random_weight(LayerConfig(8, 8, vector_len=4, num_centroids=16))
    weight.codebook = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=r"centroids\.weight has shape"):
        weight.to_tensors(torch.float16)


def test_an_index_beyond_the_codebook_is_not_stored() -> None:
    weight = random_weight(LayerConfig(8, 8, vector_len=4, num_centroids=16))
    weight.indices[0, 0, 0] = 16
    with pytest.raises(ConfigError, match="main index is 16"):
        weight.to_tensors(torch.float16)


FULL = LayerConfig(
    35,
    22,
    vector_len=8,
    num_centroids=100,
    num_residual_centroids=40,
    num_groups=2,
    outlier_size=3,
    outlier_vector_len=4,
    outlier_num_centroids=10,
    enable_norm=True,
    enable_perm=True,
    is_packed=False,
    bias=True,
)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", list(random_weight(FULL).to_tensors(torch.float16)))
def test_missing_misshapen_and_mistyped_tensors_are_named(name: str, packed: bool) -> None:
    sizes = (128, 64) if packed else (100, 40)
    config = dataclasses.replace(FULL, is_packed=packed, num_centroids=sizes[0], num_residual_centroids=sizes[1])
    stored = random_weight(config).to_tensors(torch.float16)
    if name not in stored:
        assert packed
        assert name == "res_indices"
        return
    tensor = stored[name]
    for damaged, said in [
        ({}, f"tensor {name} is missing"),
        ({name: tensor[..., 1:]}, rf"{name} has shape \(.*\); its quantization_config entry means"),
        ({name: tensor.to(torch.float64)}, f"{name} is torch.float64; it must be one of"),
        ({name: tensor.to(torch.bool)}, f"{name} is torch.bool"),
        ({name: tensor, "inv_perm": tensor}, "tensor inv_perm is there"),
    ]:
        rest = {key: value for key, value in stored.items() if key != name}
        meta = {key: value.to("meta") for key, value in (rest | damaged).items()}
        with pytest.raises(CheckpointError, match=f"^a.b: {said}") as caught:
            check_stored(config, meta, "a.b")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("indices", 100, r"indices holds 100; its codebook has entries 0\.\.99"),
        ("indices", -1, r"indices holds 65535"),
        ("res_indices", 40, r"res_indices holds 40"),
        ("outlier_indices", 10, r"outlier_indices holds 10"),
        ("perm", 35, "perm is not a permutation of the 35 input columns"),
        ("perm", 0, "perm is not a permutation"),
    ],
)
def test_indices_out_of_range_are_named(name: str, value: int, said: str) -> None:
    stored = random_weight(FULL).to_tensors(torch.float16)
    flat = stored[name].view(-1)
    flat[int(flat[0] == 0)] = value
    if name == "perm" and value == 0:
        flat[:2] = 0
    with pytest.raises(CheckpointError, match=f"^a.b: {said}"):
        QuantizedWeight.from_tensors(FULL, stored, where="a.b")
