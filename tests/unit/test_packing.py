"""The bit stream: the format's own examples, every width, and values that cannot be stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vptq.config import INDEX_CARRIERS
from vptq.errors import ConfigError
from vptq.packing import change_carrier, from_carrier, pack, to_carrier, unpack


def words(text: str) -> torch.Tensor:
    """Words as the format's documentation prints them, in hexadecimal."""
    return torch.tensor([int(word, 16) for word in text.split()]).to(torch.int32)


@pytest.mark.parametrize(
    ("main", "residual", "index_bits", "residual_bits", "stream"),
    [
        ([0xABC, 0x123, 0xFFF], [0x45, 0x67, 0x89], 12, 8, "12345ABC 089FFF67"),
        ([0x1234, 0x1FFF, 0x0001], None, 13, 0, "07FFF234 00000000"),
        ([0x1234, 0xBEEF], [0xCAFE, 0x8001], 16, 16, "CAFE1234 8001BEEF"),
    ],
)
def test_worked_examples_of_the_format(
    main: list[int], residual: list[int] | None, index_bits: int, residual_bits: int, stream: str
) -> None:
    second = None if residual is None else torch.tensor(residual)
    packed = pack(torch.tensor(main), second, index_bits, residual_bits)
    assert packed.dtype == torch.int32
    assert torch.equal(packed, words(stream))


def bit_string(main: torch.Tensor, residual: torch.Tensor | None, index_bits: int, residual_bits: int) -> int:
    """One row as a single big integer, straight from the definition."""
    total = 0
    for j, value in enumerate(main.tolist()):
        above = 0 if residual is None else int(residual[j])
        total |= (value | above << index_bits) << j * (index_bits + residual_bits)
    return total


@given(st.integers(1, 32), st.integers(0, 31), st.integers(0, 70), st.integers(0, 2**31))
def test_stream_is_the_definition_and_inverts(index_bits: int, residual_bits: int, count: int, seed: int) -> None:
    residual_bits = min(residual_bits, 32 - index_bits)
    draw = torch.Generator().manual_seed(seed)
    shape = (2, 3, count)
    main = torch.randint(2**index_bits, shape, generator=draw)
    residual = torch.randint(2**residual_bits, shape, generator=draw) if residual_bits else None

    packed = pack(main, residual, index_bits, residual_bits)
    assert packed.shape == (2, 3, -(-count * (index_bits + residual_bits) // 32))
    for g in range(2):
        for r in range(3):
            second = None if residual is None else residual[g, r]
            expected = bit_string(main[g, r], second, index_bits, residual_bits)
            found = sum((word & 0xFFFFFFFF) << 32 * n for n, word in enumerate(packed[g, r].tolist()))
            assert found == expected

    again, again_residual = unpack(packed, index_bits, residual_bits, count)
    assert torch.equal(again, main)
    assert (again_residual is None) == (residual is None)
    assert residual is None or torch.equal(again_residual, residual)


def test_unused_high_bits_are_ignored() -> None:
    main = torch.tensor([5, 6, 7])
    packed = pack(main, None, 3, 0) | torch.tensor([-1 << 9], dtype=torch.int32)
    assert torch.equal(unpack(packed, 3, 0, 3)[0], main)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_any_integer_dtype_packs(dtype: torch.dtype) -> None:
    main = torch.tensor([[3, 0, 255]])
    assert torch.equal(unpack(pack(main.to(dtype), None, 8, 0), 8, 0, 3)[0], main)


@pytest.mark.parametrize("wrong", [256, -1, 2**40])
def test_an_index_that_does_not_fit_is_refused(wrong: int) -> None:
    fitting, bad = torch.tensor([1, 2]), torch.tensor([1, wrong])
    with pytest.raises(ConfigError, match="main index"):
        pack(bad, None, 8, 0)
    with pytest.raises(ConfigError, match="residual index"):
        pack(fitting, bad, 8, 8)


@pytest.mark.parametrize(("index_bits", "residual_bits"), [(0, 0), (0, 8), (17, 16), (33, 0), (8, -1)])
def test_widths_are_checked(index_bits: int, residual_bits: int) -> None:
    with pytest.raises(ConfigError, match="index bits"):
        unpack(torch.zeros(4, dtype=torch.int32), index_bits, residual_bits, 1)


def test_residual_and_its_width_go_together() -> None:
    main = torch.tensor([1])
    with pytest.raises(ConfigError, match="residual is missing"):
        pack(main, None, 8, 8)
    with pytest.raises(ConfigError, match="residual is given"):
        pack(main, main, 8, 0)


def test_short_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="need 2 words a row; there are 1"):
        unpack(torch.zeros(1, dtype=torch.int32), 8, 0, 5)


def test_carriers_keep_the_bit_pattern() -> None:
    every = torch.arange(65536)
    carried = to_carrier(every)
    assert carried.dtype == torch.int16
    assert carried[40000] == -25536
    for carrier in (carried, carried.view(torch.uint16), carried.view(torch.float16), every, every.to(torch.int32)):
        assert torch.equal(from_carrier(carrier), every)


@pytest.mark.parametrize("dtype", INDEX_CARRIERS, ids=str)
def test_indices_change_their_carrier_and_not_their_values(dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16)
    carried = change_carrier(to_carrier(every), dtype)
    assert carried.dtype == dtype
    assert torch.equal(from_carrier(carried), every)
    words = torch.tensor([-1, 1 << 30], dtype=torch.int32)
    assert change_carrier(words, torch.int32) is words
