"""Quantizing on a GPU: seconds per Llama-2-7B-shaped decoder block, beside what a model of the device predicts.

    python benchmarks/gpu_quantize.py [--seconds 150] [--specs v8-k65536-256,...] [--json FILE]
    python benchmarks/gpu_quantize.py --predict

Each of the block's three shapes is solved once, as `vptq quantize` solves it, with a synthetic weight and Hessian, and
counts as often as the block has it; Hessians are accumulated for some tokens and scaled to 128 x 2048. Larger models
follow by the number of weights: a search compares every vector with every centroid, so its time grows with the
weights and nothing else (the products with Hessians grow with the width too; they are the smaller part). Not counted:
running the blocks, finetuning, and reading and writing files.

What the prediction counts: scores at the rate of the tensor cores, float32 products at that of float32 arithmetic,
each at half of the peak, and a fixed time for each column of the second-order passes, where one launch waits for the
other. When the time is over, the rest is left out by name. One line of JSON comes last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from quantize import synthetic
from torch import Tensor

from vptq.config import LayerConfig
from vptq.ops.triton_paths import MAX_VECTOR_LEN
from vptq.quantize.hessian import HessianAccumulator
from vptq.quantize.solver import SolverConfig, quantize_weight
from vptq.shards import write_json
from vptq.spec import QuantSpec

SPECS = ("v8-k65536-256", "v8-k256-256", "v6-k4096")
BLOCK = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
"""Shape out x in of a layer -> how many of them a block of Llama-2-7B has."""
INPUTS = {4096: 3, 11008: 1}
"""Width -> Hessians of a block."""
WEIGHTS = {"7B": 32 * 202_375_168, "70B": 80 * 855_638_016, "405B": 126 * 3_187_671_040}
"""Weights of the linear layers in the blocks of Llama 2 7B, Llama 2 70B and Llama 3.1 405B."""
TOKENS, MEASURED_TOKENS = 128 * 2048, 8 * 2048

# H200, on paper: nothing here was measured.
BF16_FLOPS, FLOAT32_FLOPS, SHARE = 989e12, 67e12, 0.5
SCORE_FLOPS = 2 * 6 * 16
"""Of one score on tensor cores: float32 as three bfloat16 parts (six products), vectors padded to 16."""
COLUMN_SECONDS, BEAM_COLUMN_SECONDS = 45e-6, 110e-6
"""Of one column of a second-order pass: three launches, the last two of which wait for memory more than they work."""
KMEANS_PASSES, JOINT_ROUNDS, SWEEPS = 22, 3, 6
"""Searches at most: Lloyd's steps with seeding and the last one; rounds with a residual; feedback and descent."""
PRODUCTS = 45
"""Of the Hessian with a weight: 6 a refit, 5 refits; 1.5 a sweep; the losses that are reported."""


def predicted(config: LayerConfig) -> float:
    """Seconds to solve one layer on an H200."""
    vectors = config.in_features * config.num_vectors
    main, residual = config.num_centroids, config.num_residual_centroids
    pairs = main * residual
    joint, float32, column = float(main), 0.0, COLUMN_SECONDS
    if 0 < pairs <= 65536:
        joint = float(pairs)
    elif residual:
        beam = min(64, max(4, SolverConfig().search // residual))
        float32, column = beam * residual * 2.0 * config.vector_len, BEAM_COLUMN_SECONDS
    rounds = JOINT_ROUNDS if residual else 0
    scores = vectors * (KMEANS_PASSES * (main + residual) + (rounds + SWEEPS) * joint)
    products = PRODUCTS * 2.0 * config.in_features**2 * config.out_features
    arithmetic = products + 2 * vectors * (rounds + SWEEPS) * float32
    columns = config.in_features * SWEEPS * column
    return scores * SCORE_FLOPS / (SHARE * BF16_FLOPS) + arithmetic / (SHARE * FLOAT32_FLOPS) + columns


def predicted_hessians() -> float:
    """Seconds for the Hessians of one block on an H200."""
    return sum(count * 2.0 * TOKENS * width**2 for width, count in INPUTS.items()) / (SHARE * FLOAT32_FLOPS)


def layer_config(spec: str, shape: tuple[int, int]) -> LayerConfig:
    config = QuantSpec.parse(spec).for_layer(shape[1], shape[0])
    assert config.vector_len <= MAX_VECTOR_LEN
    return config


@lru_cache(maxsize=2)
def problem(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A weight and its Hessian."""
    layer = synthetic(shape, QuantSpec.parse(SPECS[0]))
    return layer.weight.cuda(), layer.hessian.cuda()


def solve(spec: str, shape: tuple[int, int]) -> tuple[float, float]:
    """Seconds to solve one layer, and its loss."""
    weight, hessian = problem(shape)
    torch.cuda.synchronize()
    began = time.perf_counter()
    solution = quantize_weight(weight, hessian, layer_config(spec, shape), torch.Generator().manual_seed(0))
    torch.cuda.synchronize()
    return time.perf_counter() - began, list(solution.losses.values())[-1]


def accumulate(width: int) -> float:
    """Seconds for one Hessian of a block."""
    seen = HessianAccumulator(width, "cuda")
    inputs = torch.randn(MEASURED_TOKENS // 4, width, dtype=torch.bfloat16, device="cuda")
    seen.add(inputs)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(4):
        seen.add(inputs)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * TOKENS / MEASURED_TOKENS


def minutes(block_seconds: float) -> dict[str, float]:
    """Model -> minutes for all of its blocks, by the number of weights."""
    per_weight = block_seconds / sum(out * width * count for (out, width), count in BLOCK.items())
    return {name: per_weight * weights / 60 for name, weights in WEIGHTS.items()}


def row(spec: str, block_seconds: float | None) -> str:
    """A line of the table in docs/performance.md."""
    expected = sum(count * predicted(layer_config(spec, shape)) for shape, count in BLOCK.items())
    expected += predicted_hessians()
    whole = " / ".join(
        f"{value:.0f} min" if value < 120 else f"{value / 60:.0f} h" for value in minutes(expected).values()
    )
    measured = "not measured on a GPU" if block_seconds is None else f"{block_seconds:.1f} s"
    return f"| `{spec}` | {measured} | {expected:.1f} s | {whole} |"


def measure(specs: list[str], seconds: float) -> dict[str, Any]:
    began = time.monotonic()
    hessians = {width: accumulate(width) for width in INPUTS}
    per_block = sum(count * hessians[width] for width, count in INPUTS.items())
    rows: list[dict[str, Any]] = []
    left_out = []
    blocks = dict.fromkeys(specs, per_block)
    for spec in specs:
        solve(spec, (256, 256))  # compiles
    for shape, count in BLOCK.items():
        for spec in specs:
            if time.monotonic() - began > seconds:
                left_out.append(f"{spec} {shape[0]}x{shape[1]}")
                blocks.pop(spec, None)
                continue
            took, loss = solve(spec, shape)
            expected = predicted(layer_config(spec, shape))
            name = f"{shape[0]}x{shape[1]}"
            print(f"{spec:14} {name:>12} {took:7.2f} s  predicted {expected:7.2f} s  loss {loss:.3%}", flush=True)
            rows.append({"spec": spec, "shape": name, "seconds": took, "predicted": expected, "loss": loss})
            if spec in blocks:
                blocks[spec] += count * took
    for spec, block in blocks.items():
        rows.append({"spec": spec, "block_seconds": block, "minutes": minutes(block)})
        print(row(spec, block))
    return {"hessian_seconds": hessians, "rows": rows, "left_out": left_out}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="after so long, start nothing new")
    parser.add_argument("--specs", default=",".join(SPECS))
    parser.add_argument("--predict", action="store_true", help="only print the prediction; needs no GPU")
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    arguments = parser.parse_args()
    specs = arguments.specs.split(",")
    if arguments.predict:
        print("\n".join(row(spec, None) for spec in specs))
        return
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a GPU that PyTorch can use; there is none here")
    result = {
        "benchmark": "gpu_quantize",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        **measure(specs, arguments.seconds),
    }
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
