"""Columns cut into vectors, in the units of their codebook."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from solver_problems import problem, random_segments, seeded

from vptq.quantize.segments import Segment, decode_all


def plain_segment(columns: int, out_features: int, vector_len: int) -> Segment:
    return Segment(0, columns, vector_len, out_features, torch.ones(columns), torch.zeros(columns))


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


@pytest.mark.parametrize("sizes", [(16,), (16, 4)])
def test_assigning_column_by_column_is_assigning_all(sizes: tuple[int, ...]) -> None:
    columns = problem(22, 9)[0].T.contiguous()
    segments = random_segments(columns, [0, 3, 9], sizes, vector_len=4)
    for segment in segments:
        segment.assign(columns, beam=3)
    expected = decode_all(segments)
    for segment in segments:
        for indices in segment.indices:
            indices.zero_()
        for p in range(segment.start, segment.stop):
            values, errors = segment.assign_columns(p, p + 1, columns[p : p + 1], None, beam=3)
            torch.testing.assert_close(values[0], expected[p])
            torch.testing.assert_close(errors[0], expected[p] - columns[p])
    torch.testing.assert_close(decode_all(segments), expected)
