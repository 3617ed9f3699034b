"""One quantized weight in memory: what the solver produces, and what is packed, stored and read back.

`QuantizedWeight` holds indices as plain integers and codebooks as [centroid, element] tables, so that code working on
them needs to know nothing of carriers, bit streams and flattened codebooks. `to_tensors` and `from_tensors` cross over
to the names and layouts of the checkpoint. The two checks a stored layer must pass live here too, split by what they
cost: `check_stored` needs headers only, `check_indices` reads the index tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.config import LayerConfig, TensorSpec, tensor_specs
from vptq.errors import CheckpointError
from vptq.packing import from_carrier, pack, to_carrier, unpack


@dataclass
class QuantizedWeight:
    """A quantized linear layer.

    G groups of S columns, L outlier columns, I = L + G*S; R vector rows of length v (Ro of length vo for outliers).

    Attributes:
        config: Dimensions and options.
        codebook: [G, K, v] float.
        indices: [G, R, S] integer; entry [g, r, j] belongs to output rows r*v.. and quantized column L + g*S + j.
        residual_codebook: [G, Kr, v] float, or None.
        residual_indices: [G, R, S] integer, or None.
        outlier_codebook: [Ko, vo] float, or None.
        outlier_indices: [Ro, L] integer, or None.
        perm: [I] int64, perm[p] is the original column at quantized position p; or None.
        weight_scale: [I] float per original column, or None.
        weight_bias: [I] float per original column, or None.
        bias: [O] float, the linear layer's own; or None.
    """

    config: LayerConfig
    codebook: Tensor
    indices: Tensor
    residual_codebook: Tensor | None = None
    residual_indices: Tensor | None = None
    outlier_codebook: Tensor | None = None
    outlier_indices: Tensor | None = None
    perm: Tensor | None = None
    weight_scale: Tensor | None = None
    weight_bias: Tensor | None = None
    bias: Tensor | None = None

    def to_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors to store, by their on-disk names.

        Args:
            dtype: Float dtype of the stored layer: float16, bfloat16 or float32.

        Raises:
            ConfigError: An index does not fit its codebook.
            CheckpointError: The tensors do not have the shapes that `config` promises.
        """
        config = self.config
        found: dict[str, Tensor | None] = {
            "centroids.weight": self.codebook.flatten(1),
            "res_centroids.weight": None if self.residual_codebook is None else self.residual_codebook.flatten(1),
            "outlier_centroids.weight": None if self.outlier_codebook is None else self.outlier_codebook.reshape(1, -1),
            "outlier_indices": None if self.outlier_indices is None else to_carrier(self.outlier_indices).unsqueeze(0),
            "weight_scale": self.weight_scale,
            "weight_bias": self.weight_bias,
            "bias": self.bias,
        }
        if config.is_packed:
            found["indices"] = pack(self.indices, self.residual_indices, config.index_bits, config.residual_bits)
        else:
            found["indices"] = to_carrier(self.indices)
            found["res_indices"] = None if self.residual_indices is None else to_carrier(self.residual_indices)
        if self.perm is not None:
            found["perm"] = to_carrier(self.perm) if config.is_packed else self.perm.to(torch.int64)

        specs = tensor_specs(config, dtype)
        stored = {name: tensor for name, tensor in found.items() if tensor is not None}
        check_stored(config, stored, "weight")
        return {name: stored[name].to(spec.dtype).contiguous() for name, spec in specs.items()}

    @classmethod
    def from_tensors(cls, config: LayerConfig, tensors: Mapping[str, Tensor], where: str = "layer") -> QuantizedWeight:
        """Read the tensors of one layer, in any carrier the published versions used.

        Args:
            config: The layer.
            tensors: By on-disk name, without the module path.
            where: The layer's name, for messages.

        Raises:
            CheckpointError: A tensor is missing, unexpected, of the wrong shape or dtype, or holds an index that
                points outside its codebook.
        """
        check_stored(config, tensors, where)
        check_indices(config, tensors, where)
        main, residual = _read_indices(config, tensors)
        outliers = tensors.get("outlier_indices")
        perm = tensors.get("perm")
        return cls(
            config=config,
            codebook=tensors["centroids.weight"].reshape(config.num_groups, -1, config.vector_len),
            indices=main,
            residual_codebook=_table(tensors.get("res_centroids.weight"), (config.num_groups, -1, config.vector_len)),
            residual_indices=residual,
            outlier_codebook=_table(tensors.get("outlier_centroids.weight"), (-1, config.outlier_vector_len)),
            outlier_indices=None if outliers is None else from_carrier(outliers).squeeze(0),
            perm=None if perm is None else from_carrier(perm),
            weight_scale=tensors.get("weight_scale"),
            weight_bias=tensors.get("weight_bias"),
            bias=tensors.get("bias"),
        )

    def absorb_perm(self) -> QuantizedWeight:
        """The same weight without a permutation, where the format allows it.

        With one codebook for all columns the order of the columns is free, so the indices can be stored in the
        original order. With groups or outliers a column's position selects its codebook: such a weight is returned
        as it is.
        """
        if self.perm is None or self.config.num_groups > 1 or self.config.has_outliers:
            return self
        position = torch.argsort(self.perm)
        residual = self.residual_indices
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, enable_perm=False),
            indices=self.indices[..., position],
            residual_indices=None if residual is None else residual[..., position],
            perm=None,
        )


def normalize(config: LayerConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same layer in the dtypes of `tensor_specs`, whatever carriers its tensors came in.

    Args:
        config: The layer.
        tensors: By on-disk name; they have passed `check_stored`. Names it does not know are dropped.
        dtype: Float dtype wanted.

    Returns:
        By on-disk name; a tensor that was right already is returned as it is.
    """
    normal = {}
    for name, spec in tensor_specs(config, dtype).items():
        if name in tensors:
            stored = tensors[name]
            if stored.dtype != spec.dtype and not spec.dtype.is_floating_point:
                # By bit pattern, never by value: a float16 carrier is not a number.
                stored = from_carrier(stored)
            normal[name] = stored.to(spec.dtype)
    return normal


def check_stored(config: LayerConfig, tensors: Mapping[str, Tensor | TensorSpec], where: str) -> None:
    """Hold the names, shapes and dtypes of stored tensors against the layer's config.

    Reads no data: tensors on the meta device do, and so do the headers of files.

    Raises:
        CheckpointError: A tensor is missing, unexpected, or of the wrong shape or dtype.
    """
    specs = tensor_specs(config, torch.float16)  # shapes do not depend on the float dtype
    for name in sorted(specs.keys() - tensors.keys()):
        raise CheckpointError(f"{where}: tensor {name} is missing, which its quantization_config entry promises")
    for name in sorted(tensors.keys() - specs.keys()):
        raise CheckpointError(f"{where}: tensor {name} is there, but its quantization_config entry does not allow it")
    for name, spec in specs.items():
        shape, dtype = tuple(tensors[name].shape), tensors[name].dtype
        if shape != spec.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {shape}; its quantization_config entry means {spec.shape}"
            )
        if dtype not in spec.readable:
            allowed = ", ".join(str(known).removeprefix("torch.") for known in spec.readable)
            raise CheckpointError(f"{where}: {name} is {dtype}; it must be one of {allowed}")


def check_indices(config: LayerConfig, tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that every index points into its codebook and that the permutation is one.

    Packed main and residual indices are as wide as their codebooks are long, so they need no check.

    Raises:
        CheckpointError: An index is out of range; the message names the tensor and the value.
    """
    limits = {"outlier_indices": config.outlier_num_centroids}
    if not config.is_packed:
        limits |= {"indices": config.num_centroids, "res_indices": config.num_residual_centroids}
    for name, limit in limits.items():
        if name in tensors and (stored := tensors[name]).numel():
            low, high = (int(bound) for bound in torch.aminmax(from_carrier(stored)))
            if low < 0 or high >= limit:
                wrong = low if low < 0 else high
                raise CheckpointError(f"{where}: {name} holds {wrong}; its codebook has entries 0..{limit - 1}")
    if "perm" in tensors:
        perm = from_carrier(tensors["perm"])
        if not torch.equal(perm.sort().values, torch.arange(config.in_features, device=perm.device)):
            raise CheckpointError(f"{where}: perm is not a permutation of the {config.in_features} input columns")


def _read_indices(config: LayerConfig, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    if config.is_packed:
        return unpack(tensors["indices"], config.index_bits, config.residual_bits, config.group_size)
    residual = tensors.get("res_indices")
    return from_carrier(tensors["indices"]), None if residual is None else from_carrier(residual)


def _table(flat: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    return None if flat is None else flat.reshape(shape)
