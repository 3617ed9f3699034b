"""Parts of a quantized weight hold exactly the numbers of the whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import layer_configs, random_weight

from vptq.config import LayerConfig
from vptq.integrations.cutting import cut_columns, cut_rows
from vptq.linear import VQuantLinear
from vptq.weight import QuantizedWeight


def dense(weight: QuantizedWeight) -> torch.Tensor:
    """Through the layer, packing included: whatever is cut must be a layer that can be stored and run."""
    return VQuantLinear.from_weight(weight, torch.float16).dequantize()


def whole(config: LayerConfig) -> QuantizedWeight:
    return random_weight(dataclasses.replace(config, bias=False))


def spans(length: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, length - 1), st.integers(1, length)).filter(lambda span: span[0] < span[1])


@given(layer_configs(), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_the_whole(config: LayerConfig, data: st.DataObject) -> None:
    weight = whole(config)
    start, stop = data.draw(spans(config.out_features))
    part, surplus = cut_rows(weight, start, stop)
    assert torch.equal(dense(part)[surplus:], dense(weight)[start:stop])


@given(layer_configs(), st.data())
@settings(max_examples=120, deadline=None)
def test_columns_are_those_of_the_whole(config: LayerConfig, data: st.DataObject) -> None:
    weight = whole(config)
    start, stop = data.draw(spans(config.in_features))
    part, zeros = cut_columns(weight, start, stop)
    assert part.config.in_features == stop - start + zeros
    assert torch.equal(dense(part)[:, : stop - start], dense(weight)[:, start:stop])


def test_a_cut_between_vectors_and_groups_adds_nothing() -> None:
    weight = whole(LayerConfig(32, 24, 4, 16, num_groups=4, outlier_vector_len=0))
    part, surplus = cut_rows(weight, 8, 20)
    assert (surplus, part.config.out_features) == (0, 12)
    part, zeros = cut_columns(weight, 8, 24)
    assert (zeros, part.config.num_groups, part.config.enable_perm) == (0, 2, False)
    assert torch.equal(part.codebook, weight.codebook[1:3])


def test_one_codebook_for_all_columns_needs_no_permutation_afterwards() -> None:
    part, zeros = cut_columns(whole(LayerConfig(32, 8, 4, 16, enable_perm=True)), 8, 24)
    assert (zeros, part.config.enable_perm, part.perm) == (0, False, None)


@pytest.mark.parametrize("columns", [(0, 2), (2, 6)])
def test_outliers_without_others_and_others_without_outliers(columns: tuple[int, int]) -> None:
    kind = {"outlier_size": 2, "outlier_vector_len": 2, "outlier_num_centroids": 3}
    weight = whole(LayerConfig(6, 8, 4, 16, **kind))
    part, zeros = cut_columns(weight, *columns)
    assert part.config.has_outliers == (columns == (0, 2))
    assert zeros == (1 if columns == (0, 2) else 0), "a layer has at least one column that is no outlier"
    assert torch.equal(dense(part)[:, : columns[1] - columns[0]], dense(weight)[:, slice(*columns)])
