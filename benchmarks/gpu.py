"""GPU inference: the layers of Llama-2-7B and 70B by the CUDA and Triton kernels, beside PyTorch's float16 `linear`.

    python benchmarks/gpu.py [--seconds 300] [--configs v8-k4096,...] [--tokens 1,2,...] [--json FILE]

For every config, shape and number of tokens all ways of `vptq.ops.triton_paths` are timed, so that the table also
says where they cross and what its constants should be. A call is replayed from a CUDA graph, as a serving stack would,
with the second-level cache flushed before it, as the other layers of a model do; times are medians. What a call costs
outside a graph, Python included, is told for one layer. Codebooks and indices are random, the worst case for caches.
AQLM's kernels are timed last, where the package `aqlm` runs (gpu_peers.py).

Before that a whole Llama-2-7B of random weights (llama.py) generates in a CUDA graph, in float16 and in each config:
tokens a second, with layers that read the same input run together and apart, and memory.

Kernels are compiled first, by several processes at once. 8 configs x 7 shapes x 7 numbers of tokens are 392 rows; by
arithmetic (22 timings of 45 ms and 31 trials of tiles of 60 ms for each layer) they take three minutes. When --seconds
are over the rest is left out, by name; what there is lies in benchmarks/results/gpu-NAME.json after every layer. Tables
follow, and one line of JSON last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import gpu_tables
import torch
from gpu_model import CONFIGS, SHAPES, TOKENS
from gpu_peers import Peers
from llama import Shape, end_to_end, random_layer
from torch import Tensor
from torch.nn import functional

from vptq.linear import VQuantLinear
from vptq.ops import triton_paths
from vptq.shards import write_json

ROOT = Path(__file__).parents[1]
WAYS = (triton_paths.CUDA, triton_paths.VECTOR, triton_paths.TILES, triton_paths.DENSE)
LIMITS = {triton_paths.CUDA: triton_paths.CUDA_TOKENS, triton_paths.VECTOR: 8}
"""The most tokens that a way takes, or for which one at a time is worth timing."""


def run(way: str, layer: VQuantLinear, x: Tensor) -> Tensor | None:
    from vptq.ops import triton_ops

    return triton_ops.multiply(way, x, layer._stored(), layer.bias, layer._sizes)


def takes_cuda(layer: VQuantLinear) -> bool:
    """Whether the CUDA kernel serves a layer; it cannot be compiled everywhere."""
    x = torch.zeros(1, layer.in_features, dtype=torch.float16, device="cuda")
    return run(triton_paths.CUDA, layer, x) is not None


def compile_tile(job: tuple[str, str, int]) -> None:
    """In a process of its own: has Triton compile a way's kernels of one config with one of their tiles."""
    name, way, number = job
    from vptq.ops import triton_launch

    triton_launch.fastest = lambda kernel, key, tiles, device, run: tiles[min(number, len(tiles) - 1)]
    for shape in SHAPES[:2]:
        layer = random_layer(name, shape)
        for tokens in (1, 16, 64) if way == triton_paths.TILES else (1,):
            try:
                run(way, layer, torch.zeros(tokens, shape[1], dtype=torch.float16, device="cuda"))
            except Exception as error:  # a tile too large for this GPU: the tuner will pass it over
                print(f"{name} {way} tile {number}: {error}", file=sys.stderr)


def compile_all(configs: list[str]) -> float:
    from vptq.ops.triton_tiles import DENSE_TILES, MATRIX_TILES, VECTOR_TILES

    sizes = dict(zip(WAYS[1:], map(len, (VECTOR_TILES, MATRIX_TILES, DENSE_TILES)), strict=True))
    jobs = [(name, way, number) for way in sizes for number in range(sizes[way]) for name in configs]
    began = time.monotonic()
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_tile, jobs))
    return time.monotonic() - began


def microseconds(work: Any) -> float:
    """Median time of a CUDA graph that holds one call, its data cold."""
    import triton

    work()  # tunes, compiles, allocates
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return 1e3 * float(triton.testing.do_bench(graph.replay, warmup=2, rep=15, return_mode="median"))


def eager_microseconds(layer: VQuantLinear, calls: int = 200) -> float:
    """Time of a call at one token without a graph: launches and Python, however fast the GPU is."""
    x = torch.randn(1, layer.in_features, dtype=torch.float16, device="cuda")
    for _ in range(10):
        layer(x)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        layer(x)
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began) / calls


def bandwidth() -> float:
    """Bytes a second of a copy on the device, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e6 * source.numel() / microseconds(lambda: target.copy_(source))


def measure(name: str, shape: tuple[int, int], tokens: tuple[int, ...], fp16: dict[int, float]) -> list[dict[str, Any]]:
    layer, rows = random_layer(name, shape), []
    stored = sum(parameter.nbytes for parameter in layer.parameters())
    decodes = takes_cuda(layer)
    for count in tokens:
        x = torch.randn(count, shape[1], dtype=torch.float16, device="cuda")
        ways = [way for way in WAYS if count <= LIMITS.get(way, count) and (way != triton_paths.CUDA or decodes)]
        times = {way: microseconds(partial(run, way, layer, x)) for way in ways}
        served = triton_paths.choose(count, decodes)
        rows.append(
            {
                "config": name,
                "shape": f"{shape[0]}x{shape[1]}",
                "tokens": count,
                "microseconds": times,
                "served": served,
                "fp16_microseconds": fp16[count],
                "times_fp16": fp16[count] / times[served],
                "gb_per_second": stored / times[served] / 1e3,
            }
        )
        ours = "  ".join(f"{way} {times[way]:8.1f}" if way in times else f"{way}        -" for way in WAYS)
        print(
            f"{name:14} {shape[0]:6}x{shape[1]:<6} {count:4}  {ours}  fp16 {fp16[count]:8.1f} us"
            f"  {rows[-1]['times_fp16']:5.2f} x fp16 ({served})",
            flush=True,
        )
    return rows


def crossovers(rows: list[dict[str, Any]]) -> dict[str, int]:
    """For the constants of `triton_paths`: the most tokens at which a way, or one before it, is fastest in total."""
    fastest = {}
    for count in sorted({row["tokens"] for row in rows}):
        some = [row["microseconds"] for row in rows if row["tokens"] == count]
        totals = {way: sum(times[way] for times in some) for way in WAYS if all(way in times for times in some)}
        fastest[count] = min(totals, key=lambda way: totals[way])
    cuda = [count for count, way in fastest.items() if way == triton_paths.CUDA]
    vector = [count for count, way in fastest.items() if way in (triton_paths.CUDA, triton_paths.VECTOR)]
    tiles = [count for count, way in fastest.items() if way != triton_paths.DENSE]
    return {
        "CUDA_TOKENS": max(cuda, default=0),
        "VECTOR_TOKENS": max(vector, default=0),
        "TILE_TOKENS": max(tiles, default=0),
    }


def whole_models(configs: list[str], tokens: int, shape: Shape, has_time: Callable[[], bool]) -> list[dict[str, Any]]:
    """float16 first, since every row is compared with it."""
    rows: list[dict[str, Any]] = []
    for name in ["", *configs] if tokens else []:
        if has_time():
            row = end_to_end(name, shape, tokens)
            row["times_fp16"] = row["tokens_per_second"] / (rows or [row])[0]["tokens_per_second"]
            rows.append(row)
            print(
                f"{row['config']:14} whole 7B, one token: {row['tokens_per_second']:7.1f} tokens/s, "
                f"{row['times_fp16']:5.2f} x fp16, {row.get('apart_tokens_per_second', 0.0):7.1f} with layers apart, "
                f"{row['memory_bytes'] / 1e9:6.2f} GB, {row['memory_over_stored']:.2f} of what is stored",
                flush=True,
            )
    return rows


def commit() -> str:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="after so long, start nothing new")
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--generate", type=int, default=100, help="tokens of the whole models; 0 leaves them out")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--json", type=Path, help="instead of benchmarks/results/gpu-NAME.json")
    return parser.parse_args()


def main() -> None:
    arguments, began = parse(), time.monotonic()
    if not torch.cuda.is_available():
        sys.exit("error: this benchmark needs a GPU that PyTorch can use; there is none here")
    configs = arguments.configs.split(",")
    tokens = tuple(int(count) for count in arguments.tokens.split(","))
    import triton

    from vptq.ops import triton_tiles

    peers = Peers()
    result: dict[str, Any] = {
        "benchmark": "gpu",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "commit": commit(),
        "crossovers_used": {
            name: getattr(triton_paths, name) for name in ("CUDA_TOKENS", "VECTOR_TOKENS", "TILE_TOKENS")
        },
        "compile_seconds": compile_all(configs),
    }
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    result |= {"rows": rows, "left_out": left_out}
    slug = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    path = arguments.json or ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"

    def has_time() -> bool:
        return time.monotonic() - began <= arguments.seconds

    result["whole_models"] = whole_models(configs, arguments.generate, Shape(), has_time)
    with torch.inference_mode():
        result["bandwidth_gb_per_second"] = bandwidth() / 1e9
        result["eager_microseconds"] = {name: eager_microseconds(random_layer(name, SHAPES[0])) for name in configs}
        for shape in SHAPES:
            weight = torch.randn(shape, dtype=torch.float16, device="cuda") * 0.02
            inputs = {count: torch.randn(count, shape[1], dtype=torch.float16, device="cuda") for count in tokens}
            fp16 = {count: microseconds(partial(functional.linear, x, weight)) for count, x in inputs.items()}
            for name in configs:
                if has_time():
                    rows += measure(name, shape, tokens, fp16)
                    write_json(path, result)
                else:
                    left_out.append(f"{name} {shape[0]}x{shape[1]}")
        peers.measure(SHAPES, tokens, microseconds, began + arguments.seconds)
    result |= {"peers": peers.rows, "peers_missing": peers.missing, "crossovers_measured": crossovers(rows)}
    result["tiles"] = {key: str(tile) for key, tile in triton_tiles._chosen.items()}
    for name, seconds in result["eager_microseconds"].items():
        print(f"{name:14} one token, {SHAPES[0][0]}x{SHAPES[0][1]}, outside a graph: {seconds:.0f} us a call")
    print(f"fastest ways: {result['crossovers_measured']}, in use: {result['crossovers_used']}")
    if left_out:
        print(f"left out, the time was over: {', '.join(left_out)}")
    if peers.missing:
        print(f"other kernels: {peers.missing}")
    gpu_tables.show(result)
    write_json(path, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
