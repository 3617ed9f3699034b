"""`vptq::add_products`, the kernel in use and PyTorch's code: sums in float32 of products that the kernel rounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_counts import with_each_thread_count
from torch import Tensor

from vptq import ops
from vptq.errors import ConfigError
from vptq.ops import products

AddProducts = Callable[..., None]


def plain(sums: Tensor, left: Tensor, right: Tensor, *, upper: bool = False) -> None:
    products.add_products(sums, left, right, upper)


BOTH = pytest.mark.parametrize("add_products", [ops.add_products, plain], ids=["active", "torch"])
HAS_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("vptq::add_products", "CPU")
ROUNDED = pytest.mark.skipif(not HAS_KERNEL, reason="no kernel for it here: no instructions for bfloat16, or not built")
tokens = st.one_of(st.integers(0, 70), st.sampled_from([511, 512, 513, 1025]))  # a pass of the kernel takes 512
columns = st.one_of(st.integers(1, 20), st.sampled_from([47, 48, 49, 96, 103, 150]))  # and its panels have 48
DTYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that bfloat16 holds: products are exact either way."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


@BOTH
@given(tokens, columns, columns, st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 2**31))
@settings(deadline=None)
def test_sums_of_any_size(
    add_products: AddProducts, count: int, rows: int, across: int, kind: torch.dtype, other: torch.dtype, seed: int
) -> None:
    left, right = random(count, rows, seed=seed, dtype=kind), random(count, across, seed=seed + 1, dtype=other)
    sums = random(rows, across, seed=seed + 2)
    expected = sums.double() + left.double().T @ right.double()
    add_products(sums, left, right)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-4)


@BOTH
@given(tokens, st.one_of(columns, st.just(400)), st.booleans(), st.integers(0, 2**31))
@settings(deadline=None)
def test_the_upper_half_is_all_there(
    add_products: AddProducts, count: int, features: int, same_tensor: bool, seed: int
) -> None:
    rows = random(count, features, seed=seed)
    sums = torch.zeros(features, features)
    add_products(sums, rows, rows if same_tensor else rows.clone(), upper=True)
    expected = rows.double().T @ rows.double()
    torch.testing.assert_close(sums.double().triu(), expected.triu(), rtol=1e-5, atol=1e-4)


@ROUNDED
def test_the_kernel_leaves_out_half_of_the_work() -> None:
    rows = random(20, 200)
    sums = torch.zeros(200, 200)
    ops.add_products(sums, rows, rows, upper=True)
    assert not sums[150:, :48].any()


@ROUNDED
def test_the_kernel_rounds_to_nearest_even() -> None:
    numbers = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1e-3, 3.0e38]])
    sums = torch.zeros(5, 1)
    ops.add_products(sums, numbers, torch.ones(1, 1))
    assert sums.flatten().tolist() == numbers.bfloat16().float().flatten().tolist()
    assert sums[0] != sums[2]


@BOTH
def test_transposed_and_sliced_inputs(add_products: AddProducts) -> None:
    left, right = random(30, 40).T[:, :20], random(40, 60, seed=1)[:, ::2]
    sums = torch.zeros(20, 30)
    add_products(sums, left, right)
    torch.testing.assert_close(sums.double(), left.double().T @ right.double(), rtol=1e-5, atol=1e-4)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(add_products: AddProducts, value: float) -> None:
    rows = random(9, 5)
    rows[8, 3] = value
    sums = torch.zeros(5, 5)
    add_products(sums, rows, rows, upper=True)
    assert not torch.isfinite(sums[3, 3])
    assert torch.isfinite(sums[:3, :3]).all()


@ROUNDED
@pytest.mark.parametrize("upper", [False, True])
def test_every_number_of_threads_gives_the_same_bytes(upper: bool) -> None:
    rows = torch.randn(700, 333, generator=torch.Generator().manual_seed(0))

    def summed() -> Tensor:
        sums = torch.zeros(333, 333)
        ops.add_products(sums, rows, rows, upper=upper)
        return sums

    results = with_each_thread_count(summed)
    assert all(torch.equal(results[0], other) for other in results)


@BOTH
@pytest.mark.parametrize(
    ("sums", "left", "right"),
    [((3, 4), (5, 3), (6, 4)), ((3, 5), (5, 3), (5, 4)), ((4, 4), (5, 3), (5, 4)), ((3, 4), (5, 3), (5, 4, 1))],
    ids=["tokens", "columns", "rows", "dimensions"],
)
def test_shapes_that_do_not_fit(
    add_products: AddProducts, sums: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    with pytest.raises((ConfigError, RuntimeError), match=r"sums|right"):
        add_products(torch.zeros(sums), torch.zeros(left), torch.zeros(right))


@ROUNDED
def test_what_the_kernel_cannot_read() -> None:
    rows = torch.zeros(5, 3)
    with pytest.raises(RuntimeError, match=r"left must be float32 or bfloat16; convert it with \.float\(\)"):
        ops.add_products(torch.zeros(3, 3), rows.double(), rows)
    with pytest.raises(RuntimeError, match="sums must be float32"):
        ops.add_products(torch.zeros(3, 3).double(), rows, rows)
    with pytest.raises(RuntimeError, match=r"sums must be contiguous \[3, 3\]"):
        ops.add_products(torch.zeros(3, 6)[:, ::2], rows, rows)


@pytest.mark.parametrize("upper", [False, True])
def test_opcheck(upper: bool) -> None:
    arguments = (torch.zeros(4, 5), torch.randn(7, 4), torch.randn(7, 5), upper)
    torch.library.opcheck(torch.ops.vptq.add_products.default, arguments)
