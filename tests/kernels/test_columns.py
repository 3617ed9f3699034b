"""`vptq::assign_columns`, in PyTorch and on every instruction set of this machine, against its definition."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from column_problems import IMPLEMENTATIONS, Assign, Problem, make
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_counts import with_each_thread_count
from torch import Tensor

from vptq import ops
from vptq.ops import columns as in_torch


def vectors_of(problem: Problem, dense: Tensor) -> Tensor:
    """[n, vectors, v] in float64; padding is zero."""
    v = problem.main.shape[1]
    padded = torch.nn.functional.pad(dense.double(), (0, -dense.shape[1] % v))
    return padded.view(len(dense), -1, v)


def distances_to_all(problem: Problem, target: Tensor) -> Tensor:
    """[n, vectors, pairs]: squared distances in the units of the codebook, rows of the padding left out."""
    inside = vectors_of(problem, torch.ones_like(target))[:, :, None]
    x = vectors_of(problem, (target.double() - problem.shift[:, None]) / problem.scale[:, None])
    sums = problem.main.double()
    if problem.residual is not None:
        sums = (sums[:, None] + problem.residual.double()).flatten(0, 1)
    if problem.row_weights is not None:
        inside = inside * vectors_of(problem, problem.row_weights[None].sqrt())[:, :, None]
    return ((x[:, :, None] - sums) * inside).square().sum(-1)


def targets_of(problem: Problem, errors: Tensor) -> Tensor:
    if problem.coupling is None:
        return problem.base.double()
    return problem.base.double() + problem.coupling.double().tril(-1) @ errors.double()


def pair_index(problem: Problem, indices: Tensor, residual_indices: Tensor | None) -> Tensor:
    return indices if problem.residual is None else indices * len(problem.residual) + residual_indices


cases = st.tuples(
    st.integers(1, 5),  # columns
    st.sampled_from([1, 3, 4, 8, 17, 24, 49, 201, 400]),  # rows
    st.sampled_from([1, 2, 3, 4, 6, 8]),  # vector length
    st.sampled_from([(1,), (2,), (16,), (37,), (4, 4), (16, 3), (40, 20), (5, 64)]),  # codebooks
    st.booleans(),  # coupled
    st.booleans(),  # held
    st.booleans(),  # weighted
    st.integers(0, 2**20),
)


@settings(max_examples=60, deadline=None)
@given(case=cases)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_column_takes_the_nearest_of_its_own_target(implementation: str, case: tuple) -> None:  # type: ignore[type-arg]
    n, rows, v, sizes, coupled, held, weighted, seed = case
    problem = make(n, rows, v, sizes, coupled=coupled, held=held, seed=seed, weighted=weighted)
    with pytest.MonkeyPatch.context() as patch:
        if implementation != "torch":
            patch.setenv("VPTQ_CPU_ISA", implementation)
        run = in_torch.assign_columns if implementation == "torch" else ops.assign_columns
        values, errors, indices, residual_indices = problem.run(run, beam=sizes[0] + 1)
    torch.testing.assert_close(values, problem.decode(indices, residual_indices))
    target = targets_of(problem, errors)
    torch.testing.assert_close(
        errors.double(),
        values.double() - (target if problem.present is None else problem.present),
        rtol=1e-4,
        atol=1e-4,
    )
    every = distances_to_all(problem, target)
    chosen = every.gather(2, pair_index(problem, indices, residual_indices)[..., None])[..., 0]
    assert bool((chosen <= every.amin(2) * (1 + 1e-4) + 1e-4).all())


@settings(max_examples=60, deadline=None)
@given(case=cases)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_exact_arithmetic_all_agree_to_the_last_bit(implementation: str, case: tuple) -> None:  # type: ignore[type-arg]
    n, rows, v, sizes, coupled, held, weighted, seed = case
    problem = make(min(n, 3), rows, v, sizes, coupled=coupled, held=held, seed=seed, grid=True, weighted=weighted)
    expected = problem.run(in_torch.assign_columns, beam=sizes[0] + 1)
    with pytest.MonkeyPatch.context() as patch:
        if implementation != "torch":
            patch.setenv("VPTQ_CPU_ISA", implementation)
        found = problem.run(ops.assign_columns, beam=sizes[0] + 1)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(300, 300), (16, 16)])
def test_a_beam_of_one_is_greedy_and_a_full_one_exact(assign: Assign, sizes: tuple[int, int]) -> None:
    problem = make(2, 45, 4, sizes, coupled=False, held=False, seed=1)
    every = distances_to_all(problem, problem.base)
    to_main = distances_to_all(replace(problem, residual=None), problem.base)
    _, _, indices, _ = problem.run(assign, beam=1)
    assert torch.equal(indices, to_main.argmin(2))
    found = []
    for beam in (1, 2, 8, 299, 300):
        _, _, indices, residual_indices = problem.run(assign, beam)
        pairs = pair_index(problem, indices, residual_indices)
        found.append(every.gather(2, pairs[..., None])[..., 0])
    for narrow, wide in itertools.pairwise(found):
        assert bool((wide <= narrow + 1e-5).all())
    torch.testing.assert_close(found[-1], every.amin(2), rtol=1e-5, atol=1e-5)
    assert float(found[-1].sum()) < 0.95 * float(found[0].sum())


def test_a_narrow_beam_may_not_replace_a_better_pair(assign: Assign) -> None:
    problem = make(6, 64, 4, (16, 16), coupled=False, held=False, seed=2)
    best, _, indices, residual_indices = problem.run(assign, beam=16)
    held = replace(problem, present=best, indices=indices, residual_indices=residual_indices)
    kept, errors, kept_indices, _ = held.run(assign, beam=1)
    assert torch.equal(kept, best)
    assert torch.equal(kept_indices, indices)
    assert not errors.any(), "what stays has not moved"
    lost = replace(held, present=None).run(assign, beam=1)[0]
    assert float((problem.base - lost).square().sum()) > float((problem.base - best).square().sum())


def test_equal_centroids_do_not_replace_each_other(assign: Assign) -> None:
    problem = make(3, 16, 4, (1,), coupled=False, held=False, seed=3)
    problem = replace(problem, main=problem.main.expand(5, 4).contiguous(), indices=torch.full((3, 4), 3))
    held = replace(problem, present=problem.decode(problem.indices, None))
    assert torch.equal(held.run(assign, 1)[2], held.indices)
    assert not problem.run(assign, 1)[2].any(), "of equals the first, where none is held"


@pytest.mark.parametrize("sizes", [(64,), (32, 16), (300, 300)])
def test_threads_change_nothing(assign: Assign, sizes: tuple[int, ...]) -> None:
    problem = make(9, 1030, 4, sizes, coupled=True, held=False, seed=4)
    one, *more = with_each_thread_count(lambda: problem.run(assign, beam=4))
    assert all(torch.equal(a, b) for other in more for a, b in zip(other, one, strict=True) if a is not None)


def test_a_memory_budget_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_torch, "PRODUCT_LIMIT", 0)
    problem = make(4, 101, 4, (16, 16), coupled=False, held=False, seed=5)
    expected = problem.run(in_torch.assign_columns, beam=4)
    used = []
    search = in_torch._best_pairs
    monkeypatch.setattr(in_torch, "BEAM_ELEMENTS", 4 * 4 * 10)
    monkeypatch.setattr(in_torch, "_best_pairs", lambda x, *rest: (used.append(len(x)), search(x, *rest))[1])
    found = problem.run(in_torch.assign_columns, beam=4)
    assert max(used) == 10, "ten vectors at once"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(8,), (8, 8), (300, 300)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_numbers_that_are_none_get_valid_indices(assign: Assign, sizes: tuple[int, ...], bad: float) -> None:
    problem = make(2, 22, 4, sizes, coupled=True, held=False, seed=6)
    problem.base[0, 5] = bad
    _, _, indices, residual_indices = problem.run(assign, beam=4)
    assert 0 <= int(indices.min()) <= int(indices.max()) < sizes[0]
    if residual_indices is not None:
        assert 0 <= int(residual_indices.min()) <= int(residual_indices.max()) < sizes[1]


@pytest.mark.parametrize(("n", "rows"), [(0, 8), (3, 0)])
def test_nothing_in_nothing_out(assign: Assign, n: int, rows: int) -> None:
    problem = make(n, rows, 4, (8,), coupled=True, held=False, seed=7)
    values, errors, _, _ = problem.run(assign, 1)
    assert values.shape == errors.shape == (n, rows)


def test_inputs_need_not_be_contiguous(assign: Assign) -> None:
    problem = make(5, 30, 4, (16, 8), coupled=True, held=True, seed=8)
    assert problem.coupling is not None
    strided = replace(
        problem, base=problem.base.T.contiguous().T, coupling=problem.coupling.T.contiguous().T, main=problem.main * 1
    )
    for a, b in zip(strided.run(assign, 16), problem.run(assign, 16), strict=True):
        assert torch.equal(a, b)  # type: ignore[arg-type]
