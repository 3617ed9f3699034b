"""Spec names: the published ones are read, ours round-trip, everything else is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vptq.errors import ConfigError
from vptq.spec import VECTOR_LENGTHS, QuantSpec, spec_for_bits


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    power = st.integers(1, 16).map(lambda bits: 2**bits)
    outliers = draw(st.booleans())
    return QuantSpec(
        vector_len=draw(st.sampled_from(VECTOR_LENGTHS)),
        num_centroids=draw(power),
        num_residual_centroids=draw(st.one_of(st.just(0), power)),
        num_groups=draw(st.integers(1, 16)),
        outlier_percent=draw(st.integers(1, 9999)) / 100 if outliers else 0.0,
        outlier_vector_len=draw(st.sampled_from(VECTOR_LENGTHS)) if outliers else 4,
        outlier_num_centroids=draw(power) if outliers else 0,
    )


@given(specs())
def test_names_round_trip(spec: QuantSpec) -> None:
    assert QuantSpec.parse(spec.name) == spec


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("v8-k65536-256", "v8-k65536-256"),
        ("v8-k65536-0", "v8-k65536"),
        ("Meta-Llama-3.1-70B-Instruct-v8-k65536-256-woft", "v8-k65536-256"),
        ("VPTQ-community/Meta-Llama-3.1-405B-Instruct-v16-k65536-1024-woft", "v16-k65536-1024"),
        ("Mistral-7B-Instruct-v0.3-v12-k4096-4096-woft/", "v12-k4096-4096"),
        ("models/v4-k256-g2", "v4-k256-g2"),
        ("v8-k4096-256-g4-o0.5x256v4", "v8-k4096-256-g4-o0.5x256v4"),
    ],
)
def test_published_and_own_names(text: str, name: str) -> None:
    assert QuantSpec.parse(text).name == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a quantization spec"),
        ("llama", "is not a quantization spec"),
        ("v8", "is not a quantization spec"),
        ("v8-k4096-g", "is not a quantization spec"),
        ("v8-k4096-256-512", "is not a quantization spec"),
        ("v8-k4096-256-extra", "is not a quantization spec"),
        ("xv8-k4096", "is not a quantization spec"),
        ("v8-k4000", "main codebook has 4000 entries"),
        ("v8-k131072", "main codebook has 131072 entries"),
        ("v8-k1", "main codebook has 1 entries"),
        ("v8-k4096-100", "residual codebook has 100 entries"),
        ("v7-k4096", "vector length is 7, which no kernel takes"),
        ("v1-k256", "vector length is 1"),
        ("v8-k4096-g0", "0 groups"),
        ("v8-k4096-o0x256v4", "outlier percent is 0"),
        ("v8-k4096-o100x256v4", "outlier percent is 100"),
        ("v8-k4096-o1x100v4", "outlier codebook has 100 entries"),
        ("v8-k4096-o1x256v5", "outlier vector length is 5"),
    ],
)
def test_refusals(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        QuantSpec.parse(text)
    assert "\n" not in str(caught.value)


@given(specs(), st.integers(1, 3000), st.integers(1, 300))
def test_layers_cover_all_columns(spec: QuantSpec, in_features: int, out_features: int) -> None:
    try:
        layer = spec.for_layer(in_features, out_features, bias=True)
    except ConfigError:
        # Too few columns for the groups; or columns left over, and no outliers to take them.
        left = math.floor(in_features * (1 - spec.outlier_percent / 100))
        assert left < spec.num_groups or (not spec.outlier_num_centroids and in_features % spec.num_groups)
        return
    assert layer.outlier_size + layer.num_groups * layer.group_size == in_features
    if spec.outlier_num_centroids:
        percent = 100 * layer.outlier_size / in_features
        assert spec.outlier_percent <= percent + 1e-9
        assert layer.outlier_size < spec.outlier_percent * in_features / 100 + spec.num_groups
    else:
        assert not layer.has_outliers
    assert layer.bias


def test_index_bits_are_those_of_the_published_names() -> None:
    bits = {"v8-k65536-256": 3, "v8-k65536": 2, "v16-k65536-65536": 2, "v6-k4096": 2, "v8-k256-256": 2, "v4-k64-64": 3}
    assert {name: QuantSpec.parse(name).index_bits_per_weight for name in bits} == bits


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 3.5, 4])
@pytest.mark.parametrize("weights", [None, 576 * 576, 4096 * 4096, 8192 * 28672])
def test_spec_for_bits_keeps_its_promise(bits: float, weights: int | None) -> None:
    spec = spec_for_bits(bits, weights)
    assert spec.index_bits_per_weight == bits
    if weights is not None:
        side = round(weights**0.5)
        assert spec.for_layer(side, side).bits_per_weight < bits * 1.15 + 0.1


def test_larger_layers_get_larger_codebooks() -> None:
    sizes = [spec_for_bits(2, weights).num_centroids for weights in (10**5, 10**7, 10**9)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert spec_for_bits(3).name == "v8-k65536-256"


def test_unknown_bits() -> None:
    with pytest.raises(ConfigError, match=r"no spec for 2\.2 bits; choose one of 1, 1\.5"):
        spec_for_bits(2.2)
