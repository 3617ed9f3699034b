"""Rotations folded into the weights of a model, which computes the same function afterwards with easier weights.

    residual stream   x -> x Q     one Q for the whole model (R1 of QuaRot and SpinQuant, arXiv 2404.00456, 2405.16406)
    heads             v -> v R     one R a block, shared by its heads (R2), so that query groups need no bookkeeping

A linear layer (y = x W^T + b) that reads the stream gets W diag(g) Q, g being the weight of the RMSNorm before it,
which becomes 1: only without its weight does an RMSNorm commute with a rotation. One that writes to the stream gets
Q^T W and b Q. v_proj and o_proj do the same with R. Nothing is added at run time, the architecture stays what it is.

The output head reads through the last norm and the embedding through none, so tied embeddings come apart.

Which layer reads and which writes is known for one layout, Llama's, by the names of its parameters. Names are no proof
(Gemma has the same ones, and scales by 1 + g), so the folded model is run against the original before anything is
quantized, block by block. The weights are folded while they are read; no second copy of the model is stored.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vptq.errors import ConfigError
from vptq.progress import ProgressCallback
from vptq.quantize.activations import Activations
from vptq.quantize.rotation import Rotation
from vptq.quantize.skeleton import Skeleton, find_blocks
from vptq.quantize.weights import Tensors

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
READERS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
"""Layer of a block that reads the residual stream -> the norm it reads it through."""
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Norms inside the heads, of queries and keys, which no rotation here touches."""

CHECK_TOKENS = 32
TOLERANCE = 1e-3
"""Difference of the logits over their size. Float32 rounding makes it 1.6e-6 on SmolLM2-135M, and more in deeper
models; what the rotations do not account for changes the logits by about as much as they are."""


@dataclass(frozen=True)
class Fold:
    """What one linear layer or embedding absorbs.

    Attributes:
        norm: the norm before it, or None.
        inputs: rotation of what it reads, which is undone first.
        outputs: rotation of what it writes.
    """

    norm: str | None = None
    inputs: Rotation | None = None
    outputs: Rotation | None = None

    def weight(self, weight: Tensor, norm: Tensor | None) -> Tensor:
        """The folded weight [out, in], float32; `norm` is the weight of the norm before it."""
        folded = weight.float()
        if norm is not None:
            folded = folded * norm.float()
        if self.inputs is not None:
            folded = self.inputs(folded)
        return folded if self.outputs is None else self.outputs(folded.T).T.contiguous()

    def bias(self, bias: Tensor) -> Tensor:
        """The folded bias [out]."""
        return bias if self.outputs is None else self.outputs(bias.float())


class FoldedFiles:
    """The tensors of `files` with every fold applied as they are read; what has no fold is as it was.

    Folded tensors are float32 whatever they were stored in: they are rounded once, when they are stored again.
    """

    def __init__(self, files: Tensors, folds: Mapping[str, Fold], tied: Mapping[str, str]) -> None:
        self._files = files
        self._folds = folds
        self._norms = {f"{fold.norm}.weight" for fold in folds.values() if fold.norm is not None}
        self._stored_as = tied

    def __contains__(self, name: str) -> bool:
        return self._stored_as.get(name, name) in self._files

    def __iter__(self) -> Iterator[str]:
        yield from self._files
        yield from (name for name in self._stored_as if name not in self._files)

    def load(self, name: str) -> Tensor:
        """The tensor as it is after folding.

        Raises:
            CheckpointError: when no file holds it.
        """
        tensor = self._files.load(self._stored_as.get(name, name))
        if name in self._norms:
            return torch.ones_like(tensor)
        path, _, leaf = name.rpartition(".")
        if path not in self._folds:
            return tensor
        fold = self._folds[path]
        if leaf == "bias":
            return fold.bias(tensor)
        return fold.weight(tensor, None if fold.norm is None else self._files.load(f"{fold.norm}.weight"))


def check_layout(model: Any) -> None:
    """Whether `model` has Llama's layout; its parameters may be on the meta device.

    Raises:
        ConfigError: it has not; with one parameter that differs.
    """
    blocks = range(len(find_blocks(model)[1]))
    linears = [f"model.layers.{index}.{path}" for index in blocks for path in (*READERS, *WRITERS)]
    norms = [f"model.layers.{index}.{path}" for index in blocks for path in dict.fromkeys(READERS.values())]
    required = [f"{path}.weight" for path in (EMBEDDING, *linears, *norms, FINAL_NORM, HEAD)]
    known = {f"{path}.bias" for path in linears}
    known |= {f"model.layers.{index}.{path}.weight" for index in blocks for path in HEAD_NORMS}
    found = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    odd = [f"no {name}" for name in required if name not in found]
    odd += [f"a {name}" for name in found if name not in known.union(required)]
    if not odd and any(block.self_attn.v_proj.out_features % _head_size(model, block) for block in model.model.layers):
        odd = ["values that are no whole number of attention heads"]
    if odd:
        raise ConfigError(
            f"--rotate: {type(model).__name__} has {odd[0]}, unlike Llama, Mistral, Qwen2, Qwen3 and models laid out"
            " like them, which are all that rotations can be folded into; leave --rotate out"
        )


def folds_of(model: Any, seed: int) -> dict[str, Fold]:
    """Path of each layer of a model with Llama's layout -> its fold; same seed, same rotations."""
    stream = Rotation(model.get_submodule(EMBEDDING).embedding_dim, _generator(seed, "stream"))
    folds = {EMBEDDING: Fold(inputs=stream), HEAD: Fold(norm=FINAL_NORM, inputs=stream)}
    for index, block in enumerate(model.model.layers):
        name, heads = f"model.layers.{index}", Rotation(_head_size(model, block), _generator(seed, f"heads/{index}"))
        for path, norm in READERS.items():
            outputs = heads if path == "self_attn.v_proj" else None
            folds[f"{name}.{path}"] = Fold(norm=f"{name}.{norm}", inputs=stream, outputs=outputs)
        for path in WRITERS:
            folds[f"{name}.{path}"] = Fold(inputs=heads if path == "self_attn.o_proj" else None, outputs=stream)
    return folds


def check_same_function(original: Skeleton, folded: Skeleton, seed: int, progress: ProgressCallback) -> None:
    """Runs both models on a few random tokens, in float32 and one block at a time.

    Raises:
        ConfigError: their logits differ by more than rounding.
    """
    embedding: Any = original.model.get_submodule(EMBEDDING)
    tokens = torch.randint(0, embedding.num_embeddings, (1, CHECK_TOKENS), generator=_generator(seed, "check"))
    expected, found = _logits(original, tokens, progress), _logits(folded, tokens, progress)
    if not bool(torch.isfinite(expected).all()):
        raise ConfigError("--rotate: the original's logits hold NaN or infinity: the model file is damaged")
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= TOLERANCE:
        raise ConfigError(
            f"--rotate: {type(original.model).__name__} has Llama's parameters but uses them in another way: with"
            f" rotations folded in, its logits change by {difference:.2g} of their size, where rounding explains"
            f" {TOLERANCE:g}; leave --rotate out"
        )


def _logits(skeleton: Skeleton, tokens: Tensor, progress: ProgressCallback) -> Tensor:
    activations = Activations(skeleton, tokens, torch.float32)
    activations.run_model("checking the rotation", progress)
    (logits,) = skeleton.logits(tokens, activations.batches, torch.float32)
    return logits


def _head_size(model: Any, block: Any) -> int:
    """Entries of an attention head of `block`."""
    size: int = block.self_attn.o_proj.in_features // model.config.num_attention_heads
    return size


def _generator(seed: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/rotation/{purpose}".encode()))
