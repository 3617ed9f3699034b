"""Indices as bits: the packed row format, and 16-bit indices inside other dtypes.

A row of a packed layer is one LSB-first bit stream in int32 words: value j, the main index with the residual index
above it, occupies bits [j*T, (j+1)*T) with T = index_bits + residual_bits, and may straddle two words. Rows start at
a fresh word. Both directions treat a value as part of a 64-bit window over two words, so that every width from 1 to 32
takes the same few vectorized steps; no width is special.

Where the format stores an index in 16 bits it means a uint16 bit pattern, whatever the dtype that carries it says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vptq.errors import ConfigError

WORD_BITS = 32
_WORD_MASK = 0xFFFFFFFF


def pack(main: Tensor, residual: Tensor | None, index_bits: int, residual_bits: int) -> Tensor:
    """Pack the indices of each row into a bit stream.

    Args:
        main: Main indices [..., count], any integer dtype, in [0, 2**index_bits).
        residual: Residual indices of the same shape in [0, 2**residual_bits); None when `residual_bits` is 0.
        index_bits: Bits of a main index, at least 1.
        residual_bits: Bits of a residual index; 0 for none.

    Returns:
        int32 [..., ceil(count * (index_bits + residual_bits) / 32)]; unused high bits are 0.

    Raises:
        ConfigError: The widths exceed 32 bits together, or an index does not fit its width.
    """
    bits = _check_widths(index_bits, residual_bits)
    if (residual is None) != (residual_bits == 0):
        raise ConfigError(
            f"residual_bits is {residual_bits}, but residual is {'missing' if residual is None else 'given'}"
        )
    values = _checked("main", main, index_bits)
    if residual is not None:
        values = values | _checked("residual", residual, residual_bits) << index_bits

    count = values.shape[-1]
    word, shift = _positions(count, bits, values.device)
    window = values << shift  # below 2**63: a 32-bit value moved by at most 31
    num_words = -(-count * bits // WORD_BITS)
    words = torch.zeros(*values.shape[:-1], num_words + 1, dtype=torch.int64, device=values.device)
    # Neighbours share words but never bits, so adding is or-ing.
    words.scatter_add_(-1, word.expand_as(values), window & _WORD_MASK)
    words.scatter_add_(-1, (word + 1).expand_as(values), window >> WORD_BITS)
    return words[..., :num_words].to(torch.int32)


def unpack(packed: Tensor, index_bits: int, residual_bits: int, count: int) -> tuple[Tensor, Tensor | None]:
    """Invert `pack`.

    Args:
        packed: int32 [..., words].
        index_bits: Bits of a main index, at least 1.
        residual_bits: Bits of a residual index; 0 for none.
        count: Indices per row.

    Returns:
        Main indices int64 [..., count], and residual indices of the same shape or None.

    Raises:
        ConfigError: The widths exceed 32 bits together, or the rows have too few words.
    """
    bits = _check_widths(index_bits, residual_bits)
    num_words = -(-count * bits // WORD_BITS)
    if packed.shape[-1] < num_words:
        raise ConfigError(f"{count} values of {bits} bits need {num_words} words a row; there are {packed.shape[-1]}")
    word, shift = _positions(count, bits, packed.device)
    windows = _windows(packed)
    values = windows.gather(-1, word.expand(*windows.shape[:-1], count))
    # The sign bit of the window is bit 63; a value ends at bit 62 or below, so the arithmetic shift never shows it.
    values >>= shift
    main = values & ((1 << index_bits) - 1)
    if residual_bits == 0:
        return main, None
    values >>= index_bits
    values &= (1 << residual_bits) - 1
    return main, values


def _windows(packed: Tensor) -> Tensor:
    """Every word with the next one above it, as int64 [..., words]: each value lies within one of these."""
    pairs = packed.new_zeros(*packed.shape, 2)
    pairs[..., 0] = packed
    pairs[..., :-1, 1] = packed[..., 1:]
    return pairs.view(torch.int64).squeeze(-1)


def from_carrier(stored: Tensor) -> Tensor:
    """Read an index tensor from any dtype the published versions stored it in, as int64.

    16-bit dtypes, float16 included, carry a uint16 bit pattern; wider integers carry the value.
    """
    if stored.dtype.itemsize == 2:
        return stored.view(torch.int16).to(torch.int64) & 0xFFFF
    return stored.to(torch.int64)


def to_carrier(indices: Tensor) -> Tensor:
    """Store indices in [0, 65536) as uint16 bit patterns inside int16, the format's carrier."""
    return indices.to(torch.int16)


def change_carrier(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The same indices, or the same packed words, carried by another dtype."""
    if stored.dtype == dtype:
        return stored
    indices = from_carrier(stored)
    return to_carrier(indices).view(dtype) if dtype.itemsize == 2 else indices.to(dtype)


def _positions(count: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    start = torch.arange(count, device=device) * bits
    return start // WORD_BITS, start % WORD_BITS


def _check_widths(index_bits: int, residual_bits: int) -> int:
    bits = index_bits + residual_bits
    if index_bits < 1 or residual_bits < 0 or bits > WORD_BITS:
        raise ConfigError(f"{index_bits} + {residual_bits} index bits; a packed value has 1 to {WORD_BITS} bits")
    return bits


def _checked(name: str, indices: Tensor, bits: int) -> Tensor:
    values = indices.to(torch.int64)
    if (values >> bits).any():  # negative numbers keep their sign bits, and fail too
        raise ConfigError(
            f"a {name} index is {int(values.abs().max())} or negative; {bits} bits hold 0..{(1 << bits) - 1}"
        )
    return values
