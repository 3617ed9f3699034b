"""Random orthogonal matrices that spread every entry of a vector over all of them, for any size.

What QuaRot (arXiv 2404.00456) and SpinQuant (arXiv 2405.16406) rotate with: a randomized Hadamard matrix
Q = diag(s) H, s random signs. A Hadamard matrix of 576 or 4096 * 7 is not at hand for every size, so here
H = H_16 (x) ... (x) H_2^r (x) D: Sylvester's matrices for the power of two in the size and, for the odd rest, the
cosine transform D, whose entries are at most sqrt(2) times as large as a Hadamard matrix's would be. It is orthogonal
to float64 rounding for every size, and as a Kronecker product it takes 16 + 16 + ... products an entry, not `size`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HADAMARD_BITS = 4
"""Log2 of the largest single Hadamard factor: large enough for a matrix product, small enough to be nearly free."""

CHUNK = 2**22
"""Entries in float64 at a time: an embedding of a large model has a hundred times as many."""


class Rotation:
    """An orthogonal matrix Q [size, size], kept as its factors.

    Attributes:
        size: of the vectors it rotates.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self._signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        bits = (size & -size).bit_length() - 1
        self._factors = [_hadamard(HADAMARD_BITS)] * (bits // HADAMARD_BITS)
        self._factors += [_hadamard(bits % HADAMARD_BITS), _cosine_transform(size >> bits)]

    def __call__(self, tensor: Tensor) -> Tensor:
        """Rotates each run of `size` entries along the last dimension: row @ Q, in float64, rounded to the dtype given.

        A last dimension of several runs is several vectors side by side, such as the heads of an attention layer.
        """
        rows = tensor.reshape(-1, self.size)
        chunks = rows.split(max(1, CHUNK // self.size))  # type: ignore[no-untyped-call]
        return torch.cat([self._product(chunk.double()).to(tensor.dtype) for chunk in chunks]).reshape(tensor.shape)

    def _product(self, rows: Tensor) -> Tensor:
        """Rows @ Q. Each factor multiplies the last digit of the position and makes it the first; after all of them the
        digits are in order again."""
        rows = rows * self._signs
        for factor in reversed(self._factors):
            rows = (rows.reshape(len(rows), -1, len(factor)) @ factor).transpose(1, 2).reshape(len(rows), -1)
        return rows


def _hadamard(bits: int) -> Tensor:
    """Sylvester's Hadamard matrix of 2^bits, scaled to be orthogonal."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(bits):
        matrix = torch.kron(matrix, two)
    return matrix / math.sqrt(2**bits)


def _cosine_transform(size: int) -> Tensor:
    """The orthogonal DCT-II of `size`; [[1]] for 1."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos((places[:, None] + 0.5) * places * (math.pi / size)) * math.sqrt(2 / size)
    matrix[:, 0] = math.sqrt(1 / size)
    return matrix
