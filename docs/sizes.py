"""Tables of docs/choosing.md: what a spec makes of published models, by arithmetic, and what was measured of it.

    <!-- sizes files -->    gigabytes of the weight files of a model at so many index bits
    <!-- sizes memory -->   the widest spec that a memory holds
    <!-- sizes specs -->    each spec's true bits, beside its loss and its speed from benchmarks/results
    <!-- sizes plans -->    what budgets gave the layers of a model, from benchmarks/results/curve.json

Bytes are those that the program would store: the layers' are counted by `LayerConfig.stored_bits`.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grid import table

from vptq.spec import QuantSpec, spec_for_bits

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GIB = 2**30
WIDTHS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
MEMORIES = (2, 4, 8, 16, 24, 48, 80)
# Of a memory, what weights and cache may fill; the process, the activations and the system need the rest.
SHARE = 0.8
CONTEXT = 4096
FLOAT_BYTES = 2
# Those that were measured, and those that the program picks for large layers.
SPECS = (
    *("v8-k4096", "v4-k256", "v8-k256-256", "v6-k4096", "v12-k4096-4096", "v8-k65536", "v16-k65536-65536"),
    *("v8-k65536-16", "v4-k64-64", "v8-k4096-4096", "v8-k65536-256", "v8-k65536-4096", "v8-k65536-65536"),
)


@dataclass(frozen=True)
class Shape:
    """The sizes in a model's config.json that its weights follow from.

    Attributes:
        name: What it is called.
        blocks: Decoder blocks.
        width: Of the hidden states.
        kv_width: Outputs of k_proj, and of v_proj.
        inner: Outputs of gate_proj, and of up_proj.
        vocabulary: Tokens.
        tied: Whether the output head is the embedding.
    """

    name: str
    blocks: int
    width: int
    kv_width: int
    inner: int
    vocabulary: int
    tied: bool

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the linear layers of a block: q, k, v, o, gate, up, down."""
        attention = [(self.width, outputs) for outputs in (self.width, self.kv_width, self.kv_width, self.width)]
        return [*attention, (self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]

    @property
    def linear_weights(self) -> int:
        """Weights that are quantized."""
        return self.blocks * sum(inputs * outputs for inputs, outputs in self.layers)

    @property
    def other_weights(self) -> int:
        """Weights that stay in 16 bits: embedding, output head, norms."""
        return self.vocabulary * self.width * (1 if self.tied else 2) + (2 * self.blocks + 1) * self.width

    @property
    def dense_bytes(self) -> int:
        """Of the original in 16 bits."""
        return FLOAT_BYTES * (self.linear_weights + self.other_weights)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of `CONTEXT` tokens in 16 bits."""
        return 2 * self.blocks * self.kv_width * CONTEXT * FLOAT_BYTES

    def spec(self, bits: float) -> QuantSpec:
        """What the program takes for so many index bits: large codebooks where the layers can pay for them."""
        return spec_for_bits(bits, self.linear_weights // (self.blocks * len(self.layers)))

    def file_bytes(self, spec: QuantSpec) -> float:
        """Of the weight files with every linear layer of every block at `spec`."""
        bits = sum(_stored_bits(spec, inputs, outputs) for inputs, outputs in self.layers)
        return self.blocks * bits / 8 + FLOAT_BYTES * self.other_weights


SHAPES = (
    Shape("SmolLM2-135M", 30, 576, 192, 1536, 49152, True),
    Shape("Llama-3.2-1B", 16, 2048, 512, 8192, 128256, True),
    Shape("Llama-3.2-3B", 28, 3072, 1024, 8192, 128256, True),
    Shape("Llama-2-7B", 32, 4096, 4096, 11008, 32000, False),
    Shape("Llama-3.1-8B", 32, 4096, 1024, 14336, 128256, False),
    Shape("Qwen2.5-14B", 48, 5120, 1024, 13824, 152064, False),
    Shape("Qwen2.5-32B", 64, 5120, 1024, 27648, 152064, False),
    Shape("Llama-3.1-70B", 80, 8192, 1024, 28672, 128256, False),
    Shape("Llama-3.1-405B", 126, 16384, 1024, 53248, 128256, False),
)


def render(name: str) -> str:
    """The table behind the marker `<!-- sizes NAME -->`."""
    return table({"files": _files, "memory": _memory, "specs": _specs, "plans": _plans}[name]())


def _files() -> Iterator[list[str]]:
    widths = [f"{bits:g} bits" for bits in (16, *WIDTHS)]
    yield ["model", "linear weights", "others", *widths, f"{CONTEXT:,} tokens"]
    for shape in SHAPES:
        stored = [shape.dense_bytes, *(shape.file_bytes(shape.spec(bits)) for bits in WIDTHS), shape.cache_bytes]
        counts = [f"{shape.linear_weights / 1e9:.3g}e9", f"{shape.other_weights / 1e9:.2g}e9"]
        yield [f"`{shape.name}`", *counts, *(f"{count / GIB:.2f}" for count in stored)]


def _memory() -> Iterator[list[str]]:
    yield ["model", *(f"{memory} GiB" for memory in MEMORIES)]
    for shape in SHAPES:
        yield [f"`{shape.name}`", *(_widest(shape, memory * GIB) for memory in MEMORIES)]


def _widest(shape: Shape, memory: int) -> str:
    room = SHARE * memory - shape.cache_bytes
    if shape.dense_bytes <= room:
        return "16 bits"
    fitting = [shape.spec(bits) for bits in WIDTHS if shape.file_bytes(shape.spec(bits)) <= room]
    return f"`{fitting[-1].name}`" if fitting else "-"


def _specs() -> Iterator[list[str]]:
    accuracy, speed = _rows("smollm2"), {row["config"]: row for row in _rows("kernel")}
    original = next(row["perplexity"] for row in accuracy if row["spec"] == "original")
    yield [
        *("spec", "index bits", "true bits, 4096 x 4096", "true bits, SmolLM2-135M"),
        *(f"its perplexity (original {original:.2f})", "finetuned", "from the original's Hessians"),
        *("tokens/s of a 7B's layers", "times dense bfloat16"),
    ]
    for name in SPECS:
        spec, runs = QuantSpec.parse(name), [row for row in accuracy if row["spec"] == name]
        perplexities = [_perplexity(runs, *kind) for kind in (("both", "none"), ("both", "e2e"), ("original", "none"))]
        small = f"{runs[0]['bits_per_weight']:.2f}" if runs else "-"
        fast = speed.get(name)
        speeds = [f"{fast['tokens_per_second']:.2f}", f"{fast['times_dense']:.2f}"] if fast else ["-", "-"]
        large = _stored_bits(spec, 4096, 4096) / 4096**2
        yield [f"`{name}`", f"{spec.index_bits_per_weight:.3g}", f"{large:.2f}", small, *perplexities, *speeds]


def _plans() -> Iterator[list[str]]:
    lengths = (8, 6, 4)
    yield ["budget", *(f"v{length}, two codebooks" for length in lengths), "one codebook", "commonest"]
    for row in _rows("curve"):
        if row["finetune"] != "none":
            continue
        layers: Counter[str] = Counter()
        for entry in row["specs"].split(", "):
            count, spec = entry.split(" x ")
            layers[spec] += int(count)
        two: Counter[int] = Counter()
        for spec, count in layers.items():
            if QuantSpec.parse(spec).num_residual_centroids:
                two[QuantSpec.parse(spec).vector_len] += count
        kinds = [*(two[length] for length in lengths), layers.total() - two.total()]
        commonest = ", ".join(f"`{spec}`" for spec, _ in layers.most_common(3))
        yield [f"{row['wanted']:.2f}", *(f"{count / layers.total():.0%}" for count in kinds), commonest]


def _perplexity(runs: list[dict[str, Any]], inputs: str, finetune: str) -> str:
    found = [run["perplexity"] for run in runs if (run["hessian_inputs"], run["finetune"]) == (inputs, finetune)]
    return f"{found[0]:.2f}" if found else "-"


def _stored_bits(spec: QuantSpec, inputs: int, outputs: int) -> int:
    """Of one layer; the permutation is folded away when it is saved."""
    return dataclasses.replace(spec, enable_perm=False).for_layer(inputs, outputs).stored_bits


def _rows(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows
