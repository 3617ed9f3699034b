"""The solver on a GPU: as good as on the CPU, the same bytes every time; and its sums, which a fake GPU can run too."""

from __future__ import annotations

import pytest
import torch
from fake_gpu import GPU, FakeGpu
from solver_problems import problem, seeded
from torch import Tensor

from vptq.config import LayerConfig
from vptq.ops.scatter import add_by_index
from vptq.quantize import kmeans, slabs
from vptq.quantize.kmeans import weighted_kmeans
from vptq.quantize.solver import Solution, quantize_weight

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
LAYERS = {
    "one codebook": LayerConfig(96, 130, 6, 256),
    "all pairs": LayerConfig(96, 128, 8, 64, num_residual_centroids=64, enable_norm=True),
    "a beam": LayerConfig(128, 512, 8, 1024, num_residual_centroids=256),
}


def solve(config: LayerConfig, device: str) -> Solution:
    weight, hessian = problem(config.out_features, config.in_features)
    return quantize_weight(weight.to(device), hessian.to(device), config, seeded(0))


def tensors(solution: Solution) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in solution.weight.to_tensors(torch.float16).items()}


@pytest.mark.parametrize("layer", [pytest.param(name, marks=NEEDS_GPU) for name in LAYERS])
def test_a_gpu_is_as_good_as_the_cpu_and_gives_the_same_bytes_again(layer: str) -> None:
    """Searches rank centroids that are nearly equally near either way, so indices differ and losses hardly do."""
    config = LAYERS[layer]
    found, again, expected = (solve(config, device) for device in ("cuda", "cuda", "cpu"))
    assert found.losses["descent"] == pytest.approx(expected.losses["descent"], rel=0.03)
    assert found.losses == again.losses
    one, two = tensors(found), tensors(again)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_seeds_of_the_cpu() -> None:
    vectors, weights = torch.randn(5000, 4, generator=seeded(1)), torch.rand(5000, generator=seeded(2))
    on_cpu = weighted_kmeans(vectors, weights, 64, seeded(3), max_iterations=0)
    on_gpu = weighted_kmeans(vectors.cuda(), weights.cuda(), 64, seeded(3), max_iterations=0)
    assert torch.equal(on_gpu.cpu(), on_cpu)


def test_a_scatter_add_on_a_gpu_sums_what_the_cpu_sums() -> None:
    index = torch.randint(0, 5, (300,), generator=seeded(0))
    for values in (torch.randn(300, generator=seeded(1)), torch.randn(300, 3, generator=seeded(2)).double()):
        expected = add_by_index(values.new_zeros(5, *values.shape[1:]), index, values)
        with FakeGpu() as gpu:
            sums = add_by_index(expected.new_zeros(expected.shape, device=GPU), index.to(GPU), values.to(GPU))
            assert "index_put_" in gpu.ran
            assert "index_add_" not in gpu.ran, "its atomics add in any order"
            torch.testing.assert_close(sums.cpu(), expected)


@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 12288])
def test_a_running_sum_on_a_gpu_is_that_of_the_cpu(count: int) -> None:
    mass = torch.rand(count, generator=seeded(0), dtype=torch.float64)
    with FakeGpu():
        running = kmeans._running_sum(mass.to(GPU)).cpu()
    torch.testing.assert_close(running, mass.cumsum(0), rtol=1e-12, atol=0)
    assert bool((running[1:] >= running[:-1]).all())


def test_a_small_gpu_solves_less_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slabs.largest_at_once(torch.device("cpu")) == slabs.LARGEST_AT_ONCE
    for memory, expected in ((141 << 30, slabs.LARGEST_AT_ONCE), (8 << 30, (8 << 30) // slabs.SOLVER_BYTES)):
        monkeypatch.setattr(slabs, "device_memory_bytes", lambda device, memory=memory: memory)
        assert slabs.largest_at_once(GPU) == expected
