"""One linear layer of an engine: several of a checkpoint stacked, or a device's share of their rows and columns.

Engines run q, k and v as one layer, gate and up as another, and cut them for tensor parallelism. The stacked layers
need not be alike: each keeps its own codebooks, vector length and permutation, and some may be dense. On one device
every tensor stays as it was stored and nothing is repacked. On several, each layer is checked whole, cut
(`vptq.integrations.cutting`) and let go of before the next one, so that no device ever holds a whole model.

    tensors as they arrive   `receive` keeps those of a stored layer until it is complete
    a complete layer         becomes a `Piece` for each part of the outputs that it serves
    `forward`                the pieces' outputs side by side

No engine is imported here: `vptq.integrations.vllm` translates one's calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vptq.config import LayerConfig, tensor_specs
from vptq.errors import CheckpointError, ConfigError
from vptq.integrations.cutting import cut_columns, cut_rows
from vptq.linear import VQuantLinear
from vptq.weight import QuantizedWeight, check_stored

DENSE = "weight"
"""The one tensor of a layer that is stored as it was. Biases are the engine's."""

_linear = torch.ops.vptq.linear.default
_linear_group = torch.ops.vptq.linear_group.default


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer of the checkpoint.

    Attributes:
        path: Its module path there, for messages.
        config: How it is quantized, its bias left out; None for a dense one.
    """

    path: str
    config: LayerConfig | None


@dataclass(frozen=True)
class Span:
    """The rows or columns that a device holds: start..stop of `whole`.

    Attributes:
        start: The first.
        stop: One past the last.
        whole: How many there are in the checkpoint.
        missing: How many more are expected of the device: an engine may round a vocabulary up.
    """

    start: int
    stop: int
    whole: int
    missing: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut off."""
        return (self.start, self.stop) == (0, self.whole)


class Piece(nn.Module):
    """Some rows of one stored layer, for some or all of its columns.

    Args:
        layer: A `VQuantLinear`, or an `nn.Linear` for a dense one; without a bias.
        surplus: Rows it has in front of those wanted.
        zeros: Zeros that its input needs at the end.
        missing: Outputs, all zero, to append.
    """

    def __init__(self, layer: VQuantLinear | nn.Linear, surplus: int = 0, zeros: int = 0, missing: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.surplus, self.zeros, self.missing = surplus, zeros, missing
        self.out_features = layer.out_features - surplus + missing

    @property
    def is_dense(self) -> bool:
        """Whether its weight is as it was stored."""
        return not isinstance(self.layer, VQuantLinear)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Outputs [..., out_features], of x [..., columns of the device]."""
        x = functional.pad(x, (0, self.zeros)) if self.zeros else x
        fits = not (self.surplus or self.missing)
        within = bias if fits else None
        if isinstance(self.layer, VQuantLinear):
            y: Tensor = _linear(x, *self.layer._stored(), within, *self.layer._sizes, self.layer.codebook_form)
        else:
            y = functional.linear(x, self.layer.weight, within)
        if fits:
            return y
        y = functional.pad(y[..., self.surplus :], (0, self.missing))
        return y if bias is None else y + bias


class FusedLinear(nn.Module):
    """Stored layers on top of each other: the parts of y = x W^T side by side.

    Args:
        stored: The checkpoint's layers: one for each part, or one that is stored stacked.
        columns: The device's inputs.
        rows: The device's outputs, part by part.
        dtype: Of inputs and outputs; stored floats are brought to it.

    Attributes:
        pieces: One for each part, as soon as all of its stored layers are complete.

    Raises:
        ConfigError: The stored layers do not make up the parts.
    """

    def __init__(self, stored: Sequence[StoredLayer], columns: Span, rows: Sequence[Span], dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.columns, self.rows, self.dtype = tuple(stored), columns, tuple(rows), dtype
        self.pieces = nn.ModuleList()
        self._made: dict[int, list[Piece]] = {}
        self._waiting: dict[int, dict[str, Tensor]] = {}
        self._is_one_launch = False
        if len(self.stored) not in (1, len(self.rows)):
            raise ConfigError(
                f"{self.stored[0].path}: {len(self.stored)} stored layers make up {len(self.rows)} parts of one layer "
                "of the engine; either each part has a layer of its own or one layer has them all"
            )
        for number, layer in enumerate(self.stored):
            if layer.config is not None:
                self._check_shape(number, layer.config.out_features, layer.config.in_features)

    def receive(self, number: int, name: str, tensor: Tensor) -> None:
        """Take one tensor of a stored layer.

        Args:
            number: Which of the stored layers.
            name: Its name there.
            tensor: On the device that is to run the layer; kept as it is, so nobody else may write to it.

        Raises:
            CheckpointError: The layer's tensors contradict its entry, or are damaged, or too large for the dtype.
            ConfigError: A dense layer's shape is not the one expected.
        """
        path, config = self.stored[number].path, self.stored[number].config
        expected = {DENSE} if config is None else {DENSE, *tensor_specs(config, self.dtype)}
        if name not in expected:
            entry = "no entry for it" if config is None else f"an entry that does not allow its tensor {name}"
            raise CheckpointError(f"{path} is stored quantized, but quantization_config has {entry}")
        waiting, made = self._waiting.setdefault(number, {}), self._made.get(number)
        waiting[name] = tensor
        if len({known == DENSE for known in waiting}) > 1 or (made and made[0].is_dense != (name == DENSE)):
            raise CheckpointError(f"{path} is stored twice, dense and quantized")
        # What is stored decides: an entry shared by the end of a name may cover a layer that was left dense.
        if name == DENSE or waiting.keys() == expected - {DENSE}:
            self._made[number] = self._pieces_of(number, self._waiting.pop(number))
        if len(self._made) == len(self.stored):
            self._settle()

    def fill_missing(self, device: torch.device) -> None:
        """Make up tensors, for an engine that measures speed and memory without a checkpoint's weights."""
        for number, layer in enumerate(self.stored):
            if layer.config is None:
                shape = sum(rows.whole for rows in self._rows_of(number)), self.columns.whole
                self.receive(number, DENSE, torch.zeros(shape, dtype=self.dtype, device=device))
                continue
            for name, spec in tensor_specs(layer.config, self.dtype).items():
                make = torch.arange(*spec.shape) if name == "perm" else torch.zeros(spec.shape)
                self.receive(number, name, make.to(device, spec.dtype))

    def check_complete(self) -> None:
        """Raises CheckpointError, naming one, if a stored layer lacks tensors."""
        for number, stored in enumerate(self.stored):
            if number not in self._made and stored.config is None:
                raise CheckpointError(f"{stored.path}: tensor {DENSE} is missing")
            if number not in self._made and stored.config is not None:
                check_stored(stored.config, self._waiting.get(number, {}), stored.path)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs [..., all parts].

        Args:
            x: [..., columns] in the layer's dtype.
            bias: [all parts], or None.
        """
        pieces: list[Piece] = list(self.pieces)  # type: ignore[arg-type]
        sizes = [piece.out_features for piece in pieces]
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        if self._is_one_launch and x.device.type != "cpu":
            return self._launch_once(x, sizes, biases)
        outputs = [piece(x, own) for piece, own in zip(pieces, biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _launch_once(self, x: Tensor, sizes: list[int], biases: Sequence[Tensor | None]) -> Tensor:
        """All parts by one operator, which a GPU launches once; the calls of a CPU take longer than it saves."""
        layers: list[VQuantLinear] = [piece.layer for piece in self.pieces]  # type: ignore[misc]
        tensors = [tensor for layer, own in zip(layers, biases, strict=True) for tensor in (*layer._stored(), own)]
        flat = _linear_group(x, tensors, [size for layer in layers for size in layer._sizes])
        tokens = x.numel() // x.shape[-1]
        outputs = torch.split(flat, [tokens * size for size in sizes])
        return torch.cat([y.view(*x.shape[:-1], size) for y, size in zip(outputs, sizes, strict=True)], -1)

    def _settle(self) -> None:
        pieces = [piece for number in sorted(self._made) for piece in self._made[number]]
        forms = {_form(piece) for piece in pieces}
        self.pieces = nn.ModuleList(pieces)
        self._is_one_launch = len(pieces) > 1 and len(forms) == 1 and None not in forms

    def _rows_of(self, number: int) -> Sequence[Span]:
        return self.rows if len(self.stored) == 1 else self.rows[number : number + 1]

    def _check_shape(self, number: int, *found: int) -> None:
        expected = sum(rows.whole for rows in self._rows_of(number)), self.columns.whole
        if found != expected:
            raise ConfigError(f"{self.stored[number].path} has a weight of shape {found}; the model's is {expected}")

    def _pieces_of(self, number: int, tensors: Mapping[str, Tensor]) -> list[Piece]:
        stored, parts = self.stored[number], self._rows_of(number)
        if DENSE in tensors:
            return self._dense_pieces(number, tensors[DENSE])
        assert stored.config is not None
        stored_dtype = tensors["centroids.weight"].dtype
        if self.columns.is_whole and all(rows.is_whole for rows in parts):
            layer = VQuantLinear.from_tensors(stored.config, tensors, self.dtype, stored.path)
            _check_fits(layer, stored_dtype, stored.path)
            return [Piece(layer, missing=parts[-1].missing)]
        whole = QuantizedWeight.from_tensors(stored.config, tensors, stored.path)
        pieces, above = [], 0
        for rows in parts:
            weight, surplus = cut_rows(whole, above + rows.start, above + rows.stop)
            weight, zeros = cut_columns(weight, self.columns.start, self.columns.stop)
            layer = VQuantLinear.from_weight(weight, self.dtype)
            _check_fits(layer, stored_dtype, stored.path)
            pieces.append(Piece(layer, surplus, zeros, rows.missing))
            above += rows.whole
        return pieces

    def _dense_pieces(self, number: int, weight: Tensor) -> list[Piece]:
        self._check_shape(number, *weight.shape)
        pieces, above = [], 0
        for rows in self._rows_of(number):
            held = weight[above + rows.start : above + rows.stop, self.columns.start : self.columns.stop]
            with torch.device("meta"):
                layer = nn.Linear(held.shape[1], held.shape[0], bias=False)
            layer.weight = nn.Parameter(held.to(self.dtype, copy=True), requires_grad=False)
            _check_fits(layer, weight.dtype, self.stored[number].path)
            pieces.append(Piece(layer, missing=rows.missing))
            above += rows.whole
        return pieces


def _form(piece: Piece) -> object:
    """What pieces have in common that one launch can serve; None for one that it cannot."""
    if isinstance(piece.layer, VQuantLinear) and not (piece.surplus or piece.zeros or piece.missing):
        return dataclasses.replace(piece.layer.config, out_features=1)
    return None


def _check_fits(layer: nn.Module, stored: torch.dtype, where: str) -> None:
    """Raises CheckpointError where a number that was finite in the file is not in the layer's dtype."""
    for name, parameter in layer.named_parameters():
        if parameter.dtype == torch.float16 != stored and not parameter.isfinite().all():
            raise CheckpointError(f"{where}.{name} holds numbers beyond float16's 65504; run the model in bfloat16")
