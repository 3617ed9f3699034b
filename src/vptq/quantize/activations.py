"""Running decoder blocks over the calibration sequences: hidden states in, Hessians and hidden states out.

Linear layers that read the same tensor (q/k/v, gate/up) share a Hessian; which ones do is seen, not known. Unless
all are the original model's, the groups of a block are handled in the order they run, each Hessian taken from what the
already quantized layers before it produce, inside the block too; a pass stops as soon as the inputs of its group are
seen.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vptq.progress import ProgressCallback, ProgressEvent
from vptq.quantize.hessian import HessianAccumulator
from vptq.quantize.precision import quick_products
from vptq.quantize.settled import SettledParts
from vptq.quantize.skeleton import BlockCall, Skeleton, Stop

TOKENS_PER_BATCH = 4096
"""Tokens in flight: enough for full-speed matrix products, few enough that attention scores stay small beside the
rest."""

GLANCE_TOKENS = 64
"""Of one sequence, to see which layers share an input."""

MAX_SEQUENTIAL_GROUPS = 8
"""A block of more input groups than this (experts, each with inputs of its own) gets all its Hessians in one pass."""


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of a block, by path inside it, that read the same input."""

    names: tuple[str, ...]
    features: int


class Activations:
    """The hidden states of all calibration sequences between two blocks, kept on the CPU.

    Attributes:
        batches: [batch, seqlen, hidden] each, in the dtype of the computation; views of one tensor.
    """

    def __init__(self, skeleton: Skeleton, tokens: Tensor, dtype: torch.dtype, *, quick: bool = False) -> None:
        """At the input of the first block.

        Args:
            skeleton: the model.
            tokens: [sequences, seqlen].
            dtype: what blocks run in.
            quick: products of float32 blocks may be rounded (`precision.py`).
        """
        self._skeleton, self._dtype, self._quick = skeleton, dtype, quick and dtype == torch.float32
        size = max(1, TOKENS_PER_BATCH // tokens.shape[1])
        token_batches = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        self._settled = SettledParts()
        self._calls: dict[torch.Size, list[BlockCall]] = {}
        for batch in (*token_batches, tokens[:1, :GLANCE_TOKENS]):
            if batch.shape not in self._calls:
                self._calls[batch.shape] = skeleton.block_calls(batch, dtype)
        hidden = skeleton.embed(token_batches, dtype)
        first = next(hidden)
        states = torch.empty(*tokens.shape, first.shape[-1], dtype=dtype)
        self.batches = list(states.split(size))  # type: ignore[no-untyped-call]
        for batch, entering in zip(self.batches, itertools.chain([first], hidden), strict=True):
            batch.copy_(entering)

    def fork(self) -> Activations:
        """The same hidden states once more, to go another way from here."""
        other = copy.copy(self)
        other._settled = SettledParts()
        states = torch.cat(self.batches)
        other.batches = list(states.split([len(batch) for batch in self.batches]))  # type: ignore[no-untyped-call]
        return other

    @property
    def nbytes(self) -> int:
        """Memory of the hidden states."""
        return sum(batch.nbytes for batch in self.batches)

    def run_model(self, stage: str, progress: ProgressCallback) -> None:
        """Takes the hidden states through all blocks, one of them in memory at a time.

        Args:
            stage: what this is for, in a word or two.
            progress: told before every block, and at the end.
        """
        blocks = len(self._skeleton.blocks)
        for index in range(blocks):
            progress(ProgressEvent(stage, index, blocks))
            self._skeleton.load_block(index, self._dtype)
            self.run_block(index, advance=True)
            self._skeleton.unload_block(index)
        progress(ProgressEvent(stage, blocks, blocks))

    def run_block(
        self,
        index: int,
        visit: Callable[[int], None] | None = None,
        *,
        advance: bool,
    ) -> None:
        """Runs block `index` over all batches.

        Args:
            index: the block; its weights are loaded.
            visit: called with the number of batches done after each.
            advance: replace the hidden states by the block's outputs.
        """
        for position, batch in enumerate(self.batches):
            output = self._run(index, position)
            if advance and output is not None:
                batch.copy_(output)  # in place: new tensors for every block would tear the heap to pieces
            if visit is not None:
                visit(position + 1)
        if advance:
            self._settled.clear()

    def settle(self, index: int, names: Iterable[str]) -> None:
        """Linear layers `names` of block `index`, and all that run before them, stay as they are until it is left
        behind or `unsettle`: passes need not compute again what they put out."""
        self._settled.add(names, self._skeleton.linears(index))

    def unsettle(self) -> None:
        """The block has changed after all."""
        self._settled.clear()

    def input_groups(self, index: int) -> list[InputGroup]:
        """Which linear layers of block `index` share an input, in the order they run; found with a few tokens, or with
        the first batch where those do not reach all layers (experts)."""
        linears, batch = self._skeleton.linears(index), self.batches[0]
        grouped = self._sharing(index, batch[:1, :GLANCE_TOKENS])
        if len(linears) > len(set().union(*grouped)):
            grouped = self._sharing(index, batch)
        missed = [(name,) for name in linears if not any(name in group for group in grouped)]
        return [InputGroup(names, linears[names[0]].in_features) for names in grouped + missed]

    def _sharing(self, index: int, hidden: Tensor) -> list[tuple[str, ...]]:
        """The linear layers that are called with the same tensor while block `index` runs over `hidden`."""
        seen: dict[tuple[int, torch.Size, int], list[str]] = {}
        alive: list[Tensor] = []  # an input kept alive cannot lend its address to a later one

        def notice(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                alive.append(args[0])
                seen.setdefault((args[0].data_ptr(), args[0].shape, args[0]._version), []).append(name)

            return hook

        noticed = (linear.register_forward_pre_hook(notice(n)) for n, linear in self._skeleton.linears(index).items())
        with _hooks(noticed), torch.no_grad():
            self.call(self._skeleton.blocks[index], index, hidden)
        return [tuple(dict.fromkeys(names)) for names in seen.values()]

    def hessians(
        self,
        index: int,
        groups: Sequence[InputGroup],
        visit: Callable[[int], None] | None = None,
        *,
        weights: Sequence[Tensor | None] | None = None,
        advance: bool = False,
        keep: Callable[[str, Tensor], None] = lambda name, inputs: None,
    ) -> list[HessianAccumulator]:
        """One pass over all batches that accumulates the Hessian of each group; stops early unless `advance`.

        Args:
            index: the block; its weights are loaded.
            groups: whose inputs.
            visit: as in `run_block`.
            weights: for each group, what every token counts [sequences, seqlen]; None where all count alike.
            advance: replace the hidden states by the block's outputs.
            keep: given every input as well, with the name of the first layer of its group.
        """
        linears = self._skeleton.linears(index)
        device = self._skeleton.device
        accumulators = [HessianAccumulator(group.features, device, quick=self._quick) for group in groups]
        last = len(groups) - 1

        def accumulate(number: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            parts = itertools.chain(self.split(weights[number] if weights else None), itertools.repeat(None))

            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                accumulators[number].add(args[0], next(parts))
                keep(groups[number].names[0], args[0])
                if number == last and len(groups) == 1 and not advance:
                    raise Stop

            return hook

        with _hooks(linears[group.names[0]].register_forward_pre_hook(accumulate(n)) for n, group in enumerate(groups)):
            self.run_block(index, visit, advance=advance)
        return accumulators

    def split(self, weights: Tensor | None) -> Sequence[Tensor | None]:
        """For each batch, its part of something a token [sequences, seqlen]."""
        if weights is None:
            return [None] * len(self.batches)
        parts: list[Tensor] = list(weights.split([len(batch) for batch in self.batches]))  # type: ignore[no-untyped-call]
        return parts

    def inputs_of(self, name: str, index: int) -> Iterator[Tensor | None]:
        """For each batch, what linear layer `name` is first given in block `index`; None where it is not called."""
        seen: Tensor | None = None

        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal seen
            seen = args[0]
            raise Stop

        layer = self._skeleton.blocks[index].get_submodule(name)
        with _hooks([layer.register_forward_pre_hook(hook)]):
            for position in range(len(self.batches)):
                seen = None
                self._run(index, position)
                yield seen

    def call(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """The hidden states that `block` makes of `hidden` when it is called as block `index` is."""
        call, device = self._calls[hidden.shape[:2]][index], self._skeleton.device
        with quick_products(device) if self._quick else nullcontext():
            return first_tensor(block(hidden.to(device), *call.args, **call.kwargs))

    def _run(self, index: int, position: int) -> Tensor | None:
        """What the block makes of a batch, without gradients; None where a hook has stopped it."""
        block = self._skeleton.blocks[index]
        try:
            with torch.no_grad(), self._settled.reused(block, position):
                return self.call(block, index, self.batches[position])
        except Stop:
            return None


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a block returns: the tensor itself, or the first of a tuple."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


@contextmanager
def _hooks(handles: Iterable[Any]) -> Iterator[None]:
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()
