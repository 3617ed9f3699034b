"""The layer that takes a linear layer's place in a model.

`VQuantLinear` keeps the stored tensors as they are, under the names of the checkpoint, and hands them to
`vptq::linear`; all layout work was done offline. Its constructor takes the keys of a layer's entry in
`quantization_config`, as every published loader (transformers among them) calls it; code of this package goes through
`from_config`, `from_tensors` or `from_weight`.

Gradients flow through the layer to its input and, once `train_floats` has asked for it, to its codebooks, scales,
column biases and bias; indices have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import vptq.ops  # noqa: F401 (registers the operators)
from vptq.config import LayerConfig, tensor_specs
from vptq.ops.schemas import check_input
from vptq.weight import QuantizedWeight, check_indices, check_stored, normalize

if TYPE_CHECKING:
    from vptq.shared_input import SharedInput

# The operators themselves: the typed wrappers of `vptq.ops` would cost a call more per layer and token.
_linear = torch.ops.vptq.linear.default
_dequantize = torch.ops.vptq.dequantize.default


class _Frozen(torch.autograd.Function):
    """y = x W^T + bias with a gradient for x only, as adapters on top of the layer need it.

    Backward makes the dense weight a second time. Autograd left to itself would keep the one of every layer until
    then: training a few adapters would take the memory of the whole dense model.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, sizes: tuple[int, ...], form: str, *stored: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*stored)  # not the layer: its tensors may be offloaded by then
        ctx.sizes = sizes
        y: Tensor = _linear(x, *stored, bias, *sizes, form)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        return grad @ _dequantize(*stored, *ctx.sizes), *[None] * (3 + len(stored))


class Codebook(nn.Module):
    """A bare holder of `weight`: the format prefixes codebooks as if they were embeddings."""

    weight: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def _is_autocast(device: str) -> bool:
    # Some devices, meta among them, know no autocast, and asking them is an error.
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class VQuantLinear(nn.Module):
    """A linear layer y = x W^T + bias whose weight is vector-quantized.

    Every tensor of `tensor_specs` is a parameter from construction on, zero until loaded, created on the ambient
    device and in the ambient default dtype unless told otherwise.

    Args:
        in_features: Input width.
        out_features: Output width.
        vector_lens: [outlier vector length or -1, vector length].
        num_centroids: [outlier codebook entries or -1, main codebook entries].
        num_res_centroids: [-1, residual codebook entries or -1].
        group_num: Column groups.
        group_size: Columns per group.
        outlier_size: Outlier columns.
        indices_as_float: Legacy; carriers are told apart by their dtype.
        enable_norm: Per-column scale and bias.
        enable_perm: Column permutation.
        is_indice_packed: Packed indices.
        bias: The layer has a bias.
        vector_quant_dim: Only "out" exists.
        device: Where to create the tensors; None for the ambient device.
        dtype: float16, bfloat16 or float32; None for the default dtype.
        enable_proxy_error: Accepted for the published loaders' sake; it selected a debugging path there.

    Attributes:
        codebook_form: What kernels may make of the codebooks, see `vptq.ops.linear`; not stored.
        shared_input: The layers that this one runs together with, see `vptq.shared_input`; not stored.

    Raises:
        ConfigError: The values contradict each other.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        vector_lens: Sequence[int],
        num_centroids: Sequence[int],
        num_res_centroids: Sequence[int],
        group_num: int,
        group_size: int,
        outlier_size: int,
        indices_as_float: bool | None,
        enable_norm: bool = False,
        enable_perm: bool = False,
        is_indice_packed: bool = False,
        bias: bool = False,
        vector_quant_dim: str = "out",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        enable_proxy_error: bool = False,
    ) -> None:
        super().__init__()
        entry: dict[str, Any] = {
            "in_features": in_features,
            "out_features": out_features,
            "vector_lens": list(vector_lens),
            "num_centroids": list(num_centroids),
            "num_res_centroids": list(num_res_centroids),
            "group_num": group_num,
            "group_size": group_size,
            "outlier_size": outlier_size,
            "indices_as_float": indices_as_float,
            "enable_norm": enable_norm,
            "enable_perm": enable_perm,
            "is_indice_packed": is_indice_packed,
            "bias": bias,
            "vector_quant_dim": vector_quant_dim,
        }
        self.config = LayerConfig.from_entry(entry, where="VQuantLinear")
        config = self.config
        self._sizes = (config.in_features, config.out_features, config.vector_len, config.outlier_vector_len)
        self.codebook_form = ""
        self.shared_input: SharedInput | None = None
        self.in_features = in_features
        self.out_features = out_features
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)  # code that walks linears asks for it
        for name, spec in tensor_specs(self.config, dtype or torch.get_default_dtype()).items():
            initial = torch.zeros(spec.shape, dtype=spec.dtype, device=device)
            if name.endswith(".weight"):
                self.add_module(name.removesuffix(".weight"), Codebook(initial))
            else:
                self.register_parameter(name, nn.Parameter(initial, requires_grad=False))

    @classmethod
    def from_config(
        cls, config: LayerConfig, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> VQuantLinear:
        """An empty layer of the given dimensions, ready for `load_state_dict`."""
        return cls(**config.to_entry(), dtype=dtype, device=device)

    @classmethod
    def from_tensors(
        cls, config: LayerConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None, where: str = "layer"
    ) -> VQuantLinear:
        """A layer from tensors as stored, legacy carriers included.

        Args:
            config: The layer.
            tensors: By on-disk name; tensors already in the right dtype are shared, not copied.
            dtype: Float dtype; None for that of the main codebook.
            where: The layer's name, for messages.

        Raises:
            CheckpointError: The tensors contradict `config`, or an index points outside its codebook.
        """
        check_stored(config, tensors, where)
        check_indices(config, tensors, where)
        dtype = dtype or tensors["centroids.weight"].dtype
        layer = cls.from_config(config, dtype=dtype, device="meta")
        layer.load_state_dict(normalize(config, tensors, dtype), assign=True)
        return layer

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, dtype: torch.dtype) -> VQuantLinear:
        """A layer that holds `weight`, its floats rounded to `dtype`."""
        return cls.from_tensors(weight.config, weight.to_tensors(dtype), dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The float dtype of the layer and of its inputs."""
        return self._codebook("centroids").dtype  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., in_features] in the layer's dtype, or any float dtype under autocast; any strides, any number of
                rows.

        Returns:
            [..., out_features] in the layer's dtype.

        Raises:
            ConfigError: `x` has the wrong width or dtype.
        """
        bias = self._parameters["bias"]
        if x.shape[-1:] != (self.in_features,) or x.dtype != self.dtype:
            if x.is_floating_point() and _is_autocast(x.device.type):
                # Who trains under autocast expects a linear layer to take what it gets.
                return functional.linear(x, self.dequantize_with_gradient(), bias)
            check_input(x, self._codebook("centroids"), self.in_features)  # type: ignore[arg-type]
        y: Tensor | None = None
        if torch.is_grad_enabled():
            if any(p.requires_grad for p in self.parameters()):
                return functional.linear(x, self.dequantize_with_gradient(), bias)
            if x.requires_grad:
                y = _Frozen.apply(x, bias, self._sizes, self.codebook_form, *self._stored())  # type: ignore[no-untyped-call]
        if y is None and self.shared_input is not None:
            y = self.shared_input.output(self, x)
        return _linear(x, *self._stored(), bias, *self._sizes, self.codebook_form) if y is None else y

    def dequantize(self) -> Tensor:
        """The dense weight [out_features, in_features] in the layer's dtype, detached."""
        with torch.no_grad():
            return self.dequantize_with_gradient()

    def dequantize_with_gradient(self) -> Tensor:
        """The same, with a way back to the codebooks, scales and column biases that ask for gradients."""
        weight: Tensor = _dequantize(*self._stored(), *self._sizes)
        return weight

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A linear layer of PyTorch that computes the same.

        Args:
            dtype: Of its weight and bias; None for the layer's own.

        Returns:
            A layer with a frozen weight. Where no cast is needed its bias is this layer's own: whoever trains the one
            trains the other.
        """
        dtype = dtype or self.dtype
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=False)
        dense.weight = nn.Parameter(self.dequantize().to(dtype), requires_grad=False)
        bias = self.bias
        if bias is not None and bias.dtype != dtype:
            bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
        dense.register_parameter("bias", bias)
        return dense

    def train_floats(self, mode: bool = True) -> None:
        """Ask for gradients of all that is not an index: codebooks, scales, column biases and the bias.

        They come in the layer's own dtype: train in float32, where small steps are not rounded away, and round at the
        end.
        """
        for parameter in self.parameters():
            parameter.requires_grad_(mode and parameter.is_floating_point())

    def extra_repr(self) -> str:
        """Dimensions and size, for printing a model."""
        config = self.config
        residual = f", residual {config.num_residual_centroids}" if config.has_residual else ""
        return (
            f"in_features={config.in_features}, out_features={config.out_features}, bias={config.bias}, "
            f"vectors of {config.vector_len}, codebook {config.num_centroids}{residual}, "
            f"{config.bits_per_weight:.2f} bits per weight"
        )

    def _stored(self) -> tuple[Tensor | None, ...]:
        # Straight from the dictionaries: attribute access on a module falls through to Python's __getattr__, and nine
        # of them cost as much as the operator call.
        tensors = self._parameters
        return (
            self._codebook("centroids"),
            tensors["indices"],
            self._codebook("res_centroids"),
            tensors.get("res_indices"),
            self._codebook("outlier_centroids"),
            tensors.get("outlier_indices"),
            tensors.get("perm"),
            tensors.get("weight_scale"),
            tensors.get("weight_bias"),
        )

    def _codebook(self, name: str) -> Tensor | None:
        module = self._modules.get(name)
        return None if module is None else module._parameters["weight"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Bring legacy carriers into our dtypes first: copying would convert bit patterns by value."""
        names = tensor_specs(self.config, self.dtype)
        found = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        state_dict.update({prefix + name: tensor for name, tensor in normalize(self.config, found, self.dtype).items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
