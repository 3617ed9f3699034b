"""What a settled part of a block has put out stands for what it would put out."""

from pathlib import Path

import pytest
import torch
from model_zoo import FAMILIES, job_for, random_tokens, tiny
from torch import Tensor, nn

from vptq.quantize.activations import Activations
from vptq.quantize.settled import SettledParts
from vptq.quantize.skeleton import Skeleton


def spoil(skeleton: Skeleton, path: str) -> None:
    """Makes a layer of block 0 another one, as quantizing does."""
    weight = skeleton.linears(0)[path].weight.data
    weight.add_(0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(path))))


def passes(skeleton: Skeleton, tokens: Tensor, *, settle: bool) -> list[Tensor]:
    """Block 0, layers changed group by group: the inputs of each group after the changes before it, then the output."""
    skeleton.load_block(0, torch.float32)
    activations = Activations(skeleton, tokens, torch.float32)
    seen = []
    for group in activations.input_groups(0):
        seen += [inputs for inputs in activations.inputs_of(group.names[0], 0) if inputs is not None]
        for name in group.names:
            spoil(skeleton, name)
        if settle:
            activations.settle(0, group.names)
    activations.run_block(0, advance=True)
    skeleton.unload_block(0)
    return [*seen, *activations.batches]


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_over_a_block_see_the_same_with_settled_parts(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vptq.quantize.activations.TOKENS_PER_BATCH", 3 * 16)
    skeleton = job_for(tiny(family), tmp_path / "out").open_skeleton()
    tokens = random_tokens(7, 16)
    with_parts, without = (passes(skeleton, tokens, settle=settle) for settle in (True, False))
    assert len(with_parts) == len(without) > 7
    assert all(map(torch.equal, with_parts, without))


def test_settled_attention_runs_once_a_batch_until_the_block_changes_or_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vptq.quantize.activations.TOKENS_PER_BATCH", 3 * 16)
    skeleton = job_for(tiny("llama"), tmp_path / "out").open_skeleton()
    skeleton.load_block(0, torch.float32)
    activations = Activations(skeleton, random_tokens(6, 16), torch.float32)
    other = activations.fork()
    norm, products = skeleton.blocks[0].get_submodule("input_layernorm"), []
    attention = skeleton.blocks[0].get_submodule("self_attn")
    attention.get_submodule("o_proj").register_forward_hook(lambda *_: products.append(1))

    activations.settle(0, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
    activations.run_block(0, advance=False)
    activations.run_block(0, advance=False)
    assert len(products) == 4  # o_proj may still change
    activations.settle(0, ["self_attn.o_proj"])
    for name in ("mlp.gate_proj", "mlp.down_proj"):
        list(activations.inputs_of(name, 0))
    assert len(products) == 6
    other.run_block(0, advance=False)
    assert len(products) == 8  # batches of its own, of which nothing is settled

    norm.weight.data.mul_(2.0)
    activations.unsettle()
    activations.run_block(0, advance=True)
    other.run_block(0, advance=True)
    assert all(map(torch.equal, activations.batches, other.batches))
    assert "forward" not in vars(attention)

    activations.settle(0, [*skeleton.linears(0)])
    activations.run_block(0, advance=True)
    activations.run_block(0, advance=True)
    for _ in range(2):
        other.run_block(0, advance=True)
    assert all(map(torch.equal, activations.batches, other.batches))


class Adds(nn.Module):
    """Calls its part twice, and adds to what it gets in place."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(3, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.part(inputs)
        found += self.part(found)
        return torch.as_tensor(found)


@torch.no_grad()
def test_a_part_may_run_twice_and_its_output_be_added_to_in_place() -> None:
    block, parts, inputs = Adds(), SettledParts(), torch.randn(2, 3)
    expected = block(inputs)
    parts.add(["part.0"], ["part.0"])
    for _ in range(3):
        with parts.reused(block, 0):
            assert torch.equal(block(inputs), expected)
