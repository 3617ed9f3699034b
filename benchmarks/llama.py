"""A Llama of random weights, dense or quantized, that generates in a CUDA graph: the end-to-end rows of gpu.py.

Written out, because `make gpu` has to run where transformers is not, and because a graph must hold a whole step: the
token, its position and the cache stay on the device, and a step's replay leaves them ready for the next one. Modules
are named as in transformers. On a CPU the same steps run one by one, which is how the tests try it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vptq.linear import VQuantLinear
from vptq.shared_input import fuse_shared_inputs
from vptq.spec import QuantSpec

MakeLinear = Callable[[int, int], nn.Module]
"""Of in_features and out_features."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; those of Llama-2-7B unless told otherwise."""

    blocks: int = 32
    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    kv_heads: int = 32
    vocabulary: int = 32000
    context: int = 160

    @property
    def head(self) -> int:
        """Width of an attention head."""
        return self.hidden // self.heads


class Norm(nn.Module):
    """Root mean square normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return functional.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Attention(nn.Module):
    """One token's attention to all before it, whose keys and values are kept."""

    def __init__(self, shape: Shape, linear: MakeLinear) -> None:
        super().__init__()
        self.shape = shape
        width = shape.kv_heads * shape.head
        self.q_proj, self.o_proj = linear(shape.hidden, shape.hidden), linear(shape.hidden, shape.hidden)
        self.k_proj, self.v_proj = linear(shape.hidden, width), linear(shape.hidden, width)
        cache = torch.zeros(2, 1, shape.kv_heads, shape.context, shape.head)
        self.register_buffer("cache", cache, persistent=False)

    def forward(self, x: Tensor, position: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """x [1, hidden] at a position, which is a tensor as the rest."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (each(x).view(1, 1, -1, self.shape.head).transpose(1, 2) for each in projections)
        self.cache[0].index_copy_(2, position, turned(k, turn))
        self.cache[1].index_copy_(2, position, v)
        grouped = self.shape.kv_heads != self.shape.heads
        y = functional.scaled_dot_product_attention(turned(q, turn), *self.cache, mask, enable_gqa=grouped)
        return self.o_proj(y.transpose(1, 2).reshape(1, -1))


class Mlp(nn.Module):
    """The gated half of a block."""

    def __init__(self, shape: Shape, linear: MakeLinear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = linear(shape.hidden, shape.inner), linear(shape.hidden, shape.inner)
        self.down_proj = linear(shape.inner, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, hidden]."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP, each behind its norm and beside the residual stream."""

    def __init__(self, shape: Shape, linear: MakeLinear) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape, linear), Mlp(shape, linear)
        self.input_layernorm, self.post_attention_layernorm = Norm(shape.hidden), Norm(shape.hidden)

    def forward(self, x: Tensor, *where: Any) -> Tensor:
        """x [1, hidden]; the rest is the attention's."""
        x = x + self.self_attn(self.input_layernorm(x), *where)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Greedy generation of one sequence, a token a step. Call it under `torch.device` and a default dtype."""

    def __init__(self, shape: Shape, linear: MakeLinear) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.model.layers = nn.ModuleList(Block(shape, linear) for _ in range(shape.blocks))
        self.model.norm = Norm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        frequencies = 10000.0 ** (-torch.arange(0, shape.head, 2, dtype=torch.float32) / shape.head)
        angles = torch.arange(shape.context)[:, None] * frequencies.repeat(2)
        for name, tensor in {
            **{"cos": angles.cos().to(torch.get_default_dtype()), "sin": angles.sin().to(torch.get_default_dtype())},
            **{"token": torch.ones(1, dtype=torch.long), "position": torch.zeros(1, dtype=torch.long)},
            "places": torch.arange(shape.context),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def step(self) -> Tensor:
        """Reads the token at the position; leaves the next token and position in their place. Returns that token."""
        x = self.model.embed_tokens(self.token)
        turn = self.cos.index_select(0, self.position), self.sin.index_select(0, self.position)
        mask = (self.places <= self.position).view(1, 1, 1, -1)
        for block in self.model.layers:
            x = block(x, self.position, turn, mask)
        self.token.copy_(self.lm_head(self.model.norm(x)).argmax(-1))
        self.position.add_(1)
        return self.token

    def restart(self, token: int = 1) -> None:
        """Begins a new sequence; what the cache holds of the last one is masked."""
        self.token.fill_(token)
        self.position.zero_()


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [1, heads, 1, head]."""
    low, high = x.chunk(2, -1)
    return x * turn[0] + torch.cat((-high, low), -1) * turn[1]


def random_layer(name: str, shape: tuple[int, int], device: str = "cuda") -> VQuantLinear:
    """Of a spec's name and (out, in): random codebooks, and index bits that are uniform."""
    layer = VQuantLinear.from_config(QuantSpec.parse(name).for_layer(shape[1], shape[0], False), torch.float16, device)
    for tensor_name, parameter in layer.named_parameters():
        if parameter.dtype.is_floating_point:
            parameter.data.normal_(std=0.02)
        elif tensor_name == "indices":
            parameter.data.random_(-(2**31), 2**31 - 1)
        else:
            parameter.data.copy_(torch.randperm(shape[1]))
    return layer


def random_model(name: str, shape: Shape, device: str) -> Llama:
    """float16 throughout where the spec's name is empty, else quantized in all blocks."""

    def linear(width: int, rows: int) -> nn.Module:
        return random_layer(name, (rows, width), device) if name else nn.Linear(width, rows, bias=False)

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device(device):
            return Llama(shape, linear).requires_grad_(False)
    finally:
        torch.set_default_dtype(dtype)


def replayed(model: Llama, device: str) -> Callable[[], object]:
    """A step to call again and again: on a GPU, the replay of a graph that holds it."""
    if device == "cpu":
        return model.step
    for _ in range(3):  # tunes, compiles
        model.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    return graph.replay


def tokens_per_second(model: Llama, tokens: int, device: str) -> float:
    with torch.inference_mode():
        step = replayed(model, device)
        model.restart()
        step()
        synchronize(device)
        began = time.perf_counter()
        for _ in range(tokens):
            step()
        synchronize(device)
    return tokens / (time.perf_counter() - began)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def end_to_end(name: str, shape: Shape, tokens: int, device: str = "cuda") -> dict[str, Any]:
    """One row: speed with layers of one input run together and apart, and memory beside the stored bytes."""
    before = torch.cuda.memory_allocated() if device != "cpu" else 0
    model = random_model(name, shape, device)
    row: dict[str, Any] = {"config": name or "float16", "stored_bytes": sum(p.nbytes for p in model.parameters())}
    row["cache_bytes"] = sum(block.self_attn.cache.nbytes for block in model.model.layers)
    if name:
        row["apart_tokens_per_second"] = tokens_per_second(model, tokens, device)
        fuse_shared_inputs(model)
    row["tokens_per_second"] = tokens_per_second(model, tokens, device)
    if device != "cpu":
        row["memory_bytes"] = torch.cuda.max_memory_allocated() - before
        row["memory_over_stored"] = row["memory_bytes"] / row["stored_bytes"]
    return row
