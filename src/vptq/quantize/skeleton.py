"""A model whose weights stay on disk: the modules on the meta device, filled and emptied one decoder block at a time.

Quantizing needs the model's own code (any architecture, no table of families) but only one block's weights at a time.
The decoder blocks are found by their shape: the longest `ModuleList` whose members hold linear layers. What a block is
called with (masks, position embeddings, layer types) is recorded by running the model's own forward with every block
replaced by a recorder, so that no block signature is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vptq.errors import ConfigError
from vptq.quantize.weights import Tensors
from vptq.transformers_versions import tied_weights


class Stop(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a forward pass as soon as what it was run for has been seen."""


@dataclass(frozen=True)
class BlockCall:
    """What the model passes to one decoder block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Skeleton:
    """A causal LM on the meta device with its weight files.

    Attributes:
        model: the transformers model; parameters on meta unless loaded.
        blocks_name: path of the ModuleList of decoder blocks, such as `model.layers`.
        blocks: its members.
    """

    def __init__(self, model: nn.Module, files: Tensors, device: torch.device) -> None:
        self.model = model.eval()
        self.files = files
        self.device = device
        self.blocks_name, self.blocks = find_blocks(model)
        self._wraps = False  # whether blocks return tuples; seen when the model is first run
        self._inside = tuple(f"{self.blocks_name}.{i}." for i in range(len(self.blocks)))

    def load_block(self, index: int, dtype: torch.dtype) -> nn.Module:
        """Puts block `index` on the device in `dtype` and returns it."""
        self._load(self.blocks[index], self._inside[index], dtype)
        return self.blocks[index]

    def unload_block(self, index: int) -> None:
        """Frees the weights of block `index`."""
        _to_meta(self.blocks[index])

    @property
    def num_linears(self) -> int:
        """Linear layers in all blocks."""
        return sum(len(self.linears(index)) for index in range(len(self.blocks)))

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of block `index` by their path inside the block."""
        return linears_of(self.blocks[index])

    def embed(self, batches: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """For each batch of tokens [batch, seqlen]: the hidden states that enter the first block."""
        self._load_outside(dtype)
        for batch in batches:
            yield self._record(batch)[0]
        self._unload_outside()

    def block_calls(self, tokens: Tensor, dtype: torch.dtype) -> list[BlockCall]:
        """What each block is called with for a batch of `tokens` [batch, seqlen]; holds for every batch of that
        shape."""
        self._load_outside(dtype)
        _, calls = self._record(tokens)
        self._unload_outside()
        return calls

    def load_everything(self, dtype: torch.dtype) -> None:
        """Puts all that is still on the meta device in place: the whole model then runs."""
        self._load_outside(dtype)
        for index in range(len(self.blocks)):
            self.load_block(index, dtype)
        self.model.tie_weights()  # type: ignore[operator]

    def load_head(self, dtype: torch.dtype) -> nn.Module:
        """The model with nothing but its output head in place, and left there."""
        path, head = head_of(self.model)
        source = tied_weights(self.model).get(f"{path}.weight", f"{path}.weight")
        head.weight = nn.Parameter(self.files.load(source).to(self.device, dtype), requires_grad=False)
        if head.bias is not None:
            head.bias = nn.Parameter(self.files.load(f"{path}.bias").to(self.device, dtype), requires_grad=False)
        return self.model

    def last_states(self, hidden: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """For each of the states that leave the last block [batch, seqlen, width]: the same behind the final norm, with
        a way back if they ask for gradients.

        Raises:
            ConfigError: the model does not say what its last hidden states are.
        """
        self._load_outside(dtype)
        for states in hidden:
            tokens = torch.zeros(states.shape[:2], dtype=torch.int64, device=self.device)
            with self._leaving(states.to(self.device)), torch.set_grad_enabled(states.requires_grad):
                output = self.model.get_decoder()(input_ids=tokens, use_cache=False)  # type: ignore[operator]
            last = getattr(output, "last_hidden_state", None)
            if not isinstance(last, Tensor) or last.shape != states.shape:
                kind = type(self.model).__name__
                raise ConfigError(
                    f"{kind} does not give its last hidden states: it cannot be finetuned, nor its head quantized"
                )
            yield last
        self._unload_outside()

    def logits(self, tokens: Tensor, hidden: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
        """For each of the states that leave the last block for `tokens` [batch, seqlen]: the model's logits."""
        self._load_outside(dtype)
        for states in hidden:
            with self._leaving(states.to(self.device)), torch.no_grad():
                output: Any = self.model(input_ids=tokens.to(self.device), use_cache=False)
            yield output.logits
        self._unload_outside()

    @contextmanager
    def _leaving(self, hidden: Tensor) -> Iterator[None]:
        """While this is open, the blocks compute nothing and the last one gives `hidden`."""
        given: Any = (hidden,) if self._wraps else hidden
        for block in self.blocks:
            block.forward = lambda *_args, **_kwargs: given
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _record(self, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Runs the model up to its last block with recorders in the blocks' places."""
        for as_tuple in (False, True):  # most blocks return a tensor; some architectures still index into a tuple
            seen: list[Tensor] = []
            calls: list[BlockCall] = []

            def recorder(
                hidden: Tensor, *args: Any, seen: Any = seen, calls: Any = calls, wrap: bool = as_tuple, **kwargs: Any
            ) -> Any:
                seen.append(hidden)
                calls.append(BlockCall(args, kwargs))
                if len(calls) == len(self.blocks):
                    raise Stop
                return (hidden,) if wrap else hidden

            for block in self.blocks:
                block.forward = recorder
            try:
                with torch.no_grad():
                    self.model(input_ids=tokens.to(self.device), use_cache=False)
            except Stop:
                pass
            finally:
                for block in self.blocks:
                    del block.forward
            self._wraps = as_tuple
            if len(calls) == len(self.blocks) and all(other.shape == seen[0].shape for other in seen):
                return seen[0], calls
        raise ConfigError(
            f"{type(self.model).__name__} does not run its {self.blocks_name} one by one: not a decoder-only model"
        )

    def _load(self, module: nn.Module, prefix: str, dtype: torch.dtype) -> None:
        for name, parameter in list(module.named_parameters()) + list(module.named_buffers()):
            if parameter.is_meta:
                _assign(module, name, self.files.load(prefix + name).to(self.device, _kept(parameter, dtype)))

    def _load_outside(self, dtype: torch.dtype) -> None:
        for name, tensor in list(self.model.named_parameters()) + list(self.model.named_buffers()):
            if tensor.is_meta and not name.startswith(self._inside) and name in self.files:
                _assign(self.model, name, self.files.load(name).to(self.device, _kept(tensor, dtype)))
        for name, source in tied_weights(self.model).items():  # a head without a tensor of its own
            if not name.startswith(self._inside) and self.model.get_parameter(name).is_meta:
                _assign(self.model, name, self.model.get_parameter(source).data)

    def _unload_outside(self) -> None:
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(self._inside) and not parameter.is_meta:
                _assign(self.model, name, torch.empty_like(parameter, device="meta"))


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The decoder blocks: the outermost ModuleList of modules with linear layers that holds the most weights.

    Raises:
        ConfigError: when the model has none.
    """
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(linears_of(member) for member in module)
    }
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers: nothing to quantize"
        )
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]

    def weights(name: str) -> int:
        return sum(linear.weight.numel() for member in lists[name] for linear in linears_of(member).values())

    chosen = max(outermost, key=weights)
    return chosen, lists[chosen]


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """The output head: its module path, and the layer.

    Raises:
        ConfigError: the model has none that is a linear layer.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    path = next((path for path, module in model.named_modules() if module is head), "")
    if not path or not isinstance(head, nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no output head that is a linear layer")
    return path, head


def linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    """Path inside `module` -> linear layer, in the order of definition."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def recompute(block: nn.Module) -> None:
    """Lets a block keep only its inputs for the backward pass, and run again there; `del block.forward` undoes it."""
    block.forward = partial(_run_again, block.forward)


def _run_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _kept(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def _assign(root: nn.Module, name: str, value: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = root.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _to_meta(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters()):
        _assign(module, name, torch.empty_like(parameter, device="meta"))
