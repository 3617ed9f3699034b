"""The PyTorch search behind `vptq::nearest`, and the kernel in use beside it: one contract, two implementations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_counts import threads
from torch import Tensor

from vptq import ops
from vptq.errors import ConfigError
from vptq.ops import search

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
BOTH = pytest.mark.parametrize("nearest", [ops.nearest, search.nearest], ids=["active", "torch"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(nearest: Search, vectors: Tensor, codebook: Tensor, beam: int) -> None:
    """Nothing nearer was overlooked, beyond float32 rounding; the order is by distance, then by index."""
    indices, distances = nearest(vectors, codebook, beam)
    assert (indices.dtype, distances.dtype) == (torch.int64, torch.float32)
    assert indices.shape == distances.shape == (len(vectors), beam)
    exact = (vectors.double()[:, None] - codebook.double()).square().sum(-1)
    best = exact.sort(dim=1).values[:, :beam]
    slack = 1e-5 * best + 1e-12
    assert ((exact.gather(1, indices) - best).abs() <= slack).all()
    assert ((distances - best).abs() <= slack).all()
    assert all(len(set(row)) == beam for row in indices.tolist())
    tied = distances[:, 1:] == distances[:, :-1]
    assert (distances[:, 1:] >= distances[:, :-1]).all()
    assert (~tied | (indices[:, 1:] > indices[:, :-1])).all()


@BOTH
@given(data=st.data())
@settings(deadline=None)
def test_any_size(nearest: Search, data: st.DataObject) -> None:
    count, width, entries = (data.draw(st.integers(low, high)) for low, high in ((0, 40), (1, 17), (1, 200)))
    beam, seed = data.draw(st.integers(1, entries)), data.draw(st.integers(0, 2**31))
    check(nearest, random(count, width, seed=seed), random(entries, width, seed=seed + 1), beam)


@pytest.mark.parametrize("beam", [1, 3, 256])
def test_rivals_that_a_dot_product_cannot_tell_apart(beam: int) -> None:
    """Two far clouds of close centroids, each centroid twice: x.c is a million, the distances differ by thousandths.

    Only the PyTorch search promises to look again; a kernel may stop at the rounding of its scores.
    """
    side = torch.tensor([-1e3, 1e3]).repeat(64).unsqueeze(1)
    codebook = (side + random(128, 8) / 10).repeat(2, 1)
    vectors = side + random(128, 8, seed=1) / 10
    check(search.nearest, vectors, codebook, beam)
    indices, distances = search.nearest(vectors, codebook, beam)
    assert (indices[:, 0] < 128).all()
    if beam > 1:
        assert torch.equal(indices[:, 1], indices[:, 0] + 128)
        assert torch.equal(distances[:, 1], distances[:, 0])


@BOTH
def test_a_centroid_is_its_own_nearest(nearest: Search) -> None:
    codebook = random(3000, 6) * 1e3
    indices, distances = nearest(codebook, codebook, 1)
    assert torch.equal(indices.squeeze(1), torch.arange(3000))
    assert not distances.any()


@BOTH
@pytest.mark.parametrize("beam", [1, 4])
def test_nan_compares_as_farthest(nearest: Search, beam: int) -> None:
    vectors, codebook = random(20, 4), random(30, 4, seed=1)
    vectors[3] = torch.nan
    indices, distances = nearest(vectors, codebook, beam)
    assert indices[3].tolist() == list(range(beam))
    assert distances[3].isnan().all()
    rest = [row for row in range(20) if row != 3]
    check(nearest, vectors[rest], codebook, beam)
    codebook[int(indices[0, 0])] = torch.nan
    again, distances = nearest(vectors[rest], codebook, beam)
    assert not (again == indices[0, 0]).any()
    assert not distances.isnan().any()


@BOTH
def test_threads_and_chunks_do_not_change_a_bit(nearest: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codebook = random(1000, 8), random(512, 8, seed=1).repeat(2, 1)
    first = nearest(vectors, codebook, 2)
    monkeypatch.setitem(search._SCORES_PER_CHUNK, "cpu", 7000)
    with threads(torch.get_num_threads() + 1):
        second = nearest(vectors, codebook, 2)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("vectors", "codebook", "beam", "said"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), 1, r"\(2, 3\) and codebook \(4, 2\) must be two matrices of one width"),
        (torch.zeros(3), torch.zeros(4, 3), 1, "must be two matrices"),
        (torch.zeros(2, 0), torch.zeros(4, 0), 1, "must be two matrices"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 5, r"beam is 5; it must be in 1\.\.4"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 0, "beam is 0"),
        (torch.zeros(2, 3), torch.zeros(0, 3), 1, "beam is 1"),
        (torch.zeros(2, 3).double(), torch.zeros(4, 3), 1, r"vectors are torch\.float64"),
    ],
)
def test_what_does_not_fit_is_refused(vectors: Tensor, codebook: Tensor, beam: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        search.nearest(vectors, codebook, beam)
