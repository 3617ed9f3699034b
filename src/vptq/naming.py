"""What a model's name says about its bits, held against what its tensors have.

Names are copied, models are made again with another spec, and codebooks that no name counts can weigh more than the
indices. Whoever chooses a download by its name should hear of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.spec import QuantSpec

# How much more or less than it says a name may mean.
TOLERANCE = 0.1
_BITS = re.compile(r"(?<![\d.])(?P<bits>\d{1,2}(?:\.\d+)?)[-_ ]?bits?(?![a-z])", re.IGNORECASE)


def contradictions(name: str, layers: Mapping[str, LayerConfig]) -> list[str]:
    """A line for each thing that a name says and the tensors do not.

    Args:
        name: Of a folder or a repository, such as "Llama-3.1-8B-v8-k65536-256" or "smol-2bit".
        layers: The quantized layers, as checked against their tensors.
    """
    weights = {path: layer.in_features * layer.out_features for path, layer in layers.items()}
    total = sum(weights.values())
    if not total:
        return []
    true_bits = sum(layer.stored_bits for layer in layers.values()) / total
    said = []
    if (spec := _spec_in(name)) is not None:
        other = sum(weights[path] for path, layer in layers.items() if _codebooks(layer) != _codebooks(spec))
        if 2 * other > total:
            said.append(f"{spec.name}, but {other / total:.0%} of the weights have other codebooks")
        said += _off(spec.index_bits_per_weight, true_bits, f"{spec.name}, which are {{:g}} bits of indices")
    for found in _BITS.finditer(name):
        said += _off(float(found["bits"]), true_bits, "{:g} bits")
    return [f"the name {name} says {what}" for what in said]


def _off(claimed: float, true_bits: float, words: str) -> list[str]:
    if abs(true_bits - claimed) <= TOLERANCE * claimed:
        return []
    return [f"{words.format(claimed)}, but {true_bits:.3f} bits per weight are stored, codebooks and scales included"]


def _spec_in(name: str) -> QuantSpec | None:
    try:
        return QuantSpec.parse(name)
    except ConfigError:
        return None


def _codebooks(of: LayerConfig | QuantSpec) -> tuple[int, int, int]:
    return of.vector_len, of.num_centroids, of.num_residual_centroids
