"""Models taken apart into blocks: what is found, and that running the parts is running the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import FAMILIES, job_for, random_tokens, tiny
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from vptq.errors import ConfigError
from vptq.quantize.activations import Activations
from vptq.quantize.skeleton import Skeleton, find_blocks, linears_of

BLOCKS = {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers", "falcon": "transformer.h"}


def taken_apart(family: str, folder: Path) -> tuple[Any, Skeleton]:
    model = tiny(family)
    return model, job_for(model, folder / "out").open_skeleton()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_linears_are_found(family: str) -> None:
    model = tiny(family)
    name, blocks = find_blocks(model)
    assert name == BLOCKS.get(family, "model.layers")
    assert len(blocks) == 2
    inside = [linear for block in blocks for linear in linears_of(block).values()]
    everywhere = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = model.get_output_embeddings()
    assert {id(linear) for linear in inside} == {id(linear) for linear in everywhere if linear is not head}


@pytest.mark.parametrize("family", FAMILIES)
def test_running_the_blocks_one_by_one_is_running_the_model(family: str, tmp_path: Path) -> None:
    """Seven sequences in batches of three: the last is shorter, and must get a mask of its own."""
    model, skeleton = taken_apart(family, tmp_path)
    tokens = random_tokens(7, 24)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vptq.quantize.activations.TOKENS_PER_BATCH", 3 * 24)
        activations = Activations(skeleton, tokens, torch.float32)
    assert [len(batch) for batch in activations.batches] == [3, 3, 1]
    for index in range(2):
        skeleton.load_block(index, torch.float32)
        activations.run_block(index, advance=True)
        skeleton.unload_block(index)
    hidden = torch.cat(activations.batches)
    with torch.no_grad():
        found = _finish(model, tokens, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _finish(model: Any, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The model's own norm and head on `hidden`, put in place of what its last block returns."""

    def replace(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = find_blocks(model)[1][-1].register_forward_hook(replace)
    logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    handle.remove()
    return logits


def test_only_the_loaded_block_is_in_memory(tmp_path: Path) -> None:
    model, skeleton = taken_apart("llama", tmp_path)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    block = skeleton.load_block(1, torch.float32)
    held = {name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta}
    assert held == {f"model.layers.1.{name}" for name, _ in block.named_parameters()}
    original = model.model.layers[1].state_dict()
    assert all(torch.equal(parameter, original[name]) for name, parameter in block.named_parameters())
    skeleton.unload_block(1)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        ("gpt_neox", [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}]),
        ("phi3", [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}]),
        # attention and MLP side by side, on the same normalized input
        ("phi", [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}]),
    ],
)
def test_linears_that_read_the_same_input_are_grouped(family: str, groups: list[set[str]], tmp_path: Path) -> None:
    _, skeleton = taken_apart(family, tmp_path)
    activations = Activations(skeleton, random_tokens(2, 8), torch.float32)
    skeleton.load_block(0, torch.float32)
    found = activations.input_groups(0)
    tails = [{name.rpartition(".")[2] for name in group.names} for group in found]
    assert sorted(map(sorted, tails)) == sorted(map(sorted, groups))
    order = [index for index, group in enumerate(tails) if group & {"o_proj", "down_proj", "fc2", "dense_4h_to_h"}]
    assert order[-1] == len(tails) - 1, "what runs last comes last"
    linears = skeleton.linears(0)
    assert all(linears[name].in_features == group.features for group in found for name in group.names)


@pytest.mark.parametrize("reached", ["by a few tokens", "by a whole batch"])
def test_a_few_tokens_show_what_is_grouped_unless_they_miss_a_layer(
    reached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vptq.quantize.activations.GLANCE_TOKENS", 3)
    _, skeleton = taken_apart("llama", tmp_path)
    activations = Activations(skeleton, random_tokens(4, 8), torch.float32)
    mlp = skeleton.load_block(0, torch.float32).get_submodule("mlp")
    run, shapes = mlp.forward, []

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(inputs.shape[:2]))
        return inputs if reached == "by a whole batch" and len(inputs) == 1 else run(inputs)

    mlp.forward = forward  # type: ignore[method-assign]
    groups = [set(group.names) for group in activations.input_groups(0)]
    assert groups[-2:] == [{"mlp.gate_proj", "mlp.up_proj"}, {"mlp.down_proj"}]
    assert shapes == ([(1, 3)] if reached == "by a few tokens" else [(1, 3), (4, 8)])


@pytest.mark.parametrize("together", [True, False])
def test_hessians_are_the_second_moments_of_the_inputs(together: bool, tmp_path: Path) -> None:
    """In one pass for all groups, and in a pass for each that stops as soon as the group's inputs are seen."""
    model, skeleton = taken_apart("llama", tmp_path)
    tokens = random_tokens(5, 16)
    inputs: dict[str, torch.Tensor] = {}
    linears = linears_of(model.model.layers[0])
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        model(input_ids=tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vptq.quantize.activations.TOKENS_PER_BATCH", 2 * 16)
        activations = Activations(skeleton, tokens, torch.float32)
    before = [batch.clone() for batch in activations.batches]
    skeleton.load_block(0, torch.float32)
    groups = activations.input_groups(0)
    moments = activations.hessians(0, groups) if together else [activations.hessians(0, [g])[0] for g in groups]
    for group, moment in zip(groups, moments, strict=True):
        assert moment.tokens == tokens.numel()
        for name in group.names:
            rows = inputs[name].flatten(0, 1)
            torch.testing.assert_close(moment.hessian(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(activations.batches, before, strict=True)), "nothing was advanced"


def test_a_pass_for_the_first_group_runs_nothing_behind_it(tmp_path: Path) -> None:
    _, skeleton = taken_apart("llama", tmp_path)
    activations = Activations(skeleton, random_tokens(2, 8), torch.float32)
    block = skeleton.load_block(0, torch.float32)
    groups = activations.input_groups(0)
    block.get_submodule("mlp").register_forward_pre_hook(lambda *_: pytest.fail("the pass went on"))
    activations.hessians(0, groups[:1])


@pytest.mark.parametrize("kind", ["GPT2 has no nn.Linear", "T5 is not decoder-only"])
def test_models_that_cannot_be_taken_apart_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    if kind.startswith("GPT2"):
        model: Any = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=63))
        with pytest.raises(ConfigError, match="GPT2LMHeadModel has no list of decoder blocks"):
            find_blocks(model)
    else:
        small = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 63}
        with pytest.raises(ConfigError, match="no causal language model for T5Config") as caught:
            job_for(T5ForConditionalGeneration(T5Config(**small)), tmp_path / "out").open_skeleton()
        assert "\n" not in str(caught.value)
