"""Second moments, their inverse factor, and the files other projects keep them in."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import correlated_hessian, seeded

from vptq.errors import CalibrationError
from vptq.quantize.hessian import (
    QUANTIZED_SHARE,
    HessianAccumulator,
    PairedAccumulator,
    inverse_factor,
    load_hessian,
)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 2**31))
def test_adding_batches_equals_adding_them_at_once(sizes: list[int], features: int, seed: int) -> None:
    inputs = torch.randn(sum(sizes), features, generator=seeded(seed))
    parts, whole = HessianAccumulator(features), HessianAccumulator(features)
    for part in inputs.split(sizes):
        parts.add(part[None])  # [batch, tokens, features], as a model has them
    whole.add(inputs)
    assert parts.tokens == whole.tokens == sum(sizes)
    expected = (inputs.double().T @ inputs.double() / len(inputs)).float()
    torch.testing.assert_close(parts.hessian(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.hessian(), expected, rtol=1e-5, atol=1e-5)


def test_sums_are_float32_whatever_the_inputs() -> None:
    """In bfloat16 a sum stops growing at 256."""
    accumulator = HessianAccumulator(2)
    for _ in range(20):
        accumulator.add(torch.ones(50, 2, dtype=torch.bfloat16))
    assert torch.equal(accumulator.hessian(), torch.ones(2, 2))


def test_quick_sums_serve_the_solver_as_exact_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What rounding changes is small beside the damped Hessian itself, in every direction; where sums were rounded too,
    it was as large in some (docs/log.md)."""
    monkeypatch.setattr("vptq.quantize.precision.multiplies_bfloat16", lambda device: True)
    scales = torch.logspace(0, 2, 60)
    inputs = torch.randn(4000, 60, generator=seeded(0)) * scales + 3 * scales
    quick, exact = HessianAccumulator(60, quick=True), HessianAccumulator(60)
    for part in inputs.split(1000):
        quick.add(part)
        exact.add(part)
    assert quick.tokens == exact.tokens
    factor, _ = inverse_factor(exact.hessian(), 0.01)
    change = factor @ (quick.hessian() - exact.hessian()) @ factor.T
    assert torch.linalg.matrix_norm(change, 2) < 0.02


def test_the_hessian_is_symmetric_to_the_bit() -> None:
    accumulator = HessianAccumulator(40)
    accumulator.add(torch.randn(300, 40, generator=seeded(0)))
    accumulator._sum[3, 5] += 1e-3  # some matrix multiplications round the two halves differently
    hessian = accumulator.hessian()
    assert torch.equal(hessian, hessian.T)


@pytest.mark.parametrize(("value", "message"), [(None, "no calibration input"), (float("nan"), "NaN or infinity")])
def test_nothing_and_nan_are_refused(value: float | None, message: str) -> None:
    accumulator = HessianAccumulator(3)
    if value is not None:
        accumulator.add(torch.tensor([[1.0, value, 2.0]]))
    with pytest.raises(CalibrationError, match=message):
        accumulator.hessian()


@settings(max_examples=30)
@given(st.integers(1, 24), st.sampled_from([0.01, 0.1]), st.integers(0, 2**20))
def test_the_factor_is_upper_triangular_and_inverts_the_damped_hessian(
    features: int, damping: float, seed: int
) -> None:
    hessian = correlated_hessian(features, seed)
    factor, used = inverse_factor(hessian, damping)
    assert used == damping
    assert torch.equal(factor, factor.triu())
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(features)
    identity = factor.double().T @ factor.double() @ damped.double()
    torch.testing.assert_close(identity, torch.eye(features, dtype=torch.float64), rtol=0.0, atol=5e-3)


@pytest.mark.parametrize("kind", ["singular", "indefinite", "all zero"])
def test_damping_is_raised_until_the_matrix_factors(kind: str) -> None:
    direction = torch.randn(6, generator=seeded(0))
    hessian = torch.outer(direction, direction)
    if kind == "indefinite":
        hessian -= 0.02 * hessian.diagonal().mean() * torch.eye(6)
    elif kind == "all zero":
        hessian = torch.zeros(6, 6)
    factor, used = inverse_factor(hessian, damping=0.0)
    assert 0.0 < used <= 0.1
    assert bool(torch.isfinite(factor).all())
    mean = hessian.diagonal().mean().clamp(min=1e-12)
    damped = (hessian + used * mean * torch.eye(6)).double()
    torch.testing.assert_close(
        factor.double().T @ factor.double() @ damped, torch.eye(6, dtype=torch.float64), rtol=0.0, atol=0.05
    )


@pytest.mark.parametrize("hessian", [-torch.eye(4), torch.full((4, 4), float("nan"))])
def test_a_matrix_that_no_damping_saves_is_refused(hessian: torch.Tensor) -> None:
    with pytest.raises(CalibrationError, match="whatever the damping"):
        inverse_factor(hessian, damping=0.01)


def community_file(path: Path, covariance: torch.Tensor, mean: torch.Tensor) -> Path:
    """As SPEC section 5 has it: the lower triangle of the covariance row by row, the mean, the width, the tokens."""
    width = len(mean)
    flat = torch.stack([covariance[row, column] for row in range(width) for column in range(row + 1)])
    torch.save({"flatH": flat, "mu": mean, "n": width, "ct": 1234}, path)
    return path


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (["q_proj", "k_proj", "v_proj"], "3_qkv.pt"),
        (["qkv_proj"], "3_qkv.pt"),
        (["o_proj"], "3_o.pt"),
        (["gate_proj", "up_proj"], "3_up.pt"),
        (["gate_up_proj"], "3_up.pt"),
        (["down_proj"], "3_down.pt"),
        (["fc1"], "3_fc1.pt"),
    ],
)
def test_community_files_give_the_second_moment(tmp_path: Path, names: list[str], file: str) -> None:
    inputs = torch.randn(200, 7, generator=seeded(0)) @ torch.randn(7, 7, generator=seeded(1)) + 2.0
    community_file(tmp_path / file, torch.cov(inputs.T, correction=0), inputs.mean(0))
    loaded = load_hessian(tmp_path, 3, names, 7)
    torch.testing.assert_close(loaded, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-4)
    assert torch.equal(loaded, loaded.T)


def refusal(folder: Path, features: int = 5) -> str:
    with pytest.raises(CalibrationError) as caught:
        load_hessian(folder, 0, ["q_proj"], features)
    message = str(caught.value)
    assert "\n" not in message
    assert "0_qkv.pt" in message
    return message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "exists" in refusal(tmp_path)


def test_another_width_is_refused(tmp_path: Path) -> None:
    community_file(tmp_path / "0_qkv.pt", torch.eye(5), torch.zeros(5))
    assert "width 5" in refusal(tmp_path, features=6)
    assert "6 inputs" in refusal(tmp_path, features=6)


@pytest.mark.parametrize("damage", ["short triangle", "short mean", "NaN", "no mean", "no dict", "truncated"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = community_file(tmp_path / "0_qkv.pt", torch.eye(5), torch.zeros(5))
    stored = torch.load(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "no dict":
        torch.save([1, 2, 3], path)
    else:
        if damage == "short triangle":
            stored["flatH"] = stored["flatH"][:-1]
        elif damage == "short mean":
            stored["mu"] = stored["mu"][:-1]
        elif damage == "no mean":
            del stored["mu"]
        else:
            stored["flatH"][3] = float("nan")
        torch.save(stored, path)
    refusal(tmp_path)


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"flatH": torch.zeros(15), "mu": torch.zeros(5), "n": Touch(trace)}, tmp_path / "0_qkv.pt")
    refusal(tmp_path)
    assert not trace.exists()


def paired_inputs(noise: float, tokens: int = 200, features: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    draw = seeded(3)
    mix = torch.randn(features, features, generator=draw)
    x = torch.randn(tokens, features, generator=draw) @ mix
    return x, x + noise * torch.randn(tokens, features, generator=draw)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_paired_target_does_best_on_the_inputs_of_both_models(share: float) -> None:
    x, y = paired_inputs(noise=0.7)
    weight = torch.randn(5, 8, generator=seeded(4))
    original = HessianAccumulator(8)
    paired = PairedAccumulator(original, share)
    for part_x, part_y in zip(x.split(30), y.split(30), strict=True):
        original.add(part_x)
        paired.add(part_x, part_y)
    moments = paired.moments(damping=0.0)

    def loss(quantized: torch.Tensor) -> float:
        wanted = (x @ weight.T).double()
        on_x, on_y = (float((wanted - (z @ quantized.T).double()).square().sum()) / len(z) for z in (x, y))
        return (1.0 - share) * on_x + share * on_y

    target = moments.target(weight)
    best = loss(target)
    assert best < 0.95 * loss(weight)
    for seed in range(3):
        move = 0.1 * torch.randn(5, 8, generator=seeded(seed))
        # Around the target the loss is the quadratic that the solver minimizes.
        assert loss(target + move) == pytest.approx(best + float((move @ moments.hessian * move).sum()), rel=1e-4)


def test_where_both_models_agree_the_weight_stays() -> None:
    x, _ = paired_inputs(noise=0.0)
    alone = HessianAccumulator(8)
    paired = PairedAccumulator(alone)
    alone.add(x)
    paired.add(x[:100], x[:100])  # the pairs may be a part of the original's inputs
    weight = torch.randn(5, 8, generator=seeded(5)).bfloat16()
    assert torch.equal(paired.moments(0.01).target(weight), weight.float())
    pairs = HessianAccumulator(8)
    pairs.add(x[:100])
    expected = (1.0 - QUANTIZED_SHARE) * alone.hessian() + QUANTIZED_SHARE * pairs.hessian()
    torch.testing.assert_close(paired.moments(0.01).hessian, expected)
    assert paired.tokens == alone.tokens == len(x)


def test_inputs_that_only_one_model_has_are_a_plain_hessian() -> None:
    x, y = paired_inputs(noise=0.5)
    one, empty = HessianAccumulator(8), HessianAccumulator(8)
    one.add(x)
    moments = PairedAccumulator(one).moments(0.01)
    assert moments.shift is None
    assert torch.equal(moments.hessian, one.hessian())
    paired, other = PairedAccumulator(empty), HessianAccumulator(8)
    paired.add(x, y)
    other.add(y)
    assert paired.moments(0.01).shift is None
    assert torch.equal(paired.moments(0.01).hessian, other.hessian())


def test_pairs_are_refused_like_single_inputs() -> None:
    with pytest.raises(CalibrationError, match="no calibration input"):
        PairedAccumulator(HessianAccumulator(3)).moments(0.01)
    original = HessianAccumulator(2)
    original.add(torch.ones(1, 2))
    paired = PairedAccumulator(original)
    paired.add(torch.ones(1, 2), torch.tensor([[float("nan"), 1.0]]))
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        paired.moments(0.01)
