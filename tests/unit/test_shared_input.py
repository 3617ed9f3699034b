"""Layers that read the same input run as one, and nobody notices but for the time."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable

import pytest
import torch
from random_layers import random_weight
from torch import Tensor, nn

from vptq import shared_input
from vptq.config import LayerConfig
from vptq.linear import VQuantLinear
from vptq.shared_input import fuse_shared_inputs

CONFIG = LayerConfig(40, 48, 8, 16, enable_norm=True)
ROWS = {"q_proj": 48, "k_proj": 16, "v_proj": 21}


class Attention(nn.Module):
    """q, k and v of one input, or k and v of another where `other` is given."""

    def __init__(self, config: LayerConfig = CONFIG) -> None:
        super().__init__()
        for seed, (name, rows) in enumerate(ROWS.items()):
            own = dataclasses.replace(config, out_features=rows, bias=name == "k_proj")
            self.add_module(name, VQuantLinear.from_weight(random_weight(own, torch.float32, seed), torch.float32))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        return torch.cat([self.q_proj(x).sin(), self.k_proj(other).cos(), self.v_proj(other)], -1)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each joint call served; on a CPU, where layers otherwise stay by themselves."""
    served: list[int] = []
    operator = shared_input._linear_group

    def counted(x: Tensor, tensors: list[Tensor | None], sizes: list[int]) -> Tensor:
        served.append(len(sizes) // 4)
        return operator(x, tensors, sizes)

    monkeypatch.setattr(shared_input, "_pays", lambda device: True)
    monkeypatch.setattr(shared_input, "_linear_group", counted)
    return served


def fused(module: nn.Module) -> nn.Module:
    together = copy.deepcopy(module)
    fuse_shared_inputs(together)
    return together


@torch.no_grad()
def test_one_call_serves_all_and_each_gets_its_own(launches: list[int]) -> None:
    alone = Attention()
    together = fused(alone)
    for shape in ((1, 40), (8, 40), (2, 3, 40)):
        x = torch.randn(shape)
        launches.clear()
        assert torch.equal(together(x), alone(x))
        assert launches == [3]
        assert together.k_proj(x).is_contiguous()
        assert together.q_proj(x).is_contiguous()
        assert together.v_proj(x).is_contiguous()
        assert together.q_proj.shared_input._ahead is None, "nothing is kept once all have taken theirs"


def test_layers_of_another_dtype_stay_by_themselves() -> None:
    attention = Attention()
    own = dataclasses.replace(CONFIG, out_features=ROWS["k_proj"], bias=True)
    attention.k_proj = VQuantLinear.from_weight(random_weight(own, torch.float16, 1), torch.float16)
    fuse_shared_inputs(attention)
    assert attention.q_proj.shared_input is attention.v_proj.shared_input is not None
    assert attention.k_proj.shared_input is None


@torch.no_grad()
def test_many_tokens_and_gradients_go_the_usual_way(launches: list[int]) -> None:
    alone = Attention()
    together = fused(alone)
    x = torch.randn(9, 40)
    assert torch.equal(together(x), alone(x))
    with torch.enable_grad():
        x = torch.randn(2, 40, requires_grad=True)
        (gradient,) = torch.autograd.grad(together(x).sum(), x)
        (expected,) = torch.autograd.grad(alone(x).sum(), x)
        assert torch.equal(gradient, expected)
        together.k_proj.train_floats()
        together.k_proj(x.detach()).sum().backward()
        assert together.k_proj.get_parameter("centroids.weight").grad is not None
    assert launches == []


@torch.no_grad()
def test_layers_with_inputs_of_their_own_part(launches: list[int]) -> None:
    """As in cross attention. The first call computes too much, no call computes anything wrong."""
    alone = Attention()
    together = fused(alone)
    x, other = torch.randn(2, 1, 1, 40)
    assert torch.equal(together(x, other), alone(x, other))
    assert all(getattr(together, name).shared_input is None for name in ROWS)
    assert torch.equal(together(x), alone(x))
    assert launches == [3]


@torch.no_grad()
def test_a_layer_alone_gives_its_own_output(launches: list[int]) -> None:
    """What was computed ahead belongs to one tensor, however much another looks like it."""
    alone = Attention()
    together = fused(alone)
    x = torch.randn(1, 40)
    together.q_proj(x)
    y = x * 2
    assert torch.equal(together.k_proj(y), alone.k_proj(y))
    for _ in range(2):
        assert torch.equal(together.v_proj(x), alone.v_proj(x))


@pytest.mark.parametrize(
    ("change", "served"),
    [
        (lambda m: m.q_proj.to("meta"), []),
        (lambda m: setattr(m, "v_proj", nn.Linear(40, 21)), [2]),
        (lambda m: setattr(m, "v_proj", Attention(dataclasses.replace(CONFIG, num_centroids=32)).v_proj), [2]),
        (lambda m: setattr(m, "v_proj", Attention(dataclasses.replace(CONFIG, num_centroids=32)).v_proj.double()), [2]),
    ],
    ids=["one is offloaded", "one is dense", "one is of another form", "one is of another dtype"],
)
@torch.no_grad()
def test_only_layers_that_are_alike_and_in_place_run_together(
    change: Callable[[nn.Module], object], served: list[int], launches: list[int]
) -> None:
    module = Attention()
    change(module)
    fuse_shared_inputs(module)
    module.k_proj(torch.randn(1, 40))
    assert launches == served


@torch.no_grad()
def test_a_copy_runs_on_its_own_layers(launches: list[int]) -> None:
    together = fused(Attention())
    twin = copy.deepcopy(together)
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.mul_(2)
    x = torch.randn(1, 40)
    before = together(x)
    assert not torch.equal(twin(x), before)
    assert launches == [3, 3]
    assert torch.equal(together(x), before)


def test_names_and_files_stay_as_they_are(launches: list[int]) -> None:
    alone = Attention()
    together = fused(alone)
    assert list(together.state_dict()) == list(alone.state_dict())
    assert [name for name, _ in together.named_modules()] == [name for name, _ in alone.named_modules()]
    with torch.no_grad():
        for parameter in together.parameters():
            parameter.zero_()
    together.load_state_dict(alone.state_dict())
    file = io.BytesIO()
    torch.save(together, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = torch.randn(1, 40)
    with torch.no_grad():
        assert torch.equal(again(x), alone(x))
    assert launches == [3]


@pytest.mark.slow
@torch.no_grad()
def test_compiled_without_a_graph_break(launches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator serves the layers in the graph too, and their weights count as the model's own there.

    Else a CUDA graph would copy them at every replay.
    """
    monkeypatch.setattr(shared_input, "_linear_group", torch.ops.vptq.linear_group.default)
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    alone = Attention()
    together = fused(alone)
    compiled = torch.compile(together, fullgraph=True, backend=keep, dynamic=False)
    x, other = torch.randn(2, 1, 40)
    for _ in range(2):
        assert torch.equal(compiled(x), alone(x))
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.vptq.linear_group.default) == 1
    assert torch.ops.vptq.linear.default not in targets
    inputs = [node.meta["tensor_dict"] for node in graph.graph.nodes if node.op == "placeholder"]
    assert sum("_dynamo_static_input_type" in meta for meta in inputs) == len(inputs) - 1
    assert torch.equal(compiled(x, other), alone(x, other)), "parting is traced too"
    assert together.q_proj.shared_input is None
