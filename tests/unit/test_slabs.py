"""A weight solved slab by slab is about as good as one solved at once, and what is stored has the loss that is said."""

from typing import Any

import pytest
import torch
from solver_problems import loss_of, problem, seeded

from vptq.config import LayerConfig
from vptq.quantize import slabs
from vptq.quantize.hessian import Moments
from vptq.quantize.slabs import StoredWeight, _spread, quantize_stored
from vptq.quantize.solver import SolverConfig
from vptq.reference import dequantize

OUT, IN = 1021, 32  # no multiple of any vector length
SHIFT = 0.05 * torch.randn(IN, IN, generator=seeded(3))
OUTLIERS = {"outlier_size": 4, "outlier_vector_len": 6, "outlier_num_centroids": 16, "num_groups": 2}


def solve(config: LayerConfig, **options: Any) -> tuple[StoredWeight, float]:
    """What is stored, and its proxy loss for the weight that was to be met."""
    weight, hessian = problem(OUT, IN)
    moments = Moments(hessian, SHIFT)
    bias = torch.arange(OUT).float() if config.bias else None
    found = quantize_stored(
        weight.bfloat16(), moments, config, seeded(0), dtype=torch.float32, bias=bias, solver=SolverConfig(), **options
    )
    target = moments.target(weight.bfloat16())
    error = target - dequantize(found.config, found.tensors)
    return found, loss_of(error.T, hessian) / loss_of(target.T, hessian)


@pytest.mark.parametrize(
    "options", [{}, {"num_residual_centroids": 8}, {"enable_norm": True}, {"enable_perm": True}, OUTLIERS]
)
@pytest.mark.parametrize("absorb_perm", [False, True])
def test_slabs_lose_little_more_than_the_whole(
    absorb_perm: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LayerConfig(IN, OUT, **{"vector_len": 4, "num_centroids": 32, "bias": True} | options)
    whole, loss = solve(config, absorb_perm=absorb_perm)
    monkeypatch.setattr(slabs, "LARGEST_AT_ONCE", 500 * IN)
    monkeypatch.setattr(slabs, "SLAB", 500 * IN)
    parts, loss_of_parts = solve(config, absorb_perm=absorb_perm)
    assert parts.config == whole.config
    assert {name: t.shape for name, t in parts.tensors.items()} == {name: t.shape for name, t in whole.tensors.items()}
    assert torch.equal(parts.tensors["bias"], whole.tensors["bias"])
    assert parts.losses["descent"] == pytest.approx(loss_of_parts, rel=1e-3)
    assert loss_of_parts < 1.15 * loss


def test_rows_are_spread_over_the_whole_weight() -> None:
    rows = _spread(509, 148, 4)
    assert len(rows) == 148 == len(rows.unique())
    assert torch.equal(rows.view(-1, 4)[:, 0] % 4, torch.zeros(37, dtype=torch.int64))
    assert torch.equal(rows.view(-1, 4)[:, 3] - rows.view(-1, 4)[:, 0], torch.full((37,), 3))
    assert rows.max() > 490
    assert torch.equal(_spread(10, 40, 4), torch.arange(8))
