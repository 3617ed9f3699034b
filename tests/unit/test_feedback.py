"""Error feedback and coordinate descent over the columns, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import correlated_hessian, loss_of, problem, random_segments

from vptq.quantize.feedback import descent_sweep, feedback_pass
from vptq.quantize.hessian import inverse_factor
from vptq.quantize.kmeans import weighted_kmeans
from vptq.quantize.segments import Segment, decode_all


def wide(segment: Segment) -> int:
    return len(segment.stages[0])


def narrow(_: Segment) -> int:
    return 1


def fed_back_by_definition(columns: torch.Tensor, hessian: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
    """Each column is quantized where the loss has its minimum over it and all columns after it, those before fixed."""
    weight, hessian = columns.double(), hessian.double()
    decoded = torch.zeros_like(weight)
    for segment in segments:
        for p in range(segment.start, segment.stop):
            error = (weight - decoded)[:p]
            moves = torch.linalg.solve(hessian[p:, p:], hessian[p:, :p] @ error)
            target = (weight[p] + moves[0]).float()[None]
            decoded[p] = segment.assign_columns(p, p + 1, target, None, wide(segment))[0][0]
    return decoded.float()


@pytest.mark.parametrize("sizes", [(16,), (16, 4)])
def test_the_pass_does_what_its_definition_says(sizes: tuple[int, ...]) -> None:
    weight, hessian = problem(20, 30)
    columns = weight.T.contiguous()
    segments = random_segments(columns, [0, 4, 17, 30], sizes, vector_len=4)
    expected = fed_back_by_definition(columns, hessian, segments)
    factor, _ = inverse_factor(hessian, damping=0.0)
    decoded = feedback_pass(columns, factor, segments, wide, block_size=8)
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_all(segments), decoded)


@pytest.mark.parametrize("seed", range(4))
def test_feedback_beats_nearest_centroids_of_the_same_codebook(seed: int) -> None:
    weight, hessian = problem(64, 32, seed)
    columns = weight.T.contiguous()
    segment = Segment(0, 32, 4, 64, torch.ones(32), torch.zeros(32))
    draw = torch.Generator().manual_seed(seed)
    segment.stages = [weighted_kmeans(segment.normalized(columns), torch.ones(32 * 16), 16, draw)]
    segment.assign(columns, beam=1)
    before = loss_of(columns - segment.decode(), hessian)
    factor, _ = inverse_factor(hessian, damping=0.01)
    after = loss_of(columns - feedback_pass(columns, factor, [segment], narrow, block_size=128), hessian)
    assert after < 0.8 * before


@pytest.mark.parametrize("sizes", [(16,), (16, 4)])
def test_under_an_identity_hessian_the_pass_takes_the_nearest_centroids(sizes: tuple[int, ...]) -> None:
    columns = problem(22, 12)[0].T.contiguous()
    segments = random_segments(columns, [0, 5, 12], sizes, vector_len=4)
    for segment in segments:
        segment.assign(columns, beam=16)
    expected = [indices.clone() for segment in segments for indices in segment.indices]
    feedback_pass(columns, torch.eye(12), segments, wide, block_size=5)
    found = [indices for segment in segments for indices in segment.indices]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("function", ["feedback", "descent"])
@pytest.mark.parametrize("sizes", [(16,), (16, 4)])
def test_the_block_size_changes_nothing(function: str, sizes: tuple[int, ...]) -> None:
    weight, hessian = problem(40, 33)
    columns = weight.T.contiguous()
    factor, _ = inverse_factor(hessian, damping=0.01)

    def run(block_size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        segments = random_segments(columns, [0, 6, 20, 33], sizes, vector_len=4)
        if function == "feedback":
            decoded = feedback_pass(columns, factor, segments, wide, block_size)
        else:
            decoded = descent_sweep(columns, hessian, segments, decode_all(segments), wide, block_size)
        return decoded, [indices for segment in segments for indices in segment.indices]

    expected, expected_indices = run(1)
    for block_size in (2, 7, 33, 128):
        decoded, indices = run(block_size)
        assert all(torch.equal(a, b) for a, b in zip(indices, expected_indices, strict=True))
        torch.testing.assert_close(decoded, expected)


@settings(max_examples=30)
@given(
    st.integers(0, 2**20), st.sampled_from([(2,), (16,), (4, 4), (16, 8)]), st.sampled_from([1, 2, 16]), st.booleans()
)
def test_a_sweep_never_raises_the_loss(seed: int, sizes: tuple[int, ...], beam: int, grouped: bool) -> None:
    weight, hessian = problem(18, 14, seed)
    columns = weight.T.contiguous()
    segments = random_segments(columns, [0, 3, 9, 14] if grouped else [0, 14], sizes, vector_len=4, seed=seed)
    decoded = decode_all(segments)
    before = loss_of(columns - decoded, hessian)
    for _ in range(3):
        decoded = descent_sweep(columns, hessian, segments, decoded, lambda _: beam, block_size=5)
        after = loss_of(columns - decoded, hessian)
        assert after <= before * (1 + 1e-5)
        before = after
    torch.testing.assert_close(decode_all(segments), decoded)


def test_where_sweeps_end_no_other_centroid_lowers_the_loss() -> None:
    weight, hessian = problem(8, 10)
    columns = weight.T.contiguous()
    (segment,) = random_segments(columns, [0, 10], (8,), vector_len=4)
    decoded = segment.decode()
    for _ in range(50):
        before, decoded = decoded, descent_sweep(columns, hessian, [segment], decoded, narrow, block_size=4)
        if torch.equal(before, decoded):
            break
    final = loss_of(columns - decoded, hessian)
    for p in range(10):
        for row in range(2):
            kept = int(segment.indices[0][p, row])
            for other in range(8):
                segment.indices[0][p, row] = other
                assert loss_of(columns - segment.decode(), hessian) >= final * (1 - 1e-6)
            segment.indices[0][p, row] = kept


def test_a_sweep_improves_on_the_pass() -> None:
    weight, hessian = problem(64, 48)
    columns = weight.T.contiguous()
    segments = random_segments(columns, [0, 48], (16,), vector_len=4)
    factor, _ = inverse_factor(hessian, damping=0.01)
    decoded = feedback_pass(columns, factor, segments, narrow, block_size=16)
    before = loss_of(columns - decoded, hessian)
    after = loss_of(columns - descent_sweep(columns, hessian, segments, decoded, narrow, block_size=16), hessian)
    assert after < 0.95 * before


def test_the_weight_is_left_as_it_is() -> None:
    columns = problem(20, 12)[0].T.contiguous()
    hessian = correlated_hessian(12)
    segments = random_segments(columns, [0, 12], (16,), vector_len=4)
    kept, start = columns.clone(), decode_all(segments)
    before = start.clone()
    feedback_pass(columns, inverse_factor(hessian, 0.01)[0], segments, narrow, block_size=4)
    descent_sweep(columns, hessian, segments, start, narrow, block_size=4)
    assert torch.equal(columns, kept)
    assert torch.equal(start, before)
