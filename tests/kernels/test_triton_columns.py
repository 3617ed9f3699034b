"""The Triton search behind `vptq::assign_columns`: on a GPU, or interpreted, against the PyTorch one on the CPU."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from column_problems import Problem, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_layers import DEVICES

from vptq.ops import columns as in_torch

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def few_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time by programs, not by their size."""
    if device == "cpu":
        from vptq.ops import triton_search

        monkeypatch.setattr(triton_search, "SETTLE_ROWS", 64)


def run(problem: Problem, beam: int, device: str) -> list[Tensor | None]:
    from vptq.ops import triton_search

    moved: dict[str, Any] = {field.name: getattr(problem, field.name) for field in fields(problem)}
    moved = {name: None if tensor is None else tensor.to(device) for name, tensor in moved.items()}
    found = replace(problem, **moved).run(triton_search.assign_columns, beam)
    return [None if tensor is None else tensor.cpu() for tensor in found]


def same(found: list[Tensor | None], expected: Any) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


cases = st.tuples(
    st.integers(1, 2),  # columns
    st.sampled_from([1, 3, 17, 49]),  # rows
    st.sampled_from([1, 3, 4, 6, 8, 16]),  # vector length
    st.sampled_from([(1,), (2,), (37,), (130,), (4, 4), (16, 3), (40, 20), (5, 80)]),  # codebooks
    st.booleans(),  # coupled
    st.booleans(),  # held
    st.booleans(),  # weighted
    st.integers(0, 2**20),
)


@settings(max_examples=8, deadline=None)
@given(case=cases)
def test_in_exact_arithmetic_it_is_the_pytorch_search_to_the_last_bit(device: str, case: Any) -> None:
    n, rows, v, sizes, coupled, held, weighted, seed = case
    problem = make(n, rows, v, sizes, coupled=coupled, held=held, seed=seed, grid=True, weighted=weighted)
    assert same(run(problem, sizes[0] + 1, device), problem.run(in_torch.assign_columns, sizes[0] + 1))


def distances(problem: Problem, values: Tensor, target: Tensor) -> Tensor:
    """[n, vectors]: squared and weighted, in the units of the codebook."""
    v = problem.main.shape[1]
    difference = (values - target) / problem.scale[:, None]
    if problem.row_weights is not None:
        difference = difference * problem.row_weights.sqrt()
    padded = torch.nn.functional.pad(difference, (0, -difference.shape[1] % v))
    return padded.view(len(values), -1, v).square().sum(-1)


@settings(max_examples=8, deadline=None)
@given(case=cases, beam=st.sampled_from([1, 4]))
def test_a_beam_finds_pairs_as_near_as_the_pytorch_search(device: str, case: Any, beam: int) -> None:
    """With the sums of all pairs out of reach, so that the beam is what is tested; also where vectors are cut short."""
    from vptq.ops import triton_search

    n, rows, v, sizes, _, held, weighted, seed = case
    problem = make(n, rows, v, sizes, coupled=False, held=held, seed=seed, weighted=weighted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_search, "PAIR_LIMIT", 0)
        patch.setattr(in_torch, "PRODUCT_LIMIT", 0)
        values, errors, indices, residual_indices = run(problem, beam, device)
        expected, *_ = problem.run(in_torch.assign_columns, beam)
    assert values is not None
    assert indices is not None
    torch.testing.assert_close(values, problem.decode(indices, residual_indices))
    torch.testing.assert_close(errors, values - (problem.base if problem.present is None else problem.present))
    ours, theirs = (distances(problem, found, problem.base) for found in (values, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(300,), (20, 40)])
@pytest.mark.parametrize("held", [False, True])
def test_rows_that_count_more_decide(device: str, held: bool, sizes: tuple[int, ...]) -> None:
    """Among many tiles of centroids, with a vector cut short at the end, against what all rows counting alike gives."""
    problem = make(2, 75, 6, sizes, coupled=False, held=held, seed=2, grid=True, weighted=True)
    found = run(problem, sizes[0], device)
    assert same(found, problem.run(in_torch.assign_columns, sizes[0]))
    assert not same(found, run(replace(problem, row_weights=None), sizes[0], device))


def test_splits_and_parts_change_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vptq.ops import triton_search

    for sizes, beam in (((200,), 1), ((700, 400), 3)):
        problem = make(2, 75, 6, sizes, coupled=False, held=True, seed=1, weighted=True)
        with monkeypatch.context() as patch:
            expected = run(problem, beam, device)
            patch.setattr(triton_search, "PROGRAMS", 10000)
            patch.setattr(triton_search, "SPLIT_TILES", 0)
            patch.setattr(triton_search, "SCRATCH_BYTES", 1)
            assert same(run(problem, beam, device), expected)


def test_each_column_sees_the_errors_of_those_before_it(device: str) -> None:
    problem = make(4, 60, 4, (50, 40), coupled=True, held=False, seed=3)
    assert problem.coupling is not None
    _, errors, *found = run(problem, 8, device)
    assert errors is not None
    target = problem.base + problem.coupling.tril(-1) @ errors
    alone = replace(problem, base=target, coupling=None)
    assert same(found, run(alone, 8, device)[2:])


def test_indices_that_do_not_lie_side_by_side_are_written_in_place(device: str) -> None:
    from vptq.ops import triton_search

    problem = make(3, 32, 4, (16, 8), coupled=False, held=False, seed=4)
    stored = [torch.full((8, 3), -1, device=device).T for _ in range(2)]
    moved = [
        None if t is None else t.to(device) for t in (problem.scale, problem.shift, problem.main, problem.residual)
    ]
    triton_search.assign_columns(problem.base.to(device), None, None, *moved, *stored, 16)
    assert same([index.cpu() for index in stored], problem.run(in_torch.assign_columns, 16)[2:])


def test_without_columns_or_rows_there_is_nothing_to_do(device: str) -> None:
    for shape in ((0, 8), (2, 0)):
        base, empty = torch.empty(shape, device=device), torch.ones(shape[0], device=device)
        problem = Problem(base, None, None, empty, empty, torch.ones(4, 4, device=device), None, None, None)  # type: ignore[arg-type]
        problem.indices = torch.empty(shape[0], shape[1] // 4, dtype=torch.int64, device=device)
        assert [t.shape for t in run(problem, 1, device)[:2] if t is not None] == [shape, shape]
