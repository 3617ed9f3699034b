"""The C++ nearest-centroid kernel, on every instruction set of this machine, against float64 brute force."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_counts import with_each_thread_count
from torch import Tensor

from vptq import ops

extension = pytest.importorskip("vptq._C", reason="built without the C++ kernels")

if not any(status.name == "cpu" and status.active for status in ops.backends()):
    pytest.skip("VPTQ_BACKEND keeps the C++ kernels out", allow_module_level=True)


def runs(isa: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPTQ_CPU_ISA", isa)
        try:
            return bool(extension.isa() == isa)
        except RuntimeError:
            return False


ISAS = [isa for isa in ("generic", "avx2", "avx512") if runs(isa)]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VPTQ_CPU_ISA", request.param)
    assert extension.isa() == request.param
    return str(request.param)


def brute_force(vectors: Tensor, codebook: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    """By the definition, in float64: nearest first, the lower index before an equal one."""
    distances = (vectors.double()[:, None] - codebook.double()[None]).square().sum(dim=-1)
    distances, indices = distances.sort(dim=1, stable=True)
    return indices[:, :beam], distances[:, :beam]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_grid(*shape: int, seed: int = 0) -> Tensor:
    """Half integers: every product and sum is exact in float32, and ties are common."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)) / 2


sizes = st.sampled_from([0, 1, 2, 5, 6, 7, 8, 9, 31, 65, 127, 140])
codebook_sizes = st.sampled_from([1, 2, 5, 16, 17, 33, 100, 256, 1000])


@settings(max_examples=60, deadline=None)
@given(
    count=sizes,
    centroids=codebook_sizes,
    dim=st.sampled_from([1, 2, 3, 4, 6, 8, 10, 12, 16, 19]),
    beam=st.sampled_from([1, 2, 5, 8, 32]),
    seed=st.integers(0, 1000),
    shift=st.sampled_from([0.0, 0.5, 100.0]),
)
@pytest.mark.parametrize("values", [on_grid, random])
def test_agrees_with_brute_force(
    values: Callable[..., Tensor], count: int, centroids: int, dim: int, beam: int, seed: int, shift: float
) -> None:
    beam = min(beam, centroids)
    vectors = values(count, dim, seed=seed) + shift
    codebook = values(centroids, dim, seed=seed + 1) + shift
    indices, distances = ops.nearest(vectors, codebook, beam)
    expected_indices, expected = brute_force(vectors, codebook, beam)
    assert indices.shape == distances.shape == (count, beam)
    if values is on_grid:
        assert torch.equal(indices, expected_indices)
        assert torch.equal(distances.double(), expected)
    else:
        # A nearly equal centroid may win; a farther one may not.
        torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-5)
        exact = (vectors.double()[:, None] - codebook.double()[indices]).square().sum(dim=-1)
        torch.testing.assert_close(distances.double(), exact, rtol=1e-6, atol=1e-12)


def test_large_codebook_of_the_format() -> None:
    vectors, codebook = random(40, 8), random(65536, 8, seed=1)
    for beam in (1, 8, 32):
        indices, distances = ops.nearest(vectors, codebook, beam)
        expected_indices, expected = brute_force(vectors, codebook, beam)
        torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-6)
        assert (indices == expected_indices).double().mean() > 0.99


@pytest.mark.parametrize("beam", [1, 3, 32])
def test_equal_centroids_come_in_rising_index_order(beam: int) -> None:
    codebook = random(3, 4).repeat(700, 1)
    indices, distances = ops.nearest(codebook[:3].clone(), codebook, beam)
    for row in range(3):
        assert indices[row].tolist() == [row + 3 * i for i in range(beam)]
    assert (distances == 0).all()


def test_result_depends_neither_on_threads_nor_on_neighbours() -> None:
    vectors, codebook = random(1000, 6), random(512, 6, seed=1)
    (indices, distances), *more = with_each_thread_count(lambda: ops.nearest(vectors, codebook, 4))
    for threaded_indices, threaded_distances in more:
        assert torch.equal(threaded_indices, indices)
        assert torch.equal(threaded_distances, distances)
    alone = torch.cat([ops.nearest(vector[None], codebook, 4)[0] for vector in vectors[:50]])
    assert torch.equal(alone, indices[:50])


def test_data_far_from_the_origin_keeps_its_digits() -> None:
    vectors, codebook = random(200, 8) * 1e-3 + 50, random(256, 8, seed=1) * 1e-3 + 50
    _, distances = ops.nearest(vectors, codebook)
    torch.testing.assert_close(distances.double(), brute_force(vectors, codebook, 1)[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("beam", [1, 5, 20])
def test_nan_vector_gets_the_first_centroids_and_a_nan_centroid_comes_last(beam: int) -> None:
    vectors, codebook = random(9, 4), random(20, 4, seed=1)
    clean, _ = ops.nearest(vectors, codebook, beam)
    vectors[4, 2] = torch.nan
    indices, distances = ops.nearest(vectors, codebook, beam)
    assert indices[4].tolist() == list(range(beam))
    assert distances[4].isnan().all()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(indices[others], clean[others])

    codebook[7, 0] = torch.nan
    indices, distances = ops.nearest(vectors[others], codebook, beam)
    assert ((indices == 7).sum(dim=1) == int(beam == 20)).all()
    if beam == 20:
        assert (indices[:, -1] == 7).all()
        assert distances[:, -1].isnan().all()


@pytest.mark.parametrize("value", [torch.inf, 3e38])
def test_overflow_still_gives_valid_distinct_indices(value: float) -> None:
    vectors, codebook = random(3, 2), random(40, 2, seed=1)
    vectors[0, 0] = value
    codebook[5, 1] = value
    indices, _ = ops.nearest(vectors, codebook, 40)
    assert torch.equal(indices.sort(dim=1).values, torch.arange(40).expand(3, -1))


def test_strided_inputs_are_read_as_they_look() -> None:
    wide, codebook = random(8, 50), random(16, 64, seed=1)
    indices, _ = ops.nearest(wide.t()[::2], codebook[:, ::8], 2)
    assert torch.equal(indices, ops.nearest(wide.t()[::2].contiguous(), codebook[:, ::8].contiguous(), 2)[0])


@pytest.mark.parametrize(
    ("vectors", "codebook", "beam", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(8, 4), 0, "beam is 0"),
        (torch.zeros(3, 4), torch.zeros(8, 4), 9, "beam is 9"),
        (torch.zeros(3, 4), torch.zeros(0, 4), 1, "number of centroids, 0"),
        (torch.zeros(3, 4), torch.zeros(8, 5), 1, "4 coordinates but centroids have 5"),
        (torch.zeros(3, 0), torch.zeros(8, 0), 1, "at least one coordinate"),
        (torch.zeros(3), torch.zeros(8, 1), 1, "vectors must have 2 dimensions"),
        (torch.zeros(3, 4).double(), torch.zeros(8, 4), 1, "vectors must be float32"),
        (torch.zeros(3, 4), torch.zeros(8, 4).half(), 1, "codebook must be float32"),
    ],
)
def test_wrong_input_is_one_clear_line(vectors: Tensor, codebook: Tensor, beam: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as error:
        ops.nearest(vectors, codebook, beam)
    assert "\n" not in str(error.value)


def test_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPTQ_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="VPTQ_CPU_ISA is 'sse9'"):
        ops.nearest(torch.zeros(3, 4), torch.zeros(8, 4), 1)
