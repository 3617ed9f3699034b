"""What a user asks for, before any layer's size is known: the quantization spec and its name.

The published checkpoints are named after their spec, so the name is the interface. The grammar, with every part after
the first two optional and in this order:

    v8-k65536              vectors of 8 rows, a main codebook of 65,536 entries
    v8-k65536-256          ... and a residual codebook of 256 entries (0: none)
    v8-k4096-g4            ... four column groups, each with codebooks of its own
    v8-k4096-256-o1x256v4  ... 1 percent of the columns as outliers: 256 entries, vectors of 4 rows

It is found at the end of a longer name, with or without the published suffix "-woft" ("without finetuning"):
Meta-Llama-3.1-70B-Instruct-v8-k65536-256-woft.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vptq.config import MAX_CENTROIDS, LayerConfig
from vptq.errors import ConfigError

# A kernel unrolls over the vector, so each length is a kernel of its own; the published GPU kernels have these.
VECTOR_LENGTHS = (2, 4, 6, 8, 10, 12, 16)

_NAME = re.compile(
    r"(?:^|[-_/])v(?P<vector>\d+)-k(?P<main>\d+)(?:-(?P<residual>\d+))?(?:-g(?P<groups>\d+))?"
    r"(?:-o(?P<percent>\d+(?:\.\d+)?)x(?P<outlier_k>\d+)v(?P<outlier_v>\d+))?(?:-woft)?/?$"
)

# Nominal index bits -> specs, best first. Big codebooks win where the layer is big enough to pay for them.
_SPECS_BY_BITS = {
    1.0: ("v16-k65536", "v12-k4096", "v8-k256"),
    1.5: ("v8-k4096", "v4-k64"),
    2.0: ("v8-k65536", "v6-k4096", "v4-k256"),
    2.5: ("v8-k65536-16", "v4-k32-32"),
    3.0: ("v8-k65536-256", "v4-k64-64"),
    3.5: ("v8-k65536-4096", "v4-k128-128"),
    4.0: ("v8-k65536-65536", "v4-k256-256"),
}
_AFFORDABLE_OVERHEAD = 0.1


@dataclass(frozen=True)
class QuantSpec:
    """How to quantize every linear layer of a model.

    Attributes:
        vector_len: Consecutive output rows quantized together, one of `VECTOR_LENGTHS`.
        num_centroids: Entries of each main codebook, a power of two in 2..65536.
        num_residual_centroids: Entries of each residual codebook, likewise; 0 for none.
        num_groups: Column groups with codebooks of their own.
        outlier_percent: Percent of the columns, the most sensitive ones, that get the outlier codebook.
        outlier_vector_len: Vector length of the outlier columns.
        outlier_num_centroids: Entries of the outlier codebook; 0 for no outliers.
        enable_norm: Normalize each input column before quantizing.
        enable_perm: Quantize the columns in the order of their sensitivity.

    Raises:
        ConfigError: A value is not allowed.
    """

    vector_len: int
    num_centroids: int
    num_residual_centroids: int = 0
    num_groups: int = 1
    outlier_percent: float = 0.0
    outlier_vector_len: int = 4
    outlier_num_centroids: int = 0
    enable_norm: bool = True
    enable_perm: bool = True

    def __post_init__(self) -> None:
        if self.num_groups < 1:
            raise ConfigError(f"{self.num_groups} groups; there must be at least 1")
        _check_vector_len("vector length", self.vector_len)
        _check_codebook("main codebook", self.num_centroids)
        if self.num_residual_centroids:
            _check_codebook("residual codebook", self.num_residual_centroids)
        if not 0 <= self.outlier_percent < 100:
            raise ConfigError(f"outlier percent is {self.outlier_percent:g}; it must be at least 0 and below 100")
        if (self.outlier_percent > 0) != (self.outlier_num_centroids > 0):
            raise ConfigError(
                f"outlier percent is {self.outlier_percent:g} and the outlier codebook has {self.outlier_num_centroids}"
                " entries; give both (such as -o1x256v4) or neither"
            )
        if self.outlier_num_centroids:
            _check_vector_len("outlier vector length", self.outlier_vector_len)
            _check_codebook("outlier codebook", self.outlier_num_centroids)

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read a spec such as "v8-k65536-256", or find it in a model's name.

        Raises:
            ConfigError: There is no spec at the end of `text`, or its values are not allowed.
        """
        match = _NAME.search(text.strip())
        if match is None:
            raise ConfigError(
                f"{text!r} is not a quantization spec; write it like v8-k65536 or v8-k65536-256 "
                "(v: vector length, k: main codebook, then residual codebook), optionally -g4 and -o1x256v4"
            )
        part = match.groupdict()
        return cls(
            vector_len=int(part["vector"]),
            num_centroids=int(part["main"]),
            num_residual_centroids=int(part["residual"] or 0),
            num_groups=int(part["groups"] or 1),
            outlier_percent=float(part["percent"] or 0),
            outlier_vector_len=int(part["outlier_v"] or 4),
            outlier_num_centroids=int(part["outlier_k"] or 0),
        )

    @property
    def name(self) -> str:
        """The shortest name that parses to the same codebooks (norm and perm are not part of a name)."""
        parts = [f"v{self.vector_len}-k{self.num_centroids}"]
        if self.num_residual_centroids:
            parts.append(str(self.num_residual_centroids))
        if self.num_groups > 1:
            parts.append(f"g{self.num_groups}")
        if self.outlier_num_centroids:
            percent = repr(float(self.outlier_percent)).removesuffix(".0")
            parts.append(f"o{percent}x{self.outlier_num_centroids}v{self.outlier_vector_len}")
        return "-".join(parts)

    @property
    def index_bits_per_weight(self) -> float:
        """Bits of the main and residual indices alone: what the published names call the bit width."""
        residual_bits = (self.num_residual_centroids - 1).bit_length() if self.num_residual_centroids else 0
        return ((self.num_centroids - 1).bit_length() + residual_bits) / self.vector_len

    def for_layer(self, in_features: int, out_features: int, bias: bool = False) -> LayerConfig:
        """The stored form of one linear layer quantized with this spec.

        Columns that do not divide evenly into the groups join the outliers, which have a codebook for them.

        Raises:
            ConfigError: The columns do not divide into the groups and there are no outliers to take the rest.
        """
        outliers = 0
        if self.outlier_num_centroids:
            outliers = math.ceil(self.outlier_percent * in_features / 100)
            outliers += (in_features - outliers) % self.num_groups
        elif in_features % self.num_groups:
            raise ConfigError(
                f"{in_features} input columns do not divide into {self.num_groups} groups; choose a number of groups "
                "that divides them, or add outliers (such as -o1x256v4), which take the remainder"
            )
        return LayerConfig(
            in_features=in_features,
            out_features=out_features,
            vector_len=self.vector_len,
            num_centroids=self.num_centroids,
            num_residual_centroids=self.num_residual_centroids,
            num_groups=self.num_groups,
            outlier_size=outliers,
            outlier_vector_len=self.outlier_vector_len if outliers else 0,
            outlier_num_centroids=self.outlier_num_centroids if outliers else 0,
            enable_norm=self.enable_norm,
            enable_perm=self.enable_perm,
            bias=bias,
        )


def spec_for_bits(bits: float, weights_per_layer: int | None = None) -> QuantSpec:
    """The spec to use for a nominal bit width.

    Args:
        bits: Index bits per weight: 1, 1.5, 2, 2.5, 3, 3.5 or 4.
        weights_per_layer: Weights of a typical linear layer. The spec with the largest codebooks is chosen whose
            overhead stays within a tenth of `bits`; the smallest when none does. None means "as large as it gets".

    Raises:
        ConfigError: There is no spec for `bits`.
    """
    names = _SPECS_BY_BITS.get(float(bits))
    if names is None:
        allowed = ", ".join(f"{known:g}" for known in _SPECS_BY_BITS)
        raise ConfigError(f"no spec for {bits:g} bits; choose one of {allowed}, or give --spec")
    specs = [QuantSpec.parse(name) for name in names]
    for spec in specs:
        entries = spec.num_centroids + spec.num_residual_centroids
        codebook_bits = 16 * spec.vector_len * entries
        if weights_per_layer is None or codebook_bits <= _AFFORDABLE_OVERHEAD * bits * weights_per_layer:
            return spec
    return specs[-1]


def _check_vector_len(what: str, length: int) -> None:
    if length not in VECTOR_LENGTHS:
        allowed = ", ".join(map(str, VECTOR_LENGTHS))
        raise ConfigError(f"{what} is {length}, which no kernel takes; choose one of {allowed}")


def _check_codebook(what: str, entries: int) -> None:
    if not 2 <= entries <= MAX_CENTROIDS or entries & (entries - 1):
        raise ConfigError(f"{what} has {entries} entries; it must have a power of two in 2..{MAX_CENTROIDS}")
