"""CPU inference: `vptq::linear` on Llama-2-7B's three shapes, beside what bounds it and what it replaces.

    python benchmarks/kernel.py [--threads 2] [--rounds 15] [--configs v8-k4096,...] [--tokens 1] [--json FILE]

For every config, in one process and alternating round by round: our kernel, PyTorch's dense bfloat16 `linear` on the
same shape and threads, and the floor, a loop of nothing but index loads, entry loads and multiply-adds
(benchmarks/lookup_floor.cpp). Weights are cold: each call takes the next of more copies than the last-level cache
serves usefully (400 MB). Times are medians over rounds; "share" is floor / kernel, taken round by round, so that a
machine that slows down slows both. Tokens/s are for the 6.48e9 weights of the linear layers alone. The streaming bound
is the packed bytes at the measured bandwidth. One line of JSON comes last.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vptq.config import LayerConfig
from vptq.linear import VQuantLinear
from vptq.ops import backends
from vptq.shards import write_json
from vptq.spec import QuantSpec

CONFIGS = (
    *("v8-k4096", "v6-k4096", "v8-k256-256", "v8-k65536", "v8-k65536-256", "v12-k4096-4096", "v4-k256"),
    "v16-k65536-65536",
)
# out x in, and how often a decoder block has it; 32 blocks.
SHAPES = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
BLOCKS = 32
Shape = tuple[int, int]
COLD_BYTES = 400e6
FLOOR_BLOCKS = 4000  # of 2048 lookups a thread: three milliseconds
ROUND_SECONDS = 0.01


@dataclass(frozen=True)
class Layers:
    """Layers of one shape whose weights are cold, endlessly."""

    config: LayerConfig
    quantized: Iterator[VQuantLinear]
    dense: Iterator[Tensor]


def random_layer(config: LayerConfig) -> VQuantLinear:
    """Random codebooks, and index bits that are uniform: the worst case for caches."""
    layer = VQuantLinear.from_config(config, torch.bfloat16)
    for name, parameter in layer.named_parameters():
        if parameter.dtype.is_floating_point:
            parameter.data.normal_(std=0.02)
        elif name == "indices":
            parameter.data.random_(-(2**31), 2**31 - 1)
        else:
            parameter.data.copy_(torch.randperm(config.in_features))
    return layer


def cold(shape: Shape, spec: QuantSpec, dense: list[Tensor]) -> Layers:
    config = spec.for_layer(shape[1], shape[0], False)
    first = random_layer(config)
    size = sum(parameter.nbytes for parameter in first.parameters())
    more = [random_layer(config) for _ in range(int(COLD_BYTES / size))]
    return Layers(config, cycle([first, *more]), cycle(dense))


def compile_floor(folder: str) -> Any:
    source, library = Path(__file__).with_name("lookup_floor.cpp"), Path(folder, "floor.so")
    subprocess.run(
        ["g++", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)], check=True
    )
    function = ctypes.CDLL(str(library)).lookup_nanoseconds
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
    function.restype = ctypes.c_double
    return function


def floor_seconds(function: Any, config: LayerConfig, threads: int) -> float:
    """What the lookups of one call cost at least: each codebook in the cheaper form of its entries."""
    lanes = 4 if config.vector_len <= 4 else 8 if config.vector_len <= 8 else 16
    books = [config.num_centroids] + ([config.num_residual_centroids] if config.has_residual else [])
    lookups = config.num_vectors * config.in_features / threads
    each = [min(function(lanes, form, size, threads, FLOOR_BLOCKS) for form in (0, 1)) for size in books]
    return sum(each) * lookups * 1e-9


def bandwidth(threads: int) -> float:
    """Bytes a second that this many threads read, from a sum over 1 GB."""
    data = torch.ones(1 << 27)
    return max(data.nbytes / seconds(lambda: data.sum()) for _ in range(8))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(layers: Layers, tokens: int, rounds: int, floor: Any, threads: int) -> dict[str, list[float]]:
    """Seconds a call, round by round: ours, dense, floor. A round's calls are many enough to fill 10 ms each."""
    x = torch.randn(tokens, layers.config.in_features, dtype=torch.bfloat16)
    ours = lambda: next(layers.quantized)(x)  # noqa: E731
    dense = lambda: functional.linear(x, next(layers.dense))  # noqa: E731
    calls = {"ours": int(ROUND_SECONDS / seconds(ours)) + 1, "dense": int(ROUND_SECONDS / seconds(dense)) + 1}
    times: dict[str, list[float]] = {"ours": [], "dense": [], "floor": []}
    for number in range(rounds + 1):
        mine = statistics.median(seconds(ours) for _ in range(calls["ours"]))
        bound = floor_seconds(floor, layers.config, threads)
        theirs = statistics.median(seconds(dense) for _ in range(calls["dense"]))
        if number:  # the first warms up
            times["ours"].append(mine), times["floor"].append(bound), times["dense"].append(theirs)
    return times


def tokens_per_second(by_shape: dict[Shape, float], tokens: int) -> float:
    return tokens / (BLOCKS * sum(SHAPES[shape] * value for shape, value in by_shape.items()))


def row(name: str, dense: dict[Shape, list[Tensor]], arguments: argparse.Namespace, floor: Any) -> dict[str, Any]:
    spec = QuantSpec.parse(name)
    found: dict[str, dict[Shape, float]] = {"ours": {}, "dense": {}, "floor": {}}
    shares, stored = [], 0
    for shape, count in SHAPES.items():
        layers = cold(shape, spec, dense[shape])
        times = measure(layers, arguments.tokens, arguments.rounds, floor, arguments.threads)
        for key, values in times.items():
            found[key][shape] = statistics.median(values)
        shares.append(statistics.median(f / o for f, o in zip(times["floor"], times["ours"], strict=True)))
        stored += count * BLOCKS * int(layers.config.stored_bits) // 8
    speed = {key: tokens_per_second(by_shape, arguments.tokens) for key, by_shape in found.items()}
    result = {
        "config": name,
        "tokens": arguments.tokens,
        "tokens_per_second": speed["ours"],
        "share_of_floor": statistics.mean(shares),
        "times_dense": speed["ours"] / speed["dense"],
        "dense_tokens_per_second": speed["dense"],
        "floor_tokens_per_second": speed["floor"],
        "stored_bytes": stored,
        "milliseconds": {f"{o}x{i}": 1e3 * value for (o, i), value in found["ours"].items()},
    }
    print(
        f"{name:18} {speed['ours']:8.2f} tok/s  share of floor {result['share_of_floor']:.2f}"
        f"  {result['times_dense']:.2f} x dense ({speed['dense']:.2f})  ms "
        + " ".join(f"{value:.2f}" for value in result["milliseconds"].values()),
        flush=True,
    )
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    dense = {
        shape: [torch.randn(shape).bfloat16() * 0.02 for _ in range(max(2, int(COLD_BYTES / 2 / shape[0] / shape[1])))]
        for shape in SHAPES
    }
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        floor, read = compile_floor(folder), bandwidth(arguments.threads)
        rows = [row(name, dense, arguments, floor) for name in arguments.configs.split(",")]
    for entry in rows:
        entry["streaming_bound_tokens_per_second"] = arguments.tokens * read / entry["stored_bytes"]
    result = {
        "benchmark": "kernel",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "backend": next(status.reason for status in backends() if status.name == "cpu"),
        "torch": torch.__version__,
        "bandwidth_gb_per_second": read / 1e9,
        "rows": rows,
    }
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
