"""Where codebooks lie, what the CUDA kernel takes, and that a launch covers a layer on every card."""

from __future__ import annotations

import pytest
import torch
from cuda_layers import A100, FORMS, H100, KIB, RTX_4090, T4
from hypothesis import given
from hypothesis import strategies as st

from vptq.ops import cuda_plan, triton_paths
from vptq.ops.cuda_plan import STEP, TOKENS, Card, kind_of, obstacle, plan


@pytest.mark.parametrize(
    ("form", "card", "copies"),
    [
        ("v8-k256-256", H100, (8, 8)),
        ("v4-k256", H100, (16, 0)),
        ("v8-k4096", H100, (2, 0)),
        ("v8-k4096", RTX_4090, (1, 0)),
        ("v8-k4096", T4, (0, 0)),
        ("v8-k4096-256", A100, (1, 8)),
        ("v8-k4096-256", RTX_4090, (1, 4)),
        ("v8-k65536", H100, (0, 0)),
        ("v8-k65536-256", H100, (0, 8)),
        ("v12-k4096-4096", H100, (1, 1)),
    ],
)
def test_where_codebooks_lie(form: str, card: Card, copies: tuple[int, int]) -> None:
    kind = kind_of(torch.float16, *FORMS[form], card)
    assert kind is not None
    assert (kind.copies, kind.residual_copies) == copies
    said = cuda_plan.describe(kind)
    assert ("second-level cache" in said) == (copies[0] == 0)
    assert (f"{copies[0]} times" in said) == (copies[0] > 1)


@given(
    form=st.sampled_from(sorted(FORMS)),
    card=st.sampled_from((H100, A100, RTX_4090, T4, Card(3, 48 * KIB))),
    tokens=st.integers(1, TOKENS[-1]),
    rows=st.lists(st.integers(1, 30000), min_size=1, max_size=cuda_plan.LAYERS).map(tuple),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 30000),
)
def test_a_launch_covers_the_layer_within_the_card(
    form: str, card: Card, tokens: int, rows: tuple[int, ...], groups: int, group_size: int
) -> None:
    kind = kind_of(torch.float16, *FORMS[form], card)
    if kind is None:
        return
    launch = plan(kind, tokens, rows, groups, group_size, card)
    assert launch.tokens >= tokens
    assert launch.shared_bytes <= card.shared_bytes
    assert launch.columns % STEP == 0
    assert (launch.slices_a_group - 1) * launch.columns < group_size <= launch.slices_a_group * launch.columns
    assert launch.grid[1] == groups * launch.slices_a_group
    assert launch.grid[0] == sum(launch.blocks)
    assert len(launch.blocks) == len(rows)
    assert min(launch.blocks) >= 1
    assert sum(blocks for blocks in launch.blocks if blocks > 1) * launch.grid[1] <= card.multiprocessors
    assert launch.threads // 32 % launch.across == 0
    assert launch.across * STEP <= launch.columns
    at_once = launch.kind.vector_len * launch.kind.rows(launch.tokens) * (launch.threads // 32 // launch.across)
    longest = max(-(-outputs // (at_once * blocks)) for outputs, blocks in zip(rows, launch.blocks, strict=True))
    assert launch.steps == longest * -(-launch.columns // (STEP * launch.across))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(8192, 28672), (28672, 8192)])
def test_a_block_gathers_few_inputs_and_waits_for_few_others(form: str, shape: tuple[int, int]) -> None:
    """At one token: a twelfth of the columns or less, and nine tenths of the card busy all the time."""
    kind = kind_of(torch.float16, *FORMS[form], H100)
    assert kind is not None
    rows, columns = shape
    launch = plan(kind, 1, (rows,), 1, columns, H100)
    assert launch.columns <= columns / 12
    steps = -(-rows // (kind.vector_len * kind.rows(1))) * columns / STEP
    assert steps / (launch.steps * launch.threads // 32 * H100.multiprocessors) >= 0.9


def test_what_is_small_is_not_cut_into_more_than_it_is() -> None:
    kind = kind_of(torch.float16, *FORMS["v8-k4096"], H100)
    assert kind is not None
    launch = plan(kind, 1, (64,), 1, 256, H100)
    assert launch.grid == (1, 1)
    assert plan(kind, 1, (64,), 3, 256, H100).grid == (1, 3), "a group of columns has codebooks of its own"


def test_layers_of_one_launch_share_the_card_by_their_rows() -> None:
    kind = kind_of(torch.float16, *FORMS["v8-k4096"], H100)
    assert kind is not None
    launches = [plan(kind, 1, rows, 1, 4096, H100) for rows in ((4096, 1024, 1024), (11008, 11008), (64, 16, 16))]
    first, second, third = (launch.blocks for launch in launches)
    assert first[0] >= 3 * first[1] == 3 * first[2]
    assert second[0] == second[1]
    assert third == (1, 1, 1), "no more than they have work for"


def test_a_card_too_small_for_a_step_is_left_to_triton() -> None:
    assert kind_of(torch.float16, *FORMS["v16-k65536-65536"], T4) is not None
    assert kind_of(torch.float16, *FORMS["v16-k65536-65536"], Card(40, 16 * KIB)) is None
    assert "not even a step" in cuda_plan.describe(None)


@pytest.mark.parametrize(
    ("v", "dtype", "packed", "outliers", "capability", "why"),
    [
        (8, torch.float16, True, False, (7, 0), ""),
        (6, torch.bfloat16, True, False, (9, 0), ""),
        (8, torch.float16, True, False, (6, 1), "6.1 is older than 7.0"),
        (8, torch.float32, True, False, (9, 0), "float32 layers"),
        (10, torch.float16, True, False, (9, 0), "vectors of 10"),
        (8, torch.float16, False, False, (9, 0), "unpacked"),
        (8, torch.float16, True, True, (9, 0), "outlier"),
    ],
)
def test_what_the_kernel_takes(
    v: int, dtype: torch.dtype, packed: bool, outliers: bool, capability: tuple[int, int], why: str
) -> None:
    said = obstacle(v, dtype, packed, outliers, capability)
    assert why in said
    assert bool(said) == bool(why)


def test_up_to_eight_tokens_go_to_it() -> None:
    ways = [triton_paths.choose(tokens, cuda=True) for tokens in (0, 1, 8, 9, 64, 65)]
    assert ways == ["vector", "cuda", "cuda", "tiles", "tiles", "dense"]
    assert TOKENS[-1] == triton_paths.CUDA_TOKENS, "more would need another kernel"
    said = [(tokens, way) for tokens, way, _ in triton_paths.describe(8, torch.float16, (9, 0), "in shared memory")]
    assert said == [("1 to 8", "cuda"), ("9 to 64", "tiles"), ("65 or more", "dense")]
    said = [(tokens, way) for tokens, way, _ in triton_paths.describe(8, torch.float16, (7, 0), "in shared memory")]
    assert said == [("1 to 8", "cuda"), ("9 or more", "torch")], "too old for Triton"
