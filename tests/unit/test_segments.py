"""Columns cut into vectors, and the choice of one or two centroids for each."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from solver_problems import problem, random_segments, seeded

from vptq.quantize import segments as segments_module
from vptq.quantize.segments import Segment, assign, decode_all

SEARCHES = {"all pairs": segments_module.PRODUCT_LIMIT, "beam": 0}


def plain_segment(columns: int, out_features: int, vector_len: int) -> Segment:
    return Segment(0, columns, vector_len, out_features, torch.ones(columns), torch.zeros(columns))


def squared_errors(vectors: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (vectors.double() - values.double()).square().sum(1)


@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 9))
def test_join_undoes_cut(columns: int, out_features: int, vector_len: int) -> None:
    segment = plain_segment(columns, out_features, vector_len)
    dense = torch.randn(columns, out_features, generator=seeded(0))
    vectors = segment.cut(dense)
    assert vectors.shape == (columns * -(-out_features // vector_len), vector_len)
    assert torch.equal(segment.join(vectors), dense)


def test_a_vector_runs_down_consecutive_rows_of_one_column() -> None:
    dense = torch.arange(14.0).reshape(2, 7)  # two columns of seven rows
    vectors = plain_segment(2, 7, 4).cut(dense)
    assert vectors.tolist() == [[0, 1, 2, 3], [4, 5, 6, 0], [7, 8, 9, 10], [11, 12, 13, 0]]


@given(
    st.sampled_from(list(SEARCHES)), st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**31)
)
def test_the_widest_beam_finds_the_best_pair(search: str, main: int, residual: int, length: int, seed: int) -> None:
    draw = seeded(seed)
    vectors = torch.randn(20, length, generator=draw)
    stages = [torch.randn(main, length, generator=draw), torch.randn(residual, length, generator=draw)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments_module, "PRODUCT_LIMIT", SEARCHES[search])
        chosen, values = assign(vectors, stages, beam=main)
    pairs = (stages[0][:, None] + stages[1]).flatten(0, 1)
    best = (vectors[:, None] - pairs).double().square().sum(2).amin(1)
    torch.testing.assert_close(squared_errors(vectors, values), best, rtol=1e-5, atol=1e-6)
    assert torch.equal(values, stages[0][chosen[0]] + stages[1][chosen[1]])


def test_a_wider_beam_is_never_worse_and_one_of_one_is_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "PRODUCT_LIMIT", 0)
    draw = seeded(0)
    vectors = torch.randn(200, 4, generator=draw)
    stages = [torch.randn(16, 4, generator=draw), torch.randn(16, 4, generator=draw) / 2]
    errors = [squared_errors(vectors, assign(vectors, stages, beam)[1]) for beam in (1, 2, 4, 8, 16, 99)]
    for narrow, wide in itertools.pairwise(errors):
        assert bool((wide <= narrow + 1e-6).all())
    assert float(errors[-1].sum()) < 0.95 * float(errors[0].sum())
    greedy = (vectors[:, None] - stages[0]).square().sum(2).argmin(1)
    assert torch.equal(assign(vectors, stages, beam=1)[0][0], greedy)


def test_a_memory_budget_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "PRODUCT_LIMIT", 0)
    draw = seeded(0)
    vectors = torch.randn(101, 4, generator=draw)
    stages = [torch.randn(16, 4, generator=draw), torch.randn(16, 4, generator=draw) / 2]
    expected, expected_values = assign(vectors, stages, beam=4)
    used = []
    nearest = segments_module.nearest
    monkeypatch.setattr(segments_module, "BEAM_ELEMENTS", 4 * 4 * 10)
    monkeypatch.setattr(segments_module, "nearest", lambda x, *rest: (used.append(len(x)), nearest(x, *rest))[1])
    chosen, values = assign(vectors, stages, beam=4)
    assert max(used) == 40, "ten vectors with four candidates each"
    assert all(torch.equal(a, b) for a, b in zip(chosen, expected, strict=True))
    assert torch.equal(values, expected_values)


def test_one_stage_takes_the_nearest_centroid() -> None:
    draw = seeded(0)
    vectors, book = torch.randn(50, 4, generator=draw), torch.randn(9, 4, generator=draw)
    (index,), values = assign(vectors, [book], beam=5)
    assert torch.equal(index, (vectors[:, None] - book).square().sum(2).argmin(1))
    assert torch.equal(values, book[index])


@pytest.mark.parametrize("sizes", [(16,), (16, 4)])
def test_a_weight_made_of_centroids_is_found_in_its_own_units(sizes: tuple[int, ...]) -> None:
    weight, _ = problem(22, 9)
    segments = random_segments(weight.T, [0, 3, 9], sizes, vector_len=4)
    original = decode_all(segments)
    for segment in segments:
        for indices in segment.indices:
            indices.zero_()
        segment.assign(original, beam=16)
    torch.testing.assert_close(decode_all(segments), original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("sizes", [(16,), (16, 4)])
def test_assigning_column_by_column_is_assigning_all(
    sizes: tuple[int, ...], search: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments_module, "PRODUCT_LIMIT", SEARCHES[search])
    columns = problem(22, 9)[0].T.contiguous()
    segments = random_segments(columns, [0, 3, 9], sizes, vector_len=4)
    for segment in segments:
        segment.assign(columns, beam=3)
    expected = decode_all(segments)
    for segment in segments:
        for indices in segment.indices:
            indices.zero_()
        for p in range(segment.start, segment.stop):
            torch.testing.assert_close(segment.assign_column(p, columns[p], beam=3), expected[p])
    torch.testing.assert_close(decode_all(segments), expected)


def test_a_narrow_beam_may_not_replace_a_better_pair() -> None:
    """Found by the widest beam, looked for again by the narrowest: only without `keep_better` is it lost."""
    columns = problem(64, 6)[0].T.contiguous()
    (segment,) = random_segments(columns, [0, 6], (16, 16), vector_len=4)
    segment.assign(columns, beam=16)
    best = segment.decode()
    kept = torch.stack([segment.assign_column(p, columns[p], 1, keep_better=True) for p in range(6)])
    torch.testing.assert_close(kept, best)
    torch.testing.assert_close(segment.decode(), best)
    lost = torch.stack([segment.assign_column(p, columns[p], 1) for p in range(6)])
    assert float((columns - lost).square().sum()) > float((columns - best).square().sum())
