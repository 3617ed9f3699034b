"""Least squares for codebooks and for the column normalization, against a dense solver."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import loss_of, problem, random_segments

from vptq.quantize.refit import AFFINE_RIDGE, refit_codebooks, refit_normalization
from vptq.quantize.segments import Segment, decode_all


def least_squares_loss(basis: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The least tr(E H E^T) over E = target - sum_k x_k basis_k, and the x that has it; all in float64.

    Args:
        basis: [unknowns, in, out].
        target: [in, out].
        hessian: [in, in], positive definite.
    """
    root = torch.linalg.cholesky(hessian.double()).T
    matrix = (root @ basis.double()).flatten(1).T
    wanted = (root @ target.double()).flatten()
    solution = torch.linalg.lstsq(matrix, wanted[:, None], driver="gelsd").solution[:, 0]
    return float((wanted - matrix @ solution).square().sum()), solution


def codebook_basis(segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """What every single codebook entry adds to the decoded weight, and the weight of empty codebooks."""
    kept = [segment.stages for segment in segments]
    for segment in segments:
        segment.stages = [torch.zeros_like(book) for book in segment.stages]
    nothing = decode_all(segments)
    basis = []
    for segment in segments:
        for book in segment.stages:
            for position in range(book.numel()):
                book.view(-1)[position] = 1.0
                basis.append(decode_all(segments) - nothing)
                book.view(-1)[position] = 0.0
    for segment, stages in zip(segments, kept, strict=True):
        segment.stages = stages
    return torch.stack(basis), nothing


@pytest.mark.parametrize("sizes", [(6,), (4, 3)])
@pytest.mark.parametrize("bounds", [[0, 12], [0, 2, 7, 12]])
def test_codebooks_reach_the_optimum_of_the_normal_equations(sizes: tuple[int, ...], bounds: list[int]) -> None:
    weight, hessian = problem(18, 12)
    columns = weight.T.contiguous()
    segments = random_segments(columns, bounds, sizes, vector_len=4)
    before = loss_of(columns - decode_all(segments), hessian)
    basis, nothing = codebook_basis(segments)
    best, _ = least_squares_loss(basis, columns - nothing, hessian)
    decoded = refit_codebooks(columns, hessian, segments, iterations=400)
    assert torch.equal(decode_all(segments), decoded)
    assert best * (1 - 1e-4) <= loss_of(columns - decoded, hessian) <= best * (1 + 1e-3)
    assert best < 0.9 * before, "the test shows nothing where there is nothing to gain"


@settings(max_examples=30)
@given(st.integers(0, 2**20), st.sampled_from([(2,), (16,), (8, 4)]), st.booleans())
def test_no_step_raises_the_loss(seed: int, sizes: tuple[int, ...], grouped: bool) -> None:
    weight, hessian = problem(22, 14, seed)
    columns = weight.T.contiguous()
    segments = random_segments(columns, [0, 3, 9, 14] if grouped else [0, 14], sizes, vector_len=4, seed=seed)
    before = loss_of(columns - decode_all(segments), hessian)
    for _ in range(4):
        after = loss_of(columns - refit_codebooks(columns, hessian, segments, iterations=1), hessian)
        assert after <= before * (1 + 1e-5)
        before = after


def test_a_few_steps_gain_most_of_what_there_is() -> None:
    weight, hessian = problem(64, 32)
    columns = weight.T.contiguous()
    losses = {}
    for steps in (0, 5, 300):
        segments = random_segments(columns, [0, 32], (16,), vector_len=4)
        losses[steps] = loss_of(columns - refit_codebooks(columns, hessian, segments, steps), hessian)
    assert losses[0] - losses[5] > 0.8 * (losses[0] - losses[300])


def test_conjugate_gradients_need_a_step_for_each_centroid() -> None:
    """The elements of a vector do not interact and have the same equations, so as many steps as centroids suffice."""
    weight, hessian = problem(64, 12, seed=2)
    columns = weight.T.contiguous()
    none, few, many = (
        loss_of(
            columns - refit_codebooks(columns, hessian, random_segments(columns, [0, 12], (4,), 4, seed=2), steps),
            hessian,
        )
        for steps in (0, 4, 400)
    )
    assert few - many < 1e-4 * (none - many), "steepest descent leaves more"


def test_a_diagonal_stands_for_a_diagonal_hessian() -> None:
    weight, hessian = problem(22, 12)
    columns = weight.T.contiguous()
    dense = random_segments(columns, [0, 5, 12], (8, 4), vector_len=4)
    short = random_segments(columns, [0, 5, 12], (8, 4), vector_len=4)
    expected = refit_codebooks(columns, torch.diag(hessian.diagonal()), dense, iterations=5)
    torch.testing.assert_close(refit_codebooks(columns, hessian.diagonal(), short, iterations=5), expected)


def test_under_a_diagonal_hessian_a_centroid_is_the_weighted_mean_of_its_vectors() -> None:
    weight, hessian = problem(20, 12)
    columns = weight.T.contiguous()
    (segment,) = random_segments(columns, [0, 12], (4,), vector_len=4)
    refit_codebooks(columns, hessian.diagonal(), [segment], iterations=30)
    cost = (hessian.diagonal() * segment.scale.square()).repeat_interleave(5)
    vectors, owner = segment.normalized(columns), segment.indices[0].flatten()
    for number in owner.unique():
        mine = owner == number
        mean = (vectors[mine] * cost[mine, None]).sum(0) / cost[mine].sum()
        torch.testing.assert_close(segment.stages[0][number], mean, rtol=1e-4, atol=1e-4)


def test_a_centroid_nobody_uses_stays_where_it_is() -> None:
    weight, hessian = problem(20, 12)
    columns = weight.T.contiguous()
    (segment,) = random_segments(columns, [0, 12], (8,), vector_len=4)
    segment.indices[0][segment.indices[0] == 3] = 4
    before = segment.stages[0].clone()
    refit_codebooks(columns, hessian, [segment], iterations=5)
    assert torch.equal(segment.stages[0][3], before[3])
    assert bool(torch.isfinite(segment.stages[0]).all())
    assert not torch.equal(segment.stages[0][4], before[4])


def normalization_basis(segments: list[Segment]) -> torch.Tensor:
    """What every scale, then every shift, adds to the decoded weight."""
    gathered = torch.cat([segment.gather(segment.stages) for segment in segments])
    width, rows = gathered.shape
    basis = torch.zeros(2 * width, width, rows)
    for column in range(width):
        basis[column, column] = gathered[column]
        basis[width + column, column] = 1.0
    return basis


def ridge_solution(columns: torch.Tensor, hessian: torch.Tensor, segments: list[Segment]) -> tuple[float, torch.Tensor]:
    """Scales and shifts that minimize the loss plus AFFINE_RIDGE of what holds the scales where they are; its loss."""
    basis, scale = normalization_basis(segments), torch.cat([segment.scale for segment in segments])
    root = torch.linalg.cholesky(hessian.double()).T
    matrix, wanted = (root @ basis.double()).flatten(1).T, (root @ columns.double()).flatten()
    width = len(scale)
    centered = basis[:width].sum(1) - basis[:width].sum(1).mean(1, keepdim=True)
    ridge = AFFINE_RIDGE * float((hessian.diagonal() * centered.square().sum(1)).mean())
    anchors = ridge**0.5 * torch.eye(width, 2 * width, dtype=torch.float64)
    solution = torch.linalg.lstsq(
        torch.cat([matrix, anchors]), torch.cat([wanted, ridge**0.5 * scale.double()])[:, None], driver="gelsd"
    ).solution[:, 0]
    return float((wanted - matrix @ solution).square().sum()), solution


@pytest.mark.parametrize("bounds", [[0, 12], [0, 2, 7, 12]])
def test_normalization_is_the_joint_least_squares_solution(bounds: list[int]) -> None:
    weight, hessian = problem(40, 12)
    columns = weight.T.contiguous()
    segments = random_segments(columns, bounds, (16, 4), vector_len=4)
    before = loss_of(columns - decode_all(segments), hessian)
    best, solution = ridge_solution(columns, hessian, segments)
    decoded = refit_normalization(columns, hessian, segments, torch.float32)
    assert torch.equal(decode_all(segments), decoded)
    assert loss_of(columns - decoded, hessian) == pytest.approx(best, rel=1e-3)
    assert best < 0.9 * before
    scale = torch.cat([segment.scale for segment in segments])
    shift = torch.cat([segment.shift for segment in segments])
    torch.testing.assert_close(scale, solution[:12].float(), rtol=0.01, atol=0.01)
    torch.testing.assert_close(shift, solution[12:].float(), rtol=0.01, atol=0.01)


@settings(max_examples=30)
@given(st.integers(0, 2**20), st.sampled_from([(2,), (16,), (8, 4)]))
def test_normalization_never_raises_the_loss(seed: int, sizes: tuple[int, ...]) -> None:
    weight, hessian = problem(22, 14, seed)
    columns = weight.T.contiguous()
    segments = random_segments(columns, [0, 5, 14], sizes, vector_len=4, seed=seed)
    before = loss_of(columns - decode_all(segments), hessian)
    for _ in range(3):
        after = loss_of(columns - refit_normalization(columns, hessian, segments, torch.float32), hessian)
        assert after <= before * (1 + 1e-3)
        before = after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_normalization_is_rounded_to_what_is_stored(dtype: torch.dtype) -> None:
    weight, hessian = problem(22, 14)
    columns = weight.T.contiguous()
    segments = random_segments(columns, [0, 14], (16,), vector_len=4)
    refit_normalization(columns, hessian, segments, dtype)
    for values in (segments[0].scale, segments[0].shift):
        assert torch.equal(values, values.to(dtype).float())


def test_constant_and_empty_columns_keep_a_usable_scale() -> None:
    """The best scale for them is zero, which no later assignment could leave."""
    columns = problem(20, 8)[0].T.contiguous()
    columns[2], columns[5] = 0.0, 1.5
    segments = random_segments(columns, [0, 8], (16,), vector_len=4)
    before = segments[0].scale.clone()
    decoded = refit_normalization(columns, torch.eye(8), segments, torch.float32)
    assert bool(torch.isfinite(decoded).all())
    assert bool((segments[0].scale.abs() > 1e-3 * before).all())


def test_codebooks_and_normalization_leave_indices_and_weight_alone() -> None:
    weight, hessian = problem(22, 14)
    columns = weight.T.contiguous()
    kept = columns.clone()
    segments = random_segments(columns, [0, 14], (16,), vector_len=4)
    indices = segments[0].indices[0].clone()
    refit_codebooks(columns, hessian, segments, iterations=3)
    refit_normalization(columns, hessian, segments, torch.float32)
    assert torch.equal(segments[0].indices[0], indices)
    assert torch.equal(columns, kept)
