"""What one quantized layer, and one quantized model, looks like on disk.

`LayerConfig` describes a layer with the words of this package; `from_entry` and `to_entry` translate from and to the
entries of `quantization_config` in config.json, whose keys are fixed by the published format. `tensor_specs` derives
from a `LayerConfig` the name, shape and dtype of every stored tensor. It is the only place that knows them: the layer,
the checkpoint reader, the integrations and the bit counts all ask it, so they cannot disagree.

Pure data: frozen, validated on construction, no tensors. What a user asks for before any layer's size is known is a
`vptq.spec.QuantSpec`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vptq.entry import read_fields, write_fields
from vptq.errors import ConfigError

MAX_CENTROIDS = 65536
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The format's 16-bit indices are uint16 bit patterns; the published writers used each of the first three as carrier.
INDEX_CARRIERS = (torch.int16, torch.uint16, torch.float16, torch.int32, torch.int64)


@dataclass(frozen=True)
class TensorSpec:
    """How one tensor of a layer is stored.

    Attributes:
        shape: Exact shape.
        dtype: The dtype we write and hold in memory.
        readable: Every dtype accepted from a file (other carriers of the same bits, other float precisions).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    readable: tuple[torch.dtype, ...]

    @property
    def bits(self) -> int:
        """Stored size in bits."""
        return math.prod(self.shape) * self.dtype.itemsize * 8


@dataclass(frozen=True)
class LayerConfig:
    """One quantized linear layer, y = x W^T + bias with W [out_features, in_features].

    Attributes:
        vector_len: Consecutive output rows quantized together; any length >= 1 can be read.
        num_centroids: Entries of each main codebook, 1..65536; a power of two >= 2 when packed.
        num_residual_centroids: Entries of each residual codebook; 0 when there is none.
        num_groups: Column groups, each with its own main and residual codebook.
        group_size: Columns per group; 0 derives it. Always in_features == outlier_size + num_groups * group_size.
        outlier_size: Leading (most sensitive) columns quantized with the outlier codebook.
        outlier_vector_len: Vector length of these columns, at least 2; 0 without outliers.
        outlier_num_centroids: Entries of the outlier codebook; 0 without outliers.
        enable_norm: Per input column scale and bias are stored.
        enable_perm: A column permutation is stored.
        is_packed: Main and residual indices form one bit stream of int32 words, instead of 16-bit tensors.
        indices_as_float: Legacy: 16-bit index tensors were written as float16 bit patterns.
        bias: The linear layer has a bias.

    Raises:
        ConfigError: The values contradict each other or cannot be stored.
    """

    in_features: int
    out_features: int
    vector_len: int
    num_centroids: int
    num_residual_centroids: int = 0
    num_groups: int = 1
    group_size: int = 0
    outlier_size: int = 0
    outlier_vector_len: int = 0
    outlier_num_centroids: int = 0
    enable_norm: bool = False
    enable_perm: bool = False
    is_packed: bool = True
    indices_as_float: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "vector_len", "num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self._check_centroids("num_centroids", self.num_centroids, packed=self.is_packed)
        if self.num_residual_centroids:
            self._check_centroids("num_residual_centroids", self.num_residual_centroids, packed=self.is_packed)
        self._check_outliers()
        if self.group_size == 0:
            object.__setattr__(self, "group_size", (self.in_features - self.outlier_size) // self.num_groups)
        covered = self.outlier_size + self.num_groups * self.group_size
        if self.group_size < 1 or covered != self.in_features:
            raise ConfigError(
                f"{self.outlier_size} outlier columns + {self.num_groups} groups of {self.group_size} columns cover "
                f"{covered} of {self.in_features} input columns; they must cover all of them exactly"
            )
        if self.enable_perm and self.is_packed and self.in_features > MAX_CENTROIDS:
            raise ConfigError(
                f"in_features is {self.in_features}; a packed layer stores its permutation in 16 bits, so at most "
                f"{MAX_CENTROIDS} columns can be permuted (set enable_perm to false)"
            )

    @staticmethod
    def _check_centroids(name: str, count: int, *, packed: bool) -> None:
        if not 1 <= count <= MAX_CENTROIDS:
            raise ConfigError(f"{name} is {count}; it must be in 1..{MAX_CENTROIDS}")
        if packed and (count < 2 or count & (count - 1)):
            raise ConfigError(f"{name} is {count}; packed indices need a power of two in 2..{MAX_CENTROIDS}")

    def _check_outliers(self) -> None:
        if not (self.outlier_size or self.outlier_vector_len or self.outlier_num_centroids):
            return
        if self.outlier_size < 1 or self.outlier_vector_len < 2 or self.outlier_num_centroids < 1:
            raise ConfigError(
                f"outlier_size {self.outlier_size}, outlier_vector_len {self.outlier_vector_len}, outlier_num_centroids"
                f" {self.outlier_num_centroids}: outliers need at least 1 column, vectors of at least 2 and 1 centroid;"
                " set all three to 0 for a layer without outliers"
            )
        self._check_centroids("outlier_num_centroids", self.outlier_num_centroids, packed=False)

    @property
    def has_residual(self) -> bool:
        """Whether there is a second codebook stage."""
        return self.num_residual_centroids > 0

    @property
    def has_outliers(self) -> bool:
        """Whether the leading columns have a codebook of their own."""
        return self.outlier_size > 0

    @property
    def index_bits(self) -> int:
        """Bits of one main index (the packed width; ceil(log2) for unpacked codebooks)."""
        return (self.num_centroids - 1).bit_length()

    @property
    def residual_bits(self) -> int:
        """Bits of one residual index; 0 without a residual codebook."""
        return (self.num_residual_centroids - 1).bit_length() if self.has_residual else 0

    @property
    def row_words(self) -> int:
        """32-bit words of one packed row: each (group, vector row) starts at a fresh word."""
        return -(-self.group_size * (self.index_bits + self.residual_bits) // 32)

    @property
    def num_vectors(self) -> int:
        """Vector rows, R = ceil(out_features / vector_len); the last may be partly padding."""
        return -(-self.out_features // self.vector_len)

    @property
    def num_outlier_vectors(self) -> int:
        """Vector rows of the outlier columns; 0 without outliers."""
        return -(-self.out_features // self.outlier_vector_len) if self.has_outliers else 0

    @property
    def stored_bits(self) -> int:
        """Every stored bit of the layer's weight (16-bit floats), codebooks and scales included, bias excluded."""
        specs = tensor_specs(self, torch.float16)
        return sum(spec.bits for name, spec in specs.items() if name != "bias")

    @property
    def bits_per_weight(self) -> float:
        """`stored_bits` over in_features * out_features."""
        return self.stored_bits / (self.in_features * self.out_features)

    @classmethod
    def from_entry(
        cls,
        entry: Mapping[str, Any],
        where: str = "layer",
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> LayerConfig:
        """Read one entry of `config_for_layers` as any published version wrote it.

        Args:
            entry: The JSON object. Unknown keys are ignored.
            where: The layer's name, for messages.
            in_features: The linear layer's width if known; must agree with the entry when both are there.
            out_features: Likewise.

        Raises:
            ConfigError: A key is missing, has the wrong type, or asks for what the format cannot hold.
        """
        try:
            return cls(**read_fields(entry, in_features, out_features))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_entry(self) -> dict[str, Any]:
        """The on-disk entry: exactly the keys that every published reader accepts."""
        return write_fields(self)


def tensor_specs(config: LayerConfig, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Name, shape and dtype of every tensor a layer stores, in the order they are written.

    Args:
        config: The layer.
        dtype: The model's float dtype: float16, bfloat16 or float32.

    Raises:
        ConfigError: `dtype` is none of these.
    """
    if dtype not in FLOAT_DTYPES:
        raise ConfigError(f"layer dtype is {dtype}; it must be one of {', '.join(map(str, FLOAT_DTYPES))}")

    def floats(*shape: int) -> TensorSpec:
        return TensorSpec(shape, dtype, FLOAT_DTYPES)

    def indices(*shape: int) -> TensorSpec:
        return TensorSpec(shape, torch.int16, INDEX_CARRIERS)

    groups, rows, size = config.num_groups, config.num_vectors, config.group_size
    specs = {"centroids.weight": floats(groups, config.num_centroids * config.vector_len)}
    packed = TensorSpec((groups, rows, config.row_words), torch.int32, (torch.int32,))
    specs["indices"] = packed if config.is_packed else indices(groups, rows, size)
    if config.has_residual:
        specs["res_centroids.weight"] = floats(groups, config.num_residual_centroids * config.vector_len)
        if not config.is_packed:
            specs["res_indices"] = indices(groups, rows, size)
    if config.has_outliers:
        specs["outlier_centroids.weight"] = floats(1, config.outlier_num_centroids * config.outlier_vector_len)
        specs["outlier_indices"] = indices(1, config.num_outlier_vectors, config.outlier_size)
    if config.enable_perm:
        perm_dtype = torch.int16 if config.is_packed else torch.int64
        specs["perm"] = TensorSpec((config.in_features,), perm_dtype, INDEX_CARRIERS)
    if config.enable_norm:
        specs["weight_scale"] = floats(config.in_features)
        specs["weight_bias"] = floats(config.in_features)
    if config.bias:
        specs["bias"] = floats(config.out_features)
    return specs


@dataclass(frozen=True)
class QuantConfig:
    """The `quantization_config` of a whole model.

    Attributes:
        layers: Quantized linears by full module path.
        shared_layers: Quantized linears by the last component of the path, for paths not in `layers`.
        modules_to_not_convert: Passed through for transformers; None lets it choose.
    """

    layers: Mapping[str, LayerConfig] = field(default_factory=dict)
    shared_layers: Mapping[str, LayerConfig] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """Read `quantization_config` from a model's config.json.

        Raises:
            ConfigError: It is not a VPTQ config, or an entry is invalid; the message names the layer.
        """
        method = data.get("quant_method")
        if method != "vptq":
            raise ConfigError(f'quant_method is {method!r}; a VPTQ checkpoint says "vptq" in its quantization_config')
        skip = data.get("modules_to_not_convert")
        if skip is not None and (isinstance(skip, str) or not isinstance(skip, Iterable)):
            raise ConfigError(f"modules_to_not_convert is {skip!r}; it must be null or a list of module names")
        return cls(
            layers=_read_entries(data, "config_for_layers"),
            shared_layers=_read_entries(data, "shared_layer_config"),
            modules_to_not_convert=None if skip is None else tuple(skip),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object for config.json."""
        skip = self.modules_to_not_convert
        return {
            "quant_method": "vptq",
            "config_for_layers": {path: layer.to_entry() for path, layer in self.layers.items()},
            "shared_layer_config": {tail: layer.to_entry() for tail, layer in self.shared_layers.items()},
            "modules_to_not_convert": skip if skip is None else list(skip),
            "enable_proxy_error": False,
        }

    def layer_for(self, path: str) -> LayerConfig | None:
        """The config of the module at `path`: its own entry, else the one shared by its last name, else None."""
        exact = self.layers.get(path)
        return exact if exact is not None else self.shared_layers.get(path.rpartition(".")[2])


def _read_entries(data: Mapping[str, Any], key: str) -> dict[str, LayerConfig]:
    entries = data.get(key) or {}
    if not isinstance(entries, Mapping):
        raise ConfigError(f"quantization_config.{key} is a {type(entries).__name__}; it must be an object")
    return {path: LayerConfig.from_entry(entry, where=f"{key}[{path!r}]") for path, entry in entries.items()}
