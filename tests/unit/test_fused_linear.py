"""Stacked and shared layers compute what the stored layers compute, and refuse what does not belong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from random_layers import random_weight
from torch.nn import functional

from vptq.config import LayerConfig
from vptq.errors import CheckpointError, ConfigError
from vptq.integrations.fused_linear import FusedLinear, Span, StoredLayer
from vptq.linear import VQuantLinear

OUTLIERS = {"outlier_size": 4, "outlier_vector_len": 4, "outlier_num_centroids": 16}
KINDS: tuple[dict[str, Any], ...] = (
    {"vector_len": 8, "num_centroids": 64, "num_residual_centroids": 8},
    {"vector_len": 6, "num_centroids": 16, "num_groups": 3, "enable_perm": True, "enable_norm": True},
    {"vector_len": 3, "num_centroids": 30, "is_packed": False, "enable_perm": True},
    {"vector_len": 8, "num_centroids": 16, "enable_perm": True, "enable_norm": True, **OUTLIERS},
    {
        "vector_len": 4,
        "num_centroids": 16,
        "num_residual_centroids": 4,
        "num_groups": 2,
        "enable_perm": True,
        **OUTLIERS,
    },
)
DENSE = "dense"
WIDTH = 48


class Checkpoint:
    """Stored layers with random tensors, and the dense weights they mean."""

    def __init__(self, *layers: tuple[int, Any], width: int = WIDTH, dtype: torch.dtype = torch.float32) -> None:
        self.width, self.stored, self.tensors, self.weights = width, [], [], []
        for number, (rows, kind) in enumerate(layers):
            if kind == DENSE:
                weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(number)).to(dtype)
                config, tensors = None, {"weight": weight}
            else:
                config = LayerConfig(width, rows, **kind)
                tensors = random_weight(config, dtype, seed=number).to_tensors(dtype)
                weight = VQuantLinear.from_tensors(config, tensors).dequantize()
            self.stored.append(StoredLayer(f"layer.{number}", config))
            self.tensors.append(tensors)
            self.weights.append(weight)

    def linear(self, rows: list[Span], columns: Span | None = None, dtype: torch.dtype = torch.float32) -> FusedLinear:
        linear = FusedLinear(self.stored, columns or Span(0, self.width, self.width), rows, dtype)
        for number in reversed(range(len(self.stored))):  # in whatever order files have them
            for name, tensor in self.tensors[number].items():
                linear.receive(number, name, tensor.clone())
        linear.check_complete()
        return linear


def full(*sizes: int) -> list[Span]:
    return [Span(0, size, size) for size in sizes]


def part(size: int, rank: int, ranks: int) -> Span:
    return Span(rank * size // ranks, (rank + 1) * size // ranks, size)


def inputs(width: int, tokens: int = 3) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(99))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_of_every_kind_and_a_dense_one_are_stacked() -> None:
    sizes = [24, 17, 12, 10, 16, 9]
    checkpoint = Checkpoint(*zip(sizes, (*KINDS, DENSE), strict=True))
    x, bias = inputs(WIDTH), torch.randn(sum(sizes))
    expected = functional.linear(x, torch.cat(checkpoint.weights), bias)
    close(checkpoint.linear(full(*sizes))(x, bias), expected)
    close(checkpoint.linear(full(*sizes))(x.view(1, 3, 1, WIDTH))[0, :, 0], expected - bias)


def test_on_one_device_tensors_stay_as_they_were_stored() -> None:
    checkpoint = Checkpoint((24, KINDS[1]))
    linear = FusedLinear(checkpoint.stored, Span(0, WIDTH, WIDTH), full(24), torch.float32)
    for name, tensor in checkpoint.tensors[0].items():
        linear.receive(0, name, tensor)
    held = {parameter.data_ptr() for parameter in linear.parameters()}
    assert held == {tensor.data_ptr() for tensor in checkpoint.tensors[0].values()}


@pytest.mark.parametrize("kind", [*KINDS, DENSE])
@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_cut_among_devices_are_exactly_those_of_the_whole(kind: Any, ranks: int) -> None:
    """The same numbers: a device computes a row by the same weights, wherever the cut falls between vectors."""
    sizes, wanted = [42, 30], []
    checkpoint = Checkpoint((42, kind), (30, DENSE))
    for rank in range(ranks):
        linear = checkpoint.linear([part(size, rank, ranks) for size in sizes])
        wanted.append(linear(torch.eye(WIDTH)).T)
        held = [slice(span.start, span.stop) for span in linear.rows]
        bias = torch.arange(float(sum(sizes) // ranks))
        close(linear(torch.eye(WIDTH), bias), wanted[-1].T + bias)
        assert torch.equal(wanted[-1], torch.cat([w[rows] for w, rows in zip(checkpoint.weights, held, strict=True)]))


@pytest.mark.parametrize("kind", [*KINDS, DENSE])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_columns_cut_among_devices_are_exactly_those_of_the_whole(kind: Any, ranks: int) -> None:
    checkpoint = Checkpoint((20, kind))
    found = [
        checkpoint.linear(full(20), part(WIDTH, rank, ranks))(torch.eye(WIDTH // ranks)).T for rank in range(ranks)
    ]
    assert torch.equal(torch.cat(found, 1), checkpoint.weights[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_that_is_stored_stacked_is_cut_part_by_part(ranks: int) -> None:
    sizes = (24, 12, 12)
    checkpoint = Checkpoint((48, KINDS[0]))
    whole = dict(zip("qkv", torch.split(checkpoint.weights[0], sizes), strict=True))
    for rank in range(ranks):
        linear = checkpoint.linear([part(size, rank, ranks) for size in sizes])
        assert len(linear.pieces) == (1 if ranks == 1 else 3)
        expected = torch.cat([weight.chunk(ranks)[rank] for weight in whole.values()])
        assert torch.equal(linear(torch.eye(WIDTH)).T, expected)


@pytest.mark.parametrize("kind", [KINDS[0], DENSE])
def test_a_vocabulary_that_was_rounded_up_has_zeros_at_its_end(kind: Any) -> None:
    checkpoint = Checkpoint((50, kind))
    for start, stop in ((0, 32), (32, 50)):
        linear = checkpoint.linear([Span(start, stop, 50, missing=32 - (stop - start))])
        bias = torch.ones(32)
        expected = functional.pad(checkpoint.weights[0][start:stop], (0, 0, 0, 32 - (stop - start)))
        assert torch.equal(linear(torch.eye(WIDTH)).T, expected)
        close(linear(torch.eye(WIDTH), bias).T, expected + 1)


def test_layers_that_are_alike_run_by_one_operator_and_others_do_not() -> None:
    sizes = (24, 16, 8)
    x, bias = inputs(WIDTH, 5).view(1, 5, WIDTH), torch.randn(48)
    alike = Checkpoint(*((size, KINDS[0]) for size in sizes)).linear(full(*sizes))
    assert alike._is_one_launch
    assert torch.equal(alike._launch_once(x, list(sizes), bias.split(sizes)), alike(x, bias))
    assert not Checkpoint((24, KINDS[0]), (16, KINDS[1])).linear(full(24, 16))._is_one_launch
    assert not Checkpoint((24, KINDS[0]), (16, DENSE)).linear(full(24, 16))._is_one_launch
    assert not Checkpoint((24, KINDS[0])).linear(full(24))._is_one_launch
    cut_in_vectors = Checkpoint((24, KINDS[0]), (24, KINDS[0])).linear([Span(12, 24, 24), Span(12, 24, 24)])
    assert not cut_in_vectors._is_one_launch, "each has outputs to drop"


def test_it_compiles_without_a_graph_break_for_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Checkpoint((24, KINDS[0]), (16, KINDS[1]), (8, DENSE)).linear([part(size, 1, 2) for size in (24, 16, 8)])
    alike = Checkpoint((24, KINDS[0]), (16, KINDS[0])).linear(full(24, 16))
    for function in (linear, lambda x: alike._launch_once(x, [24, 16], [None, None])):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
        with torch.no_grad():
            for tokens in (2, 5):
                close(compiled(inputs(WIDTH, tokens)), function(inputs(WIDTH, tokens)))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_may_differ_from_the_stored_one(stored: torch.dtype, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint((24, KINDS[3]), (16, DENSE), dtype=stored)
    expected = functional.linear(inputs(WIDTH), torch.cat([weight.float() for weight in checkpoint.weights]))
    for rank in range(2):
        linear = checkpoint.linear([part(24, rank, 2), part(16, rank, 2)], dtype=dtype)
        found = linear(inputs(WIDTH).to(dtype))
        assert found.dtype == dtype
        rows = [*range(12 * rank, 12 * rank + 12), *range(24 + 8 * rank, 32 + 8 * rank)]
        torch.testing.assert_close(found.float(), expected[:, rows], rtol=0.05, atol=0.3)


@pytest.mark.parametrize("kind", [KINDS[0], DENSE])
@pytest.mark.parametrize("ranks", [1, 2])
def test_numbers_that_float16_has_not_are_refused(kind: Any, ranks: int) -> None:
    checkpoint = Checkpoint((24, kind), dtype=torch.bfloat16)
    checkpoint.tensors[0]["weight" if kind == DENSE else "centroids.weight"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"layer\.0.*beyond float16's 65504; run the model in bfloat16"):
        checkpoint.linear([part(24, 0, ranks)], dtype=torch.float16)


def test_what_is_stored_decides_whether_a_layer_is_dense() -> None:
    """An entry that is shared by the end of a name may cover a layer that was left dense."""
    checkpoint = Checkpoint((24, DENSE), (16, KINDS[1]))
    checkpoint.stored[0] = dataclasses.replace(checkpoint.stored[0], config=LayerConfig(WIDTH, 24, **KINDS[0]))
    linear = checkpoint.linear(full(24, 16))
    assert torch.equal(linear(torch.eye(WIDTH)).T, torch.cat(checkpoint.weights))


def test_shapes_that_are_not_the_model_s_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer\.0 has a weight of shape \(24, 48\); the model's is \(32, 48\)"):
        Checkpoint((24, KINDS[0])).linear(full(32))
    with pytest.raises(ConfigError, match=r"layer\.0 has a weight of shape \(24, 48\); the model's is \(24, 64\)"):
        Checkpoint((24, DENSE)).linear(full(24), Span(0, 32, 64))
    with pytest.raises(ConfigError, match=r"layer\.0: 2 stored layers make up 3 parts"):
        Checkpoint((24, DENSE), (24, DENSE)).linear(full(24, 12, 12))


def test_a_tensor_that_did_not_come_is_missed_by_name() -> None:
    checkpoint = Checkpoint((24, KINDS[1]), (16, DENSE))
    del checkpoint.tensors[0]["weight_scale"]
    with pytest.raises(CheckpointError, match=r"layer\.0: tensor weight_scale is missing"):
        checkpoint.linear(full(24, 16))
    checkpoint = Checkpoint((24, KINDS[1]), (16, DENSE))
    checkpoint.tensors[1].clear()
    with pytest.raises(CheckpointError, match=r"layer\.1: tensor weight is missing"):
        checkpoint.linear(full(24, 16))


def test_a_tensor_that_does_not_belong_is_refused_by_name() -> None:
    checkpoint = Checkpoint((24, KINDS[0]), (16, DENSE))
    checkpoint.tensors[0]["perm"] = torch.arange(WIDTH)
    with pytest.raises(CheckpointError, match=r"layer\.0.* tensor perm"):
        checkpoint.linear(full(24, 16))
    checkpoint = Checkpoint((24, KINDS[0]), (16, DENSE))
    checkpoint.tensors[1]["indices"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"layer\.1 .*no entry"):
        checkpoint.linear(full(24, 16))


@pytest.mark.parametrize("lacking", ["", "indices"])
def test_a_layer_that_is_stored_dense_and_quantized_is_refused(lacking: str) -> None:
    checkpoint = Checkpoint((24, KINDS[0]))
    checkpoint.tensors[0].pop(lacking, None)
    checkpoint.tensors[0]["weight"] = torch.zeros(24, WIDTH)
    with pytest.raises(CheckpointError, match=r"layer\.0 is stored twice, dense and quantized"):
        checkpoint.linear(full(24))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_index_is_refused_with_the_layer_s_name(ranks: int) -> None:
    checkpoint = Checkpoint((24, KINDS[2]))
    checkpoint.tensors[0]["indices"][0, 0, 0] = 30
    with pytest.raises(CheckpointError, match=r"layer\.0: indices holds 30; its codebook has entries 0\.\.29"):
        checkpoint.linear([part(24, 0, ranks)])


@pytest.mark.parametrize("ranks", [1, 2])
def test_made_up_tensors_run(ranks: int) -> None:
    sizes = (24, 16, 8)
    stored = Checkpoint((24, KINDS[3]), (16, KINDS[2]), (8, DENSE)).stored
    linear = FusedLinear(stored, Span(0, WIDTH, WIDTH), [part(size, 0, ranks) for size in sizes], torch.float32)
    linear.fill_missing(torch.device("cpu"))
    linear.check_complete()
    assert linear(inputs(WIDTH)).shape == (3, 48 // ranks)
