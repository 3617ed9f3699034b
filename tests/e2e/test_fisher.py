"""Token weights from the loss's gradients: what they are, and runs that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import random_tokens, tiny
from torch.nn import functional

import vptq
from vptq.errors import ConfigError
from vptq.quantize.fisher import LARGEST_WEIGHT, group_weights, token_weights
from vptq.quantize.hessian import HessianAccumulator, PairedAccumulator

QUICK: dict[str, Any] = {"sequences": 4, "seqlen": 16}


def ignore(event: object) -> None:
    pass


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "opt"])
def test_a_token_weighs_the_squared_gradients_of_a_layers_outputs(family: str) -> None:
    model, tokens = tiny(family), random_tokens(2, 20)
    weights = token_weights(model, tokens, ignore)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    blocks = {name: linear for name, linear in linears.items() if ".1." in name}
    assert blocks.keys() <= weights.keys()
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
        expected = gradient.square().sum(-1).view(tokens.shape)
        torch.testing.assert_close(weights[name], expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("llama").train()
    model.get_input_embeddings().requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    token_weights(model, random_tokens(1, 8), ignore)
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_weights_of_layers_that_share_an_input_add_up_to_a_mean_of_one_and_are_capped() -> None:
    one, two = torch.rand(3, 1000), torch.rand(3, 1000)
    both = group_weights({"q": one, "k": two}, ["q", "k"])
    assert both is not None
    torch.testing.assert_close(both, (one + two) / (one + two).mean())
    one[0, 0] = 1e9
    capped = group_weights({"q": one}, ["q"])
    assert capped is not None
    assert float(capped.mean()) == pytest.approx(1.0)
    assert float(capped.max() / capped.median()) <= 1.01 * LARGEST_WEIGHT / float((one / one.mean()).median())
    assert group_weights({"q": one}, ["q", "k"]) is None
    assert group_weights({"q": torch.zeros(3, 4)}, ["q"]) is None


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


@pytest.mark.parametrize("inputs", ["both", "original"])
def test_a_run_with_weighed_tokens_is_deterministic_and_differs(
    inputs: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    for name, hessian in (("plain", "plain"), ("one", "fisher"), ("two", "fisher")):
        options = QUICK | {"hessian": hessian, "hessian_inputs": inputs}
        report = vptq.quantize(tiny_model_folder, tmp_path / name, "v4-k16", **options)
        assert report.hessian == hessian
    plain, one, two = (next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in ("plain", "one", "two"))
    assert one == two
    assert one != plain


def test_what_cannot_be_weighed_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--hessian is 'exact'; choose one of plain, fisher"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", "v4-k16", hessian="exact", **QUICK)
    with pytest.raises(ConfigError, match="--hessian-dir does without any"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", "v4-k16", hessian="fisher", hessian_dir=".", **QUICK)
