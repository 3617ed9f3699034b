"""Seconds of each stage of quantizing: a synthetic layer, or one decoder block of a real model.

    python benchmarks/quantize.py [--shape 4096x4096] [--spec v8-k65536] [--threads N] [--json FILE]
    python benchmarks/quantize.py --model MODEL --text FILE [--block 0] [--spec v8-k4096-256]

A table for people, then one line of JSON. Beside each stage stands its lower bound: the multiply-adds of its matrix
products and of comparing every vector with every centroid it was compared with, at the rate of this machine's own
float32 matrix multiplication. For the largest cost, `naive` is the same search with a distance matrix
(torch.cdist and argmin), measured on a chunk of vectors and extrapolated to all of them. The layers of a block run one
after the other here, so that each second has one owner; `vptq quantize` solves small ones side by side.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from calibrated import calibrated
from nearest import roof, seconds
from stages import Clock, timed
from torch import Tensor

from vptq.config import LayerConfig
from vptq.quantize.memory import peak_memory_bytes
from vptq.quantize.solver import quantize_weight
from vptq.shards import write_json
from vptq.spec import QuantSpec

REPEATS = 3
NAIVE_DISTANCES = 1 << 24
"""Distances in the chunk of the naive search: 64 MiB of them, as much as a matrix in slices would hold at a time."""


@dataclass(frozen=True)
class Layer:
    """One linear layer to quantize: weight [out_features, in_features], Hessian [in_features, in_features]."""

    name: str
    weight: Tensor
    hessian: Tensor
    config: LayerConfig


def synthetic(shape: tuple[int, int], spec: QuantSpec) -> Layer:
    """A Gaussian weight whose inputs are correlated and unequal, as those of a real layer are."""
    out_features, in_features = shape
    draw = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, in_features + 1).float().rsqrt()
    mixed = torch.randn(in_features, in_features, generator=draw) * spectrum
    mixed *= torch.randn(in_features, 1, generator=draw).mul_(0.5).exp_()
    hessian = mixed @ mixed.T
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    weight = torch.randn(out_features, in_features, generator=draw) / in_features**0.5
    return Layer("synthetic", weight, hessian, spec.for_layer(in_features, out_features))


def block_layers(arguments: argparse.Namespace, clock: Clock) -> Iterator[Layer]:
    """The layers of one decoder block with the original model's Hessians."""
    with calibrated(arguments.model, arguments.text, arguments.sequences, arguments.seqlen, arguments.spec) as original:
        with clock.stage("run the blocks, Hessians"):
            moments = original.moments(arguments.block)
        linears = original.skeleton.linears(arguments.block)
        for group, moment in moments:
            hessian = moment.hessian()
            for name in group.names:
                yield Layer(name, linears[name].weight.data, hessian, original.job.layer_config(name, linears[name]))


def run(layer: Layer, clock: Clock) -> dict[str, Any]:
    """Quantizes and packs one layer under the clock."""
    generator = torch.Generator().manual_seed(0)
    with timed(clock):
        began = time.perf_counter()
        with clock.stage("other"):
            solution = quantize_weight(layer.weight, layer.hessian, layer.config, generator)
            with clock.stage("packing"):
                solution.weight.absorb_perm().to_tensors(torch.bfloat16)
        took = time.perf_counter() - began
    out_features, in_features = layer.weight.shape
    losses = {stage: round(loss, 6) for stage, loss in solution.losses.items()}
    print(
        f"{layer.name} [{out_features} x {in_features}]: {took:.2f} s, loss {list(losses.values())[-1]:.3%}", flush=True
    )
    return {"name": layer.name, "shape": [out_features, in_features], "seconds": round(took, 4), "losses": losses}


def naive(layer: Layer) -> dict[str, Any]:
    """One assignment pass over the layer with a distance matrix in slices, from a measured slice."""
    config = layer.config
    count = config.num_vectors * config.in_features
    chunk = min(count, max(1, NAIVE_DISTANCES // config.num_centroids))
    vectors, codebook = torch.randn(chunk, config.vector_len), torch.randn(config.num_centroids, config.vector_len)
    began = time.process_time()
    took = min(seconds(lambda: torch.cdist(vectors, codebook).argmin(1)) for _ in range(REPEATS))
    used = (time.process_time() - began) / REPEATS
    return {
        "shape": [config.out_features, config.in_features],
        "vectors": count,
        "centroids": config.num_centroids,
        "measured_vectors": chunk,
        "measured_seconds": round(took, 5),
        "measured_cpu_seconds": round(used, 5),
        "extrapolated_pass_seconds": round(took * count / chunk, 3),
        "extrapolated_pass_cpu_seconds": round(used * count / chunk, 3),
    }


def table(clock: Clock, peak: float) -> list[dict[str, Any]]:
    """Prints the stages, the largest first, and returns them as plain data."""
    total = sum(stage.seconds for stage in clock.stages.values())
    headings = ("calls", "seconds", "CPU s", "share", "search s", "bound s", "x bound")
    print(f"{'stage':26}" + "".join(f"{heading:>9}" for heading in headings))
    rows = []
    for name, stage in sorted(clock.stages.items(), key=lambda item: -item[1].seconds):
        bound = stage.flops / peak / 1e9
        above = f"{stage.seconds / bound:9.1f}" if bound > 1e-4 else f"{'-':>9}"
        print(
            f"{name:26}{stage.calls:9}{stage.seconds:9.3f}{stage.cpu_seconds:9.3f}{stage.seconds / total:9.1%}"
            f"{stage.search_seconds:9.3f}{bound:9.3f}{above}"
        )
        figures = {key: round(value, 4) for key, value in asdict(stage).items()}
        rows.append({"stage": name, **figures, "lower_bound_seconds": round(bound, 4)})
    print(f"{'all':26}{'':9}{total:9.3f}{sum(stage.cpu_seconds for stage in clock.stages.values()):9.3f}")
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark, prints the table, and returns the line of JSON as data."""
    peak = roof(5)
    print(f"{arguments.spec}, {torch.get_num_threads()} threads; matrix multiplication {peak:.0f} GFLOP/s", flush=True)
    clock = Clock()
    layers, slowest = [], None
    if arguments.model:
        source: Iterator[Layer] = block_layers(arguments, clock)
    else:
        source = (layer for layer in [synthetic(arguments.shape, QuantSpec.parse(arguments.spec))])
    with closing(source):
        for layer in source:
            layers.append(run(layer, clock))
            if slowest is None or layer.weight.numel() > slowest.weight.numel():
                slowest = layer
    assert slowest is not None
    rows = table(clock, peak)
    largest = rows[0]
    print(
        f"largest cost: {largest['stage']}, {largest['seconds']:.2f} s, of which {largest['search_seconds']:.2f} s find"
        f" nearest centroids; lower bound {largest['lower_bound_seconds']:.2f} s"
    )
    slow = naive(slowest)
    distances = 2.0 * slow["vectors"] * slow["centroids"] * slowest.config.vector_len
    passes = sum(row["search_flops"] for row in rows) / distances
    print(
        f"naive distance matrix: {slow['extrapolated_pass_seconds']:.2f} s"
        f" ({slow['extrapolated_pass_cpu_seconds']:.2f} CPU s) for one assignment pass over"
        f" {slow['shape'][0]} x {slow['shape'][1]}, extrapolated from {slow['measured_vectors']} of its"
        f" {slow['vectors']} vectors; all searches of this run are {passes:.1f} such passes"
    )
    print(f"peak memory: {peak_memory_bytes() / 1e6:.0f} MB")
    return {
        "benchmark": "quantize",
        "spec": arguments.spec,
        "model": arguments.model,
        "threads": torch.get_num_threads(),
        "roof_gflops": round(peak, 1),
        "seconds": round(sum(layer["seconds"] for layer in layers), 3),
        "largest": {key: largest[key] for key in ("stage", "seconds", "search_seconds", "lower_bound_seconds")},
        "naive": {**slow, "passes": round(passes, 2)},
        "peak_memory_bytes": peak_memory_bytes(),
        "rows": rows,
        "layers": layers,
    }


def parse() -> argparse.Namespace:
    def shape(text: str) -> tuple[int, int]:
        rows, columns = text.lower().split("x")
        return int(rows), int(columns)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape, default=(1024, 1024), help="OUTxIN of the synthetic layer (1024x1024)")
    parser.add_argument("--spec", default="v8-k4096", help="such as v8-k65536 (default: v8-k4096)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", help="quantize a decoder block of this model instead of a synthetic layer")
    parser.add_argument("--block", type=int, default=0, help="which one")
    parser.add_argument("--text", type=Path, help="calibration text, needed with --model")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    arguments = parser.parse_args()
    if arguments.model and not arguments.text:
        parser.error("--model needs --text FILE: the Hessians are made from it")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
