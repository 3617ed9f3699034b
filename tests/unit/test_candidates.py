"""What a layer may become: codebooks worth their bits, and losses that a Gaussian weight really has."""

import pytest
import torch

from vptq.quantize.candidates import SMALLEST, candidates_for, reference_of
from vptq.quantize.solver import quantize_weight
from vptq.spec import QuantSpec

USUAL = {"norm": True, "perm": True, "perm_is_stored": False}


def test_larger_layers_may_have_larger_codebooks() -> None:
    largest = [max(c.spec.num_centroids for c in candidates_for(side, side, **USUAL)) for side in (16, 256, 1024, 8192)]
    assert largest == sorted(largest)
    assert (largest[0], largest[-1]) == (16, 65536)


def test_the_smallest_layer_has_a_candidate() -> None:
    assert [candidate.spec.name for candidate in candidates_for(1, 1, **USUAL)] == [SMALLEST]


@pytest.mark.parametrize("side", [64, 576, 4096, 8192])
def test_no_codebook_takes_more_than_its_limit(side: int) -> None:
    for candidate in candidates_for(side, side, **USUAL):
        entries = candidate.spec.num_centroids + candidate.spec.num_residual_centroids
        if candidate.spec.name != SMALLEST:
            assert 16 * entries * candidate.spec.vector_len <= 2 * side * side


def test_a_stored_permutation_is_counted() -> None:
    free, stored = (candidates_for(576, 576, norm=True, perm=True, perm_is_stored=p)[0] for p in (False, True))
    assert stored.config.stored_bits - free.config.stored_bits == 16 * 576
    assert free.spec == stored.spec
    assert free.spec.enable_perm


def test_layers_are_measured_at_two_bits_where_they_can_be() -> None:
    assert reference_of(candidates_for(576, 576, **USUAL)).spec.index_bits_per_weight == 2
    assert reference_of(candidates_for(16, 16, **USUAL)).spec.name == SMALLEST


@pytest.mark.parametrize("spec", ["v4-k16", "v8-k256", "v4-k64", "v8-k64-64", "v4-k256", "v4-k32-32", "v4-k64-64"])
def test_predicted_losses_are_those_of_a_gaussian_weight(spec: str) -> None:
    rows, columns = 384, 128
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    (candidate,) = (c for c in candidates_for(columns, rows, **USUAL) if c.spec.name == spec)
    config = QuantSpec.parse(spec).for_layer(columns, rows)
    solution = quantize_weight(weight, torch.eye(columns), config, torch.Generator().manual_seed(0))
    assert candidate.gaussian_loss == pytest.approx(solution.losses["descent"], rel=0.1)
