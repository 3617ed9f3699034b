"""Both models at once: what the original had and what the quantized one gets, for the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import job_for, random_tokens, tiny

from vptq.quantize.activations import Activations, InputGroup
from vptq.quantize.hessian import HessianAccumulator, PairedAccumulator
from vptq.quantize.paired import PairedActivations
from vptq.quantize.skeleton import Skeleton

SHORT = 8


@pytest.fixture
def skeleton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Skeleton:
    """Of a tiny Llama; sequences are compared on their first 8 tokens, and batches of both kinds differ in size."""
    monkeypatch.setattr("vptq.quantize.paired.PAIRED_TOKENS", SHORT)
    monkeypatch.setattr("vptq.quantize.activations.TOKENS_PER_BATCH", 3 * 16)
    return job_for(tiny("llama"), tmp_path / "out").open_skeleton()


def inputs_of(skeleton: Skeleton, tokens: torch.Tensor, group: InputGroup) -> torch.Tensor:
    """What the group's layers in block 0 are given, as it is now: [tokens, features]."""
    activations = Activations(skeleton, tokens, torch.float32)
    return torch.cat(
        [inputs.flatten(0, 1) for inputs in activations.inputs_of(group.names[0], 0) if inputs is not None]
    )


def spoil(skeleton: Skeleton, path: str) -> None:
    """Makes a layer of block 0 another one, as quantizing does."""
    weight = skeleton.linears(0)[path].weight.data
    weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("counted", [False, True])
def test_the_moments_are_those_of_both_models_on_the_same_tokens(skeleton: Skeleton, counted: bool) -> None:
    tokens = random_tokens(7, 16)
    counts = torch.rand(7, 16, generator=torch.Generator().manual_seed(1)) if counted else None
    skeleton.load_block(0, torch.float32)
    pairs = PairedActivations.start(skeleton, tokens, torch.float32)
    groups = pairs.original.input_groups(0)
    was: dict[Any, Any] = {group: inputs_of(skeleton, tokens, group) for group in groups}
    pairs.run_original(0, groups, [counts] * len(groups))
    spoil(skeleton, "self_attn.v_proj")
    for group in groups[1:]:  # the first reads what comes before every layer of the block
        now = inputs_of(skeleton, tokens[:, :SHORT], group)
        beginnings = was[group].unflatten(0, (7, 16))[:, :SHORT].flatten(0, 1)
        assert not torch.allclose(now, beginnings, rtol=1e-2)
        whole = HessianAccumulator(group.features)
        whole.add(was[group], counts)
        expected = PairedAccumulator(whole)
        expected.add(beginnings, now, None if counts is None else counts[:, :SHORT])
        found, wanted = pairs.moments(0, group, counts).moments(0.01), expected.moments(0.01)
        assert wanted.shift is not None
        torch.testing.assert_close(found.hessian, wanted.hessian, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.shift, wanted.shift, rtol=1e-3, atol=1e-4)


def test_the_original_goes_on_as_itself_and_the_quantized_model_stays(skeleton: Skeleton) -> None:
    tokens = random_tokens(4, 16)
    skeleton.load_block(0, torch.float32)
    pairs, alone = (start(skeleton, tokens, torch.float32) for start in (PairedActivations.start, Activations))
    before = torch.cat(pairs.quantized.batches)
    pairs.run_original(0, pairs.original.input_groups(0), [None] * 4)
    alone.run_block(0, advance=True)
    assert torch.equal(torch.cat(pairs.original.batches), torch.cat(alone.batches))
    assert torch.equal(torch.cat(pairs.quantized.batches), before)
    assert before.shape[1] == SHORT


def test_while_nothing_is_quantized_the_weight_stays(skeleton: Skeleton) -> None:
    tokens = random_tokens(5, 16)
    skeleton.load_block(0, torch.float32)
    pairs = PairedActivations.start(skeleton, tokens, torch.float32)
    groups = pairs.original.input_groups(0)
    pairs.run_original(0, groups, [None] * len(groups))
    for group in groups:
        weight = skeleton.linears(0)[group.names[0]].weight.data
        target = pairs.moments(0, group, None).moments(0.01).target(weight)
        torch.testing.assert_close(target, weight, rtol=1e-4, atol=1e-5)


def test_inputs_that_come_more_often_than_there_are_sequences_are_not_compared(skeleton: Skeleton) -> None:
    tokens = random_tokens(7, 16)
    skeleton.load_block(0, torch.float32)
    pairs = PairedActivations.start(skeleton, tokens, torch.float32)
    groups = pairs.original.input_groups(0)
    pairs.run_original(0, groups, [None] * len(groups))
    again = pairs._inputs[groups[1].names[0]]
    again.add(torch.full_like(again.rows[:2], 1e3))  # a layer that a block calls twice
    found = pairs.moments(0, groups[1], None)
    assert found.moments(0.01).shift is not None
    assert float(found._cross.abs().max()) == 0.0, "the quantized model's inputs stand for both"
