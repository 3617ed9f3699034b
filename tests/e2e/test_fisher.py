"""Token weights from the loss's gradients: what they are, and runs that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import job_for, random_tokens, tiny
from torch.nn import functional

import vptq
from vptq.errors import ConfigError
from vptq.quantize import fisher
from vptq.quantize.fisher import LARGEST_WEIGHT, LossWeights
from vptq.quantize.hessian import HessianAccumulator, PairedAccumulator

QUICK: dict[str, Any] = {"sequences": 4, "seqlen": 16}


def ignore(event: object) -> None:
    pass


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "opt"])
@pytest.mark.parametrize("portion", [2**29, 1])
def test_weights_are_the_squared_gradients_of_a_layers_outputs(
    family: str, portion: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher, "KEPT_BYTES", portion)
    model, tokens = tiny(family), random_tokens(2, 20)
    model.save_pretrained(tmp_path / "model")
    weights = fisher.loss_weights(
        job_for(tmp_path / "model", tmp_path / "out").open_skeleton(), tokens, torch.float32, ignore
    )
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {name: linear for name, linear in linears.items() if ".1." in name}
    assert blocks.keys() <= weights.tokens.keys() == weights.rows.keys()
    for name, linear in blocks.items():
        pushes: list[torch.Tensor] = []

        def push(_module: Any, _args: Any, output: torch.Tensor, pushes: list[torch.Tensor] = pushes) -> torch.Tensor:
            pushes.append(torch.zeros_like(output).requires_grad_())
            return output + pushes[-1]

        hook = linear.register_forward_hook(push)
        logits = model(input_ids=tokens).logits[:, :-1]
        hook.remove()
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pushes[0])
        squares = gradient.square().flatten(0, -2)
        by_token = squares.sum(1).view(tokens.shape)
        torch.testing.assert_close(weights.tokens[name], by_token, rtol=1e-3, atol=1e-6 * float(by_token.max()))
        by_row = squares.sum(0)
        torch.testing.assert_close(weights.rows[name], by_row, rtol=1e-3, atol=1e-6 * float(by_row.max()))


def test_row_weights_have_a_mean_of_one_and_a_range() -> None:
    total = torch.rand(1000) + 0.5
    weights = LossWeights(rows={"q": total.clone(), "dead": torch.zeros(4)})
    torch.testing.assert_close(weights.of_rows("q"), total / total.mean())
    total[0], total[1] = 1e9, 0
    capped = LossWeights(rows={"q": total}).of_rows("q")
    assert capped is not None
    assert float(capped.max()) == fisher.ROW_RANGE
    assert float(capped.min()) == pytest.approx(1 / fisher.ROW_RANGE)
    assert weights.of_rows("dead") is None
    assert weights.of_rows("k") is None


def test_rows_are_weighed_with_beginnings_from_all_of_the_text() -> None:
    tokens = torch.arange(64)[:, None] * 10_000 + torch.arange(2048)
    part = fisher.row_tokens(tokens)
    assert part.shape == (fisher.ROW_SEQUENCES, fisher.ROW_SEQLEN)
    assert torch.equal(part[:, 0] // 10_000, torch.arange(0, 64, 4))
    assert torch.equal(fisher.row_tokens(tokens[:3, :5]), tokens[:3, :5])


def test_weights_of_layers_that_share_an_input_add_up_to_a_mean_of_one_and_are_capped() -> None:
    one, two = torch.rand(3, 1000), torch.rand(3, 1000)
    both = LossWeights(tokens={"q": one, "k": two}).of_tokens(["q", "k"])
    assert both is not None
    torch.testing.assert_close(both, (one + two) / (one + two).mean())
    one[0, 0] = 1e9
    capped = LossWeights(tokens={"q": one}).of_tokens(["q"])
    assert capped is not None
    assert float(capped.mean()) == pytest.approx(1.0)
    assert float(capped.max() / capped.median()) <= 1.01 * LARGEST_WEIGHT / float((one / one.mean()).median())
    assert LossWeights(tokens={"q": one}).of_tokens(["q", "k"]) is None
    assert LossWeights(tokens={"q": torch.zeros(3, 4)}).of_tokens(["q"]) is None


def test_hessians_count_a_token_as_often_as_it_weighs() -> None:
    x, y, weights = torch.randn(2, 10, 6), torch.randn(2, 10, 6), torch.randint(1, 4, (2, 10)).float()
    repeats = weights.flatten().long()
    plain, weighted = HessianAccumulator(6), HessianAccumulator(6)
    plain.add(x.flatten(0, 1).repeat_interleave(repeats, 0))
    weighted.add(x, weights)
    torch.testing.assert_close(weighted.hessian() * weighted.tokens, plain.hessian() * plain.tokens)
    paired, repeated = PairedAccumulator(weighted), PairedAccumulator(plain)
    paired.add(x, y, weights)
    repeated.add(*(inputs.flatten(0, 1).repeat_interleave(repeats, 0) for inputs in (x, y)))
    one, other = paired.moments(0.01), repeated.moments(0.01)
    torch.testing.assert_close(one.hessian * paired.tokens, other.hessian * repeated.tokens)
    torch.testing.assert_close(one.shift, other.shift, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hessian", ["rows", "fisher"])
@pytest.mark.parametrize("inputs", ["both", "original"])
def test_a_weighed_run_is_deterministic_and_differs(
    hessian: str, inputs: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    for name, how in (("plain", "plain"), ("one", hessian), ("two", hessian)):
        options = QUICK | {"hessian": how, "hessian_inputs": inputs}
        report = vptq.quantize(tiny_model_folder, tmp_path / name, "v4-k16", **options)
        assert report.hessian == how
    plain, one, two = (next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in ("plain", "one", "two"))
    assert one == two
    assert one != plain


def test_what_cannot_be_weighed_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--hessian is 'exact'; choose one of plain, rows, fisher"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", "v4-k16", hessian="exact", **QUICK)
    with pytest.raises(ConfigError, match="--hessian-dir does without any"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", "v4-k16", hessian="fisher", hessian_dir=".", **QUICK)
