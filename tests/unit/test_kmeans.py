"""Weighted k-means: what the centroids are, and what it does with awkward data."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from solver_problems import seeded

from vptq.errors import ConfigError
from vptq.ops import nearest
from vptq.quantize import kmeans
from vptq.quantize.kmeans import weighted_kmeans


def weighted_error(vectors: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor) -> float:
    return float((nearest(vectors, centroids)[1][:, 0].double() * weights).sum())


def random_vectors(count: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = seeded(seed)
    return torch.randn(count, length, generator=draw), torch.rand(count, generator=draw) + 0.1


@given(st.integers(2, 40), st.integers(1, 8), st.integers(0, 2**31))
def test_one_centroid_is_the_weighted_mean(count: int, length: int, seed: int) -> None:
    vectors, weights = random_vectors(count, length, seed)
    weights[: count // 2] = 0  # vectors without weight have no say
    mean = (vectors * weights[:, None]).sum(0) / weights.sum()
    torch.testing.assert_close(weighted_kmeans(vectors, weights, 1, seeded(seed))[0], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_separable_clusters_are_found_exactly_however_rare(seed: int) -> None:
    draw = seeded(seed)
    centers = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)) * 100
    sizes = torch.tensor([1, 1, 500, 3, 50, 2, 1, 200, 5])
    owner = torch.repeat_interleave(torch.arange(9), sizes)
    vectors = centers[owner] + 0.01 * torch.randn(len(owner), 2, generator=draw)
    weights = torch.rand(len(owner), generator=draw) + 0.1
    found = weighted_kmeans(vectors, weights, 9, draw)
    for number, center in enumerate(centers):
        mine = owner == number
        mean = (vectors[mine] * weights[mine, None]).sum(0) / weights[mine].sum()
        closest = found[(found - center).square().sum(1).argmin()]
        torch.testing.assert_close(closest, mean, rtol=1e-4, atol=1e-4)


def test_the_error_falls_with_every_step() -> None:
    vectors, weights = random_vectors(2000, 4)
    errors = [
        weighted_error(
            vectors, weights, weighted_kmeans(vectors, weights, 32, seeded(0), max_iterations=steps, tolerance=0.0)
        )
        for steps in range(12)
    ]
    assert all(after <= before for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.8 * errors[0]


def test_heavy_vectors_get_the_smaller_errors() -> None:
    vectors, _ = random_vectors(1000, 4)
    weights = torch.ones(1000)
    weights[:500] = 100.0
    distances = nearest(vectors, weighted_kmeans(vectors, weights, 64, seeded(0)))[1][:, 0]
    assert float(distances[:500].mean()) < 0.85 * float(distances[500:].mean())


def test_the_unit_of_the_weights_does_not_matter() -> None:
    vectors, weights = random_vectors(300, 4)
    expected = weighted_kmeans(vectors, weights, 16, seeded(0))
    assert torch.equal(weighted_kmeans(vectors, weights * 2.0**30, 16, seeded(0)), expected)
    assert torch.equal(weighted_kmeans(vectors, weights * 2.0**-30, 16, seeded(0)), expected)


def test_weights_that_are_all_zero_count_as_one() -> None:
    vectors, weights = random_vectors(300, 4)
    expected = weighted_kmeans(vectors, torch.ones(300), 16, seeded(0))
    assert torch.equal(weighted_kmeans(vectors, 0 * weights, 16, seeded(0)), expected)


def test_seeding_draws_every_centroid_from_another_vector() -> None:
    """512 centroids are drawn in batches, which must not draw one twice."""
    vectors, weights = random_vectors(700, 2)
    seeds = weighted_kmeans(vectors, weights, 512, seeded(0), max_iterations=0)
    assert seeds.shape == (512, 2)
    assert len(seeds.unique(dim=0)) == 512


def test_empty_clusters_are_given_to_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "_seed", lambda vectors, weights, k, generator: vectors[:1].expand(k, -1).clone())
    vectors, weights = random_vectors(500, 4)
    found = weighted_kmeans(vectors, weights, 32, seeded(0))
    assert len(nearest(vectors, found)[0].unique()) == 32


@pytest.mark.parametrize("count", [1, 5, 8])
def test_vectors_as_few_as_centroids_are_kept_as_they_are(count: int) -> None:
    vectors, weights = random_vectors(count, 4)
    found = weighted_kmeans(vectors, weights, 8, seeded(0))
    assert found.shape == (8, 4)
    assert weighted_error(vectors, weights, found) == 0.0


def test_duplicates_cost_nothing() -> None:
    distinct, _ = random_vectors(3, 4)
    vectors = distinct.repeat(40, 1)
    found = weighted_kmeans(vectors, torch.ones(120), 8, seeded(0))
    assert found.shape == (8, 4)
    assert bool(torch.isfinite(found).all())
    assert weighted_error(vectors, torch.ones(120), found) < 1e-10


def test_only_the_generator_decides() -> None:
    vectors, weights = random_vectors(400, 4)
    first = weighted_kmeans(vectors, weights, 16, seeded(7))
    torch.manual_seed(99)
    assert torch.equal(weighted_kmeans(vectors, weights, 16, seeded(7)), first)
    assert not torch.equal(weighted_kmeans(vectors, weights, 16, seeded(8)), first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["vectors", "weights"])
def test_values_that_are_not_finite_are_refused(where: str, value: float) -> None:
    vectors, weights = random_vectors(50, 4)
    (vectors[7] if where == "vectors" else weights)[3] = value
    with pytest.raises(ConfigError, match="NaN or infinite"):
        weighted_kmeans(vectors, weights, 4, seeded(0))


@pytest.mark.parametrize(("count", "centroids"), [(0, 4), (10, 0)])
def test_nothing_to_cluster_is_refused(count: int, centroids: int) -> None:
    with pytest.raises(ConfigError, match=rf"got {count} and {centroids}"):
        weighted_kmeans(torch.zeros(count, 4), torch.ones(count), centroids, seeded(0))
