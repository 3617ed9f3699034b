"""The trainer: rates in a tensor's own size, the best state by held-out loss, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from vptq.quantize.training import Trainer, TrainingConfig


def parameters(**values: list[float]) -> dict[str, nn.Parameter]:
    return {name.replace("__", "."): nn.Parameter(torch.tensor(value)) for name, value in values.items()}


def trainer(params: dict[str, nn.Parameter], steps: int = 100, **config: float) -> Trainer:
    return Trainer(params, torch.bfloat16, TrainingConfig(**config), steps)  # type: ignore[arg-type]


def pull_to(params: dict[str, nn.Parameter], target: float) -> float:
    loss = sum(((p - target) ** 2).sum() for p in params.values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def test_a_step_changes_the_same_share_of_every_tensor() -> None:
    params = parameters(small=[1e-3, -1e-3], large=[100.0, -100.0])
    before = {name: p.detach().clone() for name, p in params.items()}
    run = trainer(params, warmup=0.0, rate=0.01)
    pull_to(params, 1e4)
    run.advance()
    shares = [float(((p.detach() - before[name]) / before[name].abs()).abs().max()) for name, p in params.items()]
    assert shares == pytest.approx([0.01, 0.01], rel=1e-3)


def test_a_column_bias_moves_in_units_of_its_scale() -> None:
    params = parameters(layer__weight_scale=[2.0, 2.0], layer__weight_bias=[0.0, 0.0])
    run = trainer(params, warmup=0.0, rate=0.01)
    pull_to(params, 10.0)
    run.advance()
    assert params["layer.weight_bias"].tolist() == pytest.approx([0.02, 0.02], rel=1e-3)


def test_the_rate_rises_and_falls_to_nothing() -> None:
    config = TrainingConfig(rate=1.0, warmup=0.1)
    rates = [config.rate_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[99] < 0.001
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_the_best_state_is_kept_as_it_would_be_stored() -> None:
    params = parameters(book=[1.0, 2.0])
    run = trainer(params)
    losses = iter([3.0, 1.0, 2.0])
    seen = []
    for value in (1.0, 1.0 / 3.0, 5.0):
        params["book"].detach().fill_(value)
        run.check(lambda: seen.append(params["book"].tolist()) or next(losses))  # type: ignore[func-returns-value]
        assert params["book"].tolist() == [pytest.approx(value)] * 2  # exact again afterwards
    third = float(torch.tensor(1.0 / 3.0, dtype=torch.bfloat16))
    assert seen[1] == [third, third]
    assert run.best["book"].dtype == torch.bfloat16
    assert run.best["book"].tolist() == [third, third]


def test_training_ends_when_checks_bring_nothing() -> None:
    run = trainer(parameters(book=[1.0]), patience=2)
    for loss, done in ((5.0, False), (4.0, False), (4.5, False), (4.2, True)):
        run.check(lambda loss=loss: loss)  # type: ignore[misc]
        assert run.done is done


def test_checks_are_spread_evenly_and_end_with_the_last_step() -> None:
    run = trainer(parameters(book=[1.0]), steps=10, checks=3)
    due = []
    for _ in range(10):
        pull_to(run.parameters, 0.0)  # type: ignore[arg-type]
        run.advance()
        due += [run.step] if run.check_is_due() else []
    assert due == [4, 7, 10]


def test_a_restored_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    def some_steps(run: Trainer, count: int) -> None:
        for _ in range(count):
            run.check(lambda: sum(float((p.detach() - 3.0).square().sum()) for p in run.parameters.values()))
            pull_to(run.parameters, 3.0)  # type: ignore[arg-type]
            run.advance()

    whole = trainer(parameters(a=[1.0, 2.0], b=[0.1]), steps=12, rate=0.1)
    some_steps(whole, 12)
    first = trainer(parameters(a=[1.0, 2.0], b=[0.1]), steps=12, rate=0.1)
    some_steps(first, 5)
    first.save(tmp_path / "state")
    second = trainer(parameters(a=[1.0, 2.0], b=[0.1]), steps=12, rate=0.1)
    second.restore(tmp_path / "state")
    assert second.step == 5
    some_steps(second, 7)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name])
        assert torch.equal(whole.best[name], second.best[name])
    assert whole.history == second.history


def test_indices_that_others_change_belong_to_the_state(tmp_path: Path) -> None:
    def run() -> Trainer:
        return Trainer(parameters(book=[1.0]), torch.bfloat16, TrainingConfig(), 4, {"indices": torch.tensor([40_001])})

    first = run()
    first.check(lambda: 2.0)
    for value, loss in ((40_003, 1.0), (40_005, 3.0)):
        first.indices["indices"].fill_(value)
        first.check(lambda loss=loss: loss)  # type: ignore[misc]
    assert first.best["indices"].tolist() == [40_003]  # not rounded, and not what came after
    first.save(tmp_path / "state")
    second = run()
    second.restore(tmp_path / "state")
    assert second.indices["indices"].tolist() == [40_005]
    assert second.best["indices"].tolist() == [40_003]
    assert second.best["indices"].dtype == torch.int64
