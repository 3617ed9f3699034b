"""One weight and its Hessian through the whole solver: what comes out, and what the reported losses mean."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import loss_of, problem, seeded

from vptq.config import LayerConfig
from vptq.errors import CalibrationError, ConfigError
from vptq.quantize.solver import Solution, SolverConfig, quantize_weight
from vptq.reference import dequantize


def layer(out_features: int = 22, in_features: int = 26, **changes: Any) -> LayerConfig:
    options: dict[str, Any] = {"vector_len": 4, "num_centroids": 16} | changes
    return LayerConfig(in_features, out_features, **options)


def solve(config: LayerConfig, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Solution:
    weight, hessian = problem(config.out_features, config.in_features)
    return quantize_weight(weight, hessian, config, seeded(seed), dtype=dtype, **options)


def measured_loss(solution: Solution, weight: torch.Tensor, hessian: torch.Tensor, dtype: torch.dtype) -> float:
    """The proxy loss of what a reader of the stored tensors gets."""
    dense = dequantize(solution.weight.config, solution.weight.to_tensors(dtype))
    return loss_of((weight - dense.float()).T, hessian) / loss_of(weight.T, hessian)


def last(losses: dict[str, float]) -> float:
    return list(losses.values())[-1]


def same_tensors(left: Solution, right: Solution) -> bool:
    a, b = (solution.weight.to_tensors(torch.float32) for solution in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


COMBINATIONS = [
    dict(
        zip(("num_groups", "outlier_size", "num_residual_centroids", "enable_norm", "enable_perm"), values, strict=True)
    )
    for values in itertools.product((1, 3), (0, 2), (0, 8), (False, True), (False, True))
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "-".join(str(int(v)) for v in options.values()))
def test_every_combination_stores_a_weight_with_the_loss_it_reports(options: dict[str, Any]) -> None:
    outliers = {"outlier_vector_len": 2, "outlier_num_centroids": 16} if options["outlier_size"] else {}
    config = layer(in_features=24 + options["outlier_size"], **options, **outliers)
    weight, hessian = problem(config.out_features, config.in_features)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
        solution = quantize_weight(weight, hessian, config, seeded(0), dtype=dtype)
        assert solution.weight.config == config
        assert last(solution.losses) == pytest.approx(measured_loss(solution, weight, hessian, dtype), rel=tolerance)
        assert last(solution.losses) < 0.5 * solution.losses["k-means"]
        assert solution.weight.absorb_perm().config.enable_perm == (
            config.enable_perm and (config.num_groups > 1 or config.has_outliers)
        )


@pytest.mark.parametrize("residual", [0, 8])
def test_absorbing_the_permutation_keeps_the_weight(residual: int) -> None:
    solution = solve(layer(enable_perm=True, enable_norm=True, num_residual_centroids=residual))
    free = solution.weight.absorb_perm()
    assert solution.weight.perm is not None
    assert free.perm is None
    expected = dequantize(solution.weight.config, solution.weight.to_tensors(torch.float32))
    assert torch.equal(dequantize(free.config, free.to_tensors(torch.float32)), expected)


@pytest.mark.parametrize("options", [{"num_groups": 2}, {"outlier_size": 2, "outlier_vector_len": 2}])
def test_without_permutation_groups_and_outliers_are_columns_in_natural_order(options: dict[str, Any]) -> None:
    """Half of the columns are ten times larger; in the natural order both kinds are in every group."""
    if "outlier_size" in options:
        options = options | {"outlier_num_centroids": 16}
    config = layer(**options)
    weight, hessian = problem(config.out_features, config.in_features)
    hessian[-1] *= 100
    hessian[:, -1] *= 100
    solution = quantize_weight(weight, hessian, config, seeded(0), dtype=torch.float32)
    assert solution.weight.perm is None
    assert "perm" not in solution.weight.to_tensors(torch.float32)
    assert last(solution.losses) == pytest.approx(measured_loss(solution, weight, hessian, torch.float32), rel=1e-3)


def test_the_permutation_puts_sensitive_columns_first() -> None:
    weight, hessian = problem(22, 26)
    config = layer(enable_perm=True, num_groups=2)
    solution = quantize_weight(weight, hessian, config, seeded(0), dtype=torch.float32)
    assert solution.weight.perm is not None
    diagonal = hessian.diagonal()[solution.weight.perm]
    assert bool((diagonal[:-1] >= diagonal[1:]).all())


def test_outliers_pay() -> None:
    """Two columns far more sensitive than the others, in a finer codebook of their own."""
    weight, hessian = problem(22, 26)
    hessian[[3, 17]] *= 5
    hessian[:, [3, 17]] *= 5
    outliers = {"outlier_size": 2, "outlier_vector_len": 2, "outlier_num_centroids": 16}
    plain, finer = (
        quantize_weight(weight, hessian, layer(enable_perm=True, **options), seeded(0)) for options in ({}, outliers)
    )
    assert last(finer.losses) < 0.8 * last(plain.losses)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=12, max_size=12), st.sampled_from([0, 4]), st.integers(0, 2**20))
def test_normalizing_equals_weighing_the_normalized_weight_with_the_scaled_hessian(
    exponents: list[int], residual: int, seed: int
) -> None:
    """With scales that are powers of two nothing rounds differently, so the two runs agree bit for bit."""
    scale = 2.0 ** torch.tensor(exponents)
    half = torch.randn(16, 12, generator=seeded(seed))
    normalized = torch.cat([half, -half])  # mean zero, exactly: values on a grid, each with its negative
    normalized = (normalized / normalized.square().mean(0).sqrt() * 256).round() / 256
    hessian = problem(32, 12, seed)[1]
    solver = SolverConfig(damping=0.0, refit_rounds=0)
    options: dict[str, Any] = {"num_residual_centroids": residual, "enable_perm": True}
    first = quantize_weight(
        normalized * scale, hessian, layer(32, 12, enable_norm=True, **options), seeded(1), solver=solver
    )
    second = quantize_weight(
        normalized, scale[:, None] * hessian * scale, layer(32, 12, **options), seeded(1), solver=solver
    )
    assert first.weight.weight_scale is not None
    assert torch.equal(first.weight.weight_scale, scale)
    assert first.losses == second.losses
    assert first.damping == second.damping
    expected = second.weight.to_tensors(torch.bfloat16)
    found = first.weight.to_tensors(torch.bfloat16)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_normalization_pays_where_columns_differ_in_size() -> None:
    weight, hessian = problem(64, 24)
    weight = weight * torch.exp(torch.randn(24, generator=seeded(5)))
    plain, normalized = (
        quantize_weight(weight, hessian, layer(64, 24, enable_norm=norm), seeded(0), dtype=torch.float32)
        for norm in (False, True)
    )
    assert last(normalized.losses) < 0.9 * last(plain.losses)


def test_more_bits_less_loss() -> None:
    specs = [(4, 0), (16, 0), (64, 0), (64, 16), (64, 64)]
    weight, hessian = problem(128, 24)
    losses = []
    for main, residual in specs:
        config = layer(128, 24, num_centroids=main, num_residual_centroids=residual)
        losses.append(last(quantize_weight(weight, hessian, config, seeded(0)).losses))
    assert all(after < 0.7 * before for before, after in itertools.pairwise(losses)), losses


def test_stages_are_reported_in_order_and_none_raises_the_loss_from_the_pass_on() -> None:
    solution = solve(layer(num_residual_centroids=8))
    stages = list(solution.losses)
    assert stages[:3] == ["k-means", "joint codebooks", "feedback"]
    assert set(stages[3:]) == {"refit", "descent"}
    assert stages[-1] == "descent"
    values = list(solution.losses.values())
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(values)), solution.losses


def test_the_whole_solver_beats_the_published_two_steps() -> None:
    """k-means and one error-feedback pass are where the paper stops."""
    solution = solve(layer(64, 26))
    assert last(solution.losses) < 0.85 * solution.losses["feedback"] < 0.85 * solution.losses["k-means"]


def test_only_the_generator_decides() -> None:
    config = layer(num_residual_centroids=8, enable_norm=True, enable_perm=True)
    first = solve(config, seed=3)
    torch.manual_seed(99)
    assert same_tensors(solve(config, seed=3), first)
    assert not same_tensors(solve(config, seed=4), first)


def test_block_size_changes_no_index() -> None:
    config = layer(num_residual_centroids=8)
    one, other = (solve(config, solver=SolverConfig(block_size=size)) for size in (5, 128))
    assert torch.equal(one.weight.indices, other.weight.indices)
    assert last(one.losses) == pytest.approx(last(other.losses), rel=1e-3)


@pytest.mark.parametrize("norm", [False, True])
def test_dead_inputs_and_constant_columns_are_harmless(norm: bool) -> None:
    config = layer(enable_norm=norm)
    weight, hessian = problem(22, 26)
    hessian[[3, 9]] = 0
    hessian[:, [3, 9]] = 0
    weight[:, 5], weight[:, 9], weight[:, 11] = 0.25, -1.0, 0.0
    solution = quantize_weight(weight, hessian, config, seeded(0), dtype=torch.float32)
    dense = dequantize(config, solution.weight.to_tensors(torch.float32))
    assert bool(torch.isfinite(dense).all())
    dead = (dense - weight)[:, 3].square().mean() / weight[:, 3].square().mean()
    assert float(dead) < 0.5, "nothing depends on it, but it is quantized like any other column"
    assert 0 < last(solution.losses) == pytest.approx(measured_loss(solution, weight, hessian, torch.float32), rel=1e-3)


def test_the_shift_says_what_a_constant_column_is() -> None:
    config = layer(enable_norm=True)
    weight, _ = problem(22, 26)
    weight[:, 5] = 3.0
    solution = quantize_weight(weight, torch.eye(26), config, seeded(0), dtype=torch.float32)
    dense = dequantize(config, solution.weight.to_tensors(torch.float32))
    assert float((dense - weight)[:, 5].square().mean()) < 0.1 * float((dense - weight).square().mean())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("case", ["zero weight", "zero Hessian", "one row", "one column"])
def test_degenerate_layers_give_finite_weights(case: str, norm: bool) -> None:
    rows, width = (1 if case == "one row" else 22), (1 if case == "one column" else 26)
    config = layer(rows, width, num_centroids=2, enable_norm=norm)
    weight, hessian = problem(rows, width)
    if case == "zero weight":
        weight = torch.zeros_like(weight)
    elif case == "zero Hessian":
        hessian = torch.zeros_like(hessian)
    solution = quantize_weight(weight, hessian, config, seeded(0))
    dense = dequantize(config, solution.weight.to_tensors(torch.bfloat16))
    assert bool(torch.isfinite(dense).all())
    if case == "zero weight":
        assert float(dense.abs().max()) == 0.0
        assert last(solution.losses) == 0.0


def test_raised_damping_is_reported() -> None:
    weight, _ = problem(22, 26)
    direction = torch.randn(26, 2, generator=seeded(0))
    singular = direction @ direction.T
    solution = quantize_weight(weight, singular, layer(), seeded(0), solver=SolverConfig(damping=0.0))
    assert solution.damping > 0.0
    indefinite = singular - 0.05 * singular.diagonal().mean() * torch.eye(26)
    assert quantize_weight(weight, indefinite, layer(), seeded(0)).damping > SolverConfig().damping
    assert solve(layer()).damping == SolverConfig().damping


def test_the_bias_is_passed_through() -> None:
    bias = torch.randn(22, generator=seeded(0))
    config = layer(bias=True)
    stored = solve(config, bias=bias).weight.to_tensors(torch.float32)
    assert torch.equal(stored["bias"], bias)


def test_codebooks_are_what_is_stored() -> None:
    solution = solve(layer(num_residual_centroids=8, enable_norm=True), dtype=torch.bfloat16)
    for name in ("codebook", "residual_codebook", "weight_scale", "weight_bias"):
        values = getattr(solution.weight, name)
        assert torch.equal(values, values.bfloat16().float()), name


@pytest.mark.parametrize("where", ["weight", "hessian"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(where: str, value: float) -> None:
    weight, hessian = problem(22, 26)
    (weight if where == "weight" else hessian)[3, 4] = value
    kind = ConfigError if where == "weight" else CalibrationError
    with pytest.raises(kind, match="NaN or infinity"):
        quantize_weight(weight, hessian, layer(), seeded(0))


def test_shapes_that_contradict_the_config_are_refused() -> None:
    weight, hessian = problem(22, 26)
    with pytest.raises(ConfigError, match=r"\(22, 26\), its config says \(21, 26\)"):
        quantize_weight(weight, hessian, dataclasses.replace(layer(), out_features=21), seeded(0))
    with pytest.raises(ConfigError, match=r"Hessian has shape \(25, 25\), the layer has 26 inputs"):
        quantize_weight(weight, hessian[1:, 1:], layer(), seeded(0))


def test_nothing_that_was_given_is_changed() -> None:
    weight, hessian = problem(22, 26)
    kept = weight.clone(), hessian.clone()
    quantize_weight(weight, hessian, layer(enable_norm=True, enable_perm=True), seeded(0))
    assert torch.equal(weight, kept[0])
    assert torch.equal(hessian, kept[1])


def test_two_small_codebooks_solved_jointly_come_near_what_they_can_hold_of_a_gaussian() -> None:
    """Mean squared error at 2 bits a weight, whose bound is 0.0625; a greedy residual search gives about 0.1."""
    weight = torch.randn(512, 768, generator=seeded(0))
    config = LayerConfig(768, 512, 8, 256, num_residual_centroids=256)
    losses = quantize_weight(weight, torch.eye(768), config, seeded(1)).losses
    assert losses["k-means"] > 0.096
    assert last(losses) < 0.09
