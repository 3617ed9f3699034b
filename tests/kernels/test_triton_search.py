"""The Triton search behind `vptq::nearest`: on a GPU, or interpreted, against the search on the CPU and brute force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_layers import DEVICES

from vptq import ops
from vptq.errors import ConfigError
from vptq.ops import search

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def few_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time by programs, not by their size."""
    if device == "cpu":
        from vptq.ops import triton_search

        monkeypatch.setattr(triton_search, "SETTLE_ROWS", 64)


def nearest(vectors: Tensor, codebook: Tensor, beam: int, device: str) -> tuple[Tensor, Tensor]:
    from vptq.ops import triton_search

    indices, distances = triton_search.nearest(vectors.to(device), codebook.to(device), beam)
    return indices.cpu(), distances.cpu()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_grid(*shape: int, seed: int = 0) -> Tensor:
    """Half integers: every product and sum is exact in float32, and ties are common."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)) / 2


def check(vectors: Tensor, codebook: Tensor, beam: int, device: str) -> None:
    """Nothing nearer was overlooked, beyond float32 rounding; the order is by distance, then by index."""
    indices, distances = nearest(vectors, codebook, beam, device)
    assert (indices.dtype, distances.dtype) == (torch.int64, torch.float32)
    assert indices.shape == distances.shape == (len(vectors), beam)
    _, on_cpu = ops.nearest(vectors, codebook, beam)
    torch.testing.assert_close(distances, on_cpu, rtol=1e-5, atol=1e-5)
    exact = (vectors.double()[:, None] - codebook.double()[indices]).square().sum(-1)
    torch.testing.assert_close(distances.double(), exact, rtol=1e-5, atol=1e-12)
    assert all(len(set(row)) == beam for row in indices.tolist())
    tied = distances[:, 1:] == distances[:, :-1]
    assert (distances[:, 1:] >= distances[:, :-1]).all()
    assert (~tied | (indices[:, 1:] > indices[:, :-1])).all()


@settings(max_examples=8, deadline=None)
@given(data=st.data(), shift=st.sampled_from([0.0, 0.5, 100.0]), seed=st.integers(0, 1000))
@pytest.mark.parametrize("values", [on_grid, random])
def test_agrees_with_the_cpu(
    values: Callable[..., Tensor], device: str, data: st.DataObject, shift: float, seed: int
) -> None:
    count = data.draw(st.sampled_from([0, 1, 9, 64, 65]))
    entries = data.draw(st.sampled_from([1, 2, 5, 64, 65, 130]))
    length = data.draw(st.sampled_from([1, 2, 3, 6, 8, 16, 19]))
    beam = min(entries, data.draw(st.sampled_from([1, 2, 5])))
    vectors = values(count, length, seed=seed) + shift
    codebook = values(entries, length, seed=seed + 1) + shift
    check(vectors, codebook, beam, device)
    if values is on_grid:
        expected = search.nearest(vectors, codebook, beam)
        assert all(map(torch.equal, nearest(vectors, codebook, beam, device), expected))


@pytest.mark.parametrize("beam", [1, 8])
def test_the_largest_codebook_of_the_format(beam: int, device: str) -> None:
    check(random(70, 8), random(65536, 8, seed=1), beam, device)


@pytest.mark.parametrize("beam", [1, 3, 16])
def test_equal_centroids_come_in_rising_index_order(beam: int, device: str) -> None:
    codebook = random(3, 4).repeat(50, 1)
    indices, distances = nearest(codebook[:3].clone(), codebook, beam, device)
    assert indices.tolist() == [[row + 3 * i for i in range(beam)] for row in range(3)]
    assert not distances.any()


@pytest.mark.parametrize("beam", [1, 4])
def test_splits_and_parts_change_nothing(beam: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vptq.ops import triton_search

    vectors, codebook = random(70, 6), random(200, 6, seed=1).repeat(2, 1)
    expected = nearest(vectors, codebook, beam, device)
    splits, rank = [], triton_search._rank
    monkeypatch.setattr(triton_search, "_rank", lambda *a: (splits.append((found := rank(*a))[0].shape), found)[1])
    monkeypatch.setattr(triton_search, "PROGRAMS", 10000)
    monkeypatch.setattr(triton_search, "SPLIT_TILES", 0)
    assert all(map(torch.equal, nearest(vectors, codebook, beam, device), expected))
    assert splits[-1][1] > 1
    monkeypatch.setattr(triton_search, "SCRATCH_BYTES", 8 * 40 * beam)
    assert all(map(torch.equal, nearest(vectors, codebook, beam, device), expected))
    assert len(splits) == 1 + 2, "forty vectors at once"


def test_neighbours_change_nothing(device: str) -> None:
    vectors, codebook = random(90, 8), random(300, 8, seed=1)
    together = nearest(vectors, codebook, 2, device)
    alone = [nearest(vector[None], codebook, 2, device) for vector in vectors[::30]]
    assert all(
        torch.equal(torch.cat(part), whole[::30])
        for part, whole in zip(zip(*alone, strict=True), together, strict=True)
    )


def test_data_far_from_the_origin_keeps_its_digits(device: str) -> None:
    vectors, codebook = random(100, 8) * 1e-3 + 50, random(256, 8, seed=1) * 1e-3 + 50
    _, distances = nearest(vectors, codebook, 1, device)
    exact = (vectors.double()[:, None] - codebook.double()).square().sum(-1).amin(1)
    torch.testing.assert_close(distances[:, 0].double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("beam", [1, 5, 20])
def test_a_vector_that_is_no_number_gets_the_first_centroids_and_such_a_centroid_comes_last(
    beam: int, device: str
) -> None:
    vectors, codebook = random(9, 4), random(20, 4, seed=1)
    clean, _ = nearest(vectors, codebook, beam, device)
    vectors[4, 2] = torch.nan
    indices, distances = nearest(vectors, codebook, beam, device)
    assert indices[4].tolist() == list(range(beam))
    assert distances[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(indices[others], clean[others])
    codebook[7, 0] = torch.nan
    indices, distances = nearest(vectors[others], codebook, beam, device)
    assert ((indices == 7).sum(dim=1) == int(beam == 20)).all()
    if beam == 20:
        assert (indices[:, -1] == 7).all()
        assert distances[:, -1].isnan().all()


@pytest.mark.parametrize("value", [torch.inf, 3e38])
def test_overflow_still_gives_valid_distinct_indices(value: float, device: str) -> None:
    vectors, codebook = random(3, 2), random(40, 2, seed=1)
    vectors[0, 0] = value
    codebook[5, 1] = value
    indices, _ = nearest(vectors, codebook, 40, device)
    assert torch.equal(indices.sort(dim=1).values, torch.arange(40).expand(3, -1))


def test_strided_inputs_are_read_as_they_look(device: str) -> None:
    wide, codebook = random(8, 50).to(device), random(16, 64, seed=1).to(device)
    seen = nearest(wide.t()[::2], codebook[:, ::8], 2, device)
    assert all(map(torch.equal, seen, nearest(wide.t()[::2].cpu(), codebook[:, ::8].cpu(), 2, device)))


@pytest.mark.parametrize(("length", "beam"), [(65, 1), (4, 65)])
def test_what_the_kernels_do_not_take_runs_in_pytorch_and_says_so_once(
    length: int, beam: int, device: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vptq.ops import triton_search

    monkeypatch.setattr(triton_search, "_rank", lambda *_: pytest.fail("the kernel ran"))
    triton_search._tell.cache_clear()
    for _ in range(2):
        check(random(5, length), random(70, length, seed=1), beam, device)
    assert len(caplog.messages) == 1
    assert "at most 64" in caplog.messages[0]


def test_wrong_input_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=r"beam is 5; it must be in 1\.\.4"):
        nearest(torch.zeros(2, 3), torch.zeros(4, 3), 5, device)
