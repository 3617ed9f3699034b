"""Random rotations: orthogonal for every size, the same for the same seed, and spreading."""

import math

import pytest
import torch

from vptq.quantize import rotation
from vptq.quantize.rotation import Rotation

SIZES = (1, 2, 7, 48, 64, 576, 896, 4096)


def of(size: int, seed: int = 0) -> Rotation:
    return Rotation(size, torch.Generator().manual_seed(seed))


def matrix(size: int, seed: int = 0) -> torch.Tensor:
    return of(size, seed)(torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
def test_it_is_orthogonal_to_float64_rounding(size: int) -> None:
    q = matrix(size)
    assert q.shape == (size, size)
    some = slice(None, None, max(1, size // 128))  # of a large matrix, 128 rows against all
    assert float((q[some] @ q.T - torch.eye(size, dtype=torch.float64)[some]).abs().max()) < 1e-13


@pytest.mark.parametrize("size", SIZES)
def test_no_entry_is_much_larger_than_a_hadamard_matrix_would_have(size: int) -> None:
    odd = size // (size & -size)
    bound = math.sqrt((2 if odd > 1 else 1) / size)
    assert float(matrix(size).abs().max()) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("size", [7, 48])
def test_same_seed_same_matrix_and_another_seed_another(size: int) -> None:
    assert torch.equal(matrix(size, 3), matrix(size, 3))
    assert not torch.equal(matrix(size, 3), matrix(size, 4))


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_each_run_along_the_last_dimension_is_a_row_of_its_own(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "CHUNK", chunk)
    tensor = torch.randn(5, 3, 4 * 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([run @ matrix(24) for run in tensor.split(24, dim=-1)], dim=-1)
    torch.testing.assert_close(of(24)(tensor), expected, rtol=1e-13, atol=1e-13)


def test_the_product_is_rounded_once() -> None:
    """A bfloat16 tensor comes back as the bfloat16 nearest to the exact product."""
    tensor = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = of(48)(tensor)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (tensor.double() @ matrix(48)).bfloat16())
