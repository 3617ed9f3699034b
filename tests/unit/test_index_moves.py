"""Moves of indices along a gradient: they lower what they should lower, and nothing else changes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_layers import layer_configs, random_weight
from torch import Tensor

from vptq import reference
from vptq.config import LayerConfig
from vptq.quantize import index_moves
from vptq.quantize.index_moves import Moves, best_of, differing, move, propose, spacing_of, vectors_of
from vptq.quantize.segments import segments_of
from vptq.weight import QuantizedWeight, check_indices

PLAIN = LayerConfig(in_features=12, out_features=24, vector_len=2, num_centroids=64)
OUTLIERS = {"outlier_size": 3, "outlier_vector_len": 4, "outlier_num_centroids": 32, "group_size": 9}
FORMATS = {
    "one codebook": PLAIN,
    "residual": dataclasses.replace(PLAIN, num_residual_centroids=8),
    "groups": dataclasses.replace(PLAIN, num_groups=3, group_size=4),
    "outliers": dataclasses.replace(PLAIN, num_residual_centroids=8, **OUTLIERS),
    "permutation": dataclasses.replace(PLAIN, enable_perm=True),
    "normalization": dataclasses.replace(PLAIN, enable_norm=True),
    "padded rows": dataclasses.replace(PLAIN, out_features=23),
    "unpacked": dataclasses.replace(PLAIN, num_centroids=53, num_residual_centroids=7, is_packed=False),
    "all of it": dataclasses.replace(
        PLAIN, out_features=23, num_residual_centroids=8, enable_perm=True, enable_norm=True, bias=True, **OUTLIERS
    ),
}
any_format = pytest.mark.parametrize("config", FORMATS.values(), ids=FORMATS)


def dense(weight: QuantizedWeight) -> Tensor:
    return reference.dequantize(weight.config, weight.to_tensors(torch.float32))


def gradient_for(config: LayerConfig, seed: int = 0) -> Tensor:
    return torch.randn(config.out_features, config.in_features, generator=torch.Generator().manual_seed(seed))


def moved(weight: QuantizedWeight, moves: Moves) -> QuantizedWeight:
    other = copy.deepcopy(weight)
    move(other, moves)
    return other


@any_format
def test_a_quadratic_loss_falls(config: LayerConfig) -> None:
    """|W - T|^2 / 2, whose gradient is W - T: a step no longer than that gradient cannot raise it."""
    weight = random_weight(config, torch.float32)
    goal = dense(weight) + 2 * gradient_for(config)
    moves = propose(weight, dense(weight) - goal, limit=20)
    losses = [float((dense(one) - goal).square().sum() / 2) for one in (weight, moved(weight, moves))]
    assert losses[1] < losses[0]


@any_format
def test_so_many_vectors_move_as_may(config: LayerConfig) -> None:
    weight = random_weight(config, torch.float32)
    everything = propose(weight, gradient_for(config), vectors_of(config))
    assert len(everything) > 5
    for limit in (0, 1, len(everything) - 1):
        few = propose(weight, gradient_for(config), limit)
        assert differing(weight, moved(weight, few)) == len(few) == limit
        assert few.vectors.tolist() == everything.best(limit).vectors.tolist()
        assert bool((few.scores.diff() <= 0).all())


@any_format
def test_vectors_without_a_gradient_stay(config: LayerConfig) -> None:
    weight, gradient = random_weight(config, torch.float32), gradient_for(config)
    gradient[:4] = gradient[:, 1::2] = 0
    moves = propose(weight, gradient, vectors_of(config))
    change = dense(moved(weight, moves)) - dense(weight)
    assert change[4:, ::2].any()
    change[4:, ::2] = 0
    assert not change.any()
    assert len(propose(weight, torch.zeros_like(gradient), 10)) == 0


@given(layer_configs(), st.integers(0, 3))
def test_moves_keep_to_any_format(config: LayerConfig, seed: int) -> None:
    weight, gradient = random_weight(config, torch.float32, seed), gradient_for(config, seed)
    moves = propose(weight, gradient, vectors_of(config) // 2)
    other = moved(weight, moves)
    check_indices(config, other.to_tensors(torch.float32), "moved")
    assert bool((moves.gains > 0).all())
    assert len(moves.vectors.unique()) == len(moves) <= vectors_of(config) // 2
    change = (dense(other) - dense(weight)).double()
    assert float((gradient * change).sum()) == pytest.approx(-float(moves.gains.double().sum()), rel=1e-3, abs=1e-4)


def test_a_layer_in_parts_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FORMATS["all of it"]
    weight, gradient = random_weight(config, torch.float32), gradient_for(config)
    whole = propose(weight, gradient, 30)
    monkeypatch.setattr(index_moves, "WEIGHTS_AT_ONCE", 2 * config.out_features)
    parts = propose(weight, gradient, 30)
    assert whole.vectors.tolist() == parts.vectors.tolist()
    assert all(torch.equal(a, b) for a, b in zip(whole.indices, parts.indices, strict=True))


def test_weights_share_what_may_move_by_what_it_brings() -> None:
    weights = {name: random_weight(config, torch.float32) for name, config in FORMATS.items()}
    proposals = {name: propose(w, gradient_for(w.config), 20) for name, w in weights.items()}
    chosen = best_of(proposals, 40)
    assert chosen.keys() == proposals.keys()
    assert sum(map(len, chosen.values())) == 40
    every, best = (torch.cat([moves.scores for moves in some.values()]) for some in (proposals, chosen))
    assert best.sort(descending=True).values.tolist() == every.sort(descending=True).values[:40].tolist()


def test_a_codebook_of_one_entry_moves_nothing() -> None:
    config = dataclasses.replace(PLAIN, num_centroids=1, is_packed=False)
    assert len(propose(random_weight(config, torch.float32), gradient_for(config), 10)) == 0


def test_a_move_is_scored_by_its_gain_over_the_squared_change_of_the_weight() -> None:
    config = FORMATS["all of it"]
    weight, gradient = random_weight(config, torch.float32), gradient_for(config)
    moves = propose(weight, gradient, 20)
    assert len(moves) == 20
    for count in range(1, 20):
        before, after = (moved(weight, moves.best(n)) for n in (count - 1, count))
        change = (dense(after) - dense(before)).double()
        score = -float((gradient * change).sum()) / float(change.square().sum())
        assert score == pytest.approx(float(moves.scores[count - 1]), rel=1e-3)


@pytest.mark.parametrize("config", [PLAIN, FORMATS["residual"]], ids=["one codebook", "residual"])
def test_the_spacing_is_the_distance_to_the_next_vector_that_can_be_formed(config: LayerConfig) -> None:
    weight = random_weight(config, torch.float32)
    (segment,) = segments_of(weight)
    books = segment.stages
    sums = books[0] if len(books) == 1 else (books[0][:, None] + books[1]).flatten(0, 1)
    used = segment.cut(segment.gather(books))
    expected = torch.cdist(used, sums).sort(dim=1).values[:, 1].median()
    assert spacing_of(segment) == pytest.approx(float(expected), rel=1e-4)
