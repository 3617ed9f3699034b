"""Nearest centroids: the C++ kernel against the same operator in PyTorch.

    python benchmarks/nearest.py [--threads 1] [--repeats 5] [--json FILE]

Both run on the same data, alternating, after a warm-up; medians are printed, and one line of JSON comes last. The roof
is what this machine's own float32 matrix multiplication reaches, since a score costs `dim` multiply-adds and nothing
can be cheaper; on a busy machine read the ratio, not the seconds. For the instruction set set VPTQ_CPU_ISA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vptq.ops import backends, nearest
from vptq.ops.search import nearest as torch_nearest
from vptq.shards import write_json

# (vectors, centroids, vector_len, beam): the quantizer's own shapes, cut to what takes a second.
CASES = [
    (4096, 65536, 8, 1),
    (4096, 65536, 8, 8),
    (32768, 4096, 8, 1),
    (32768, 4096, 6, 1),
    (32768, 4096, 8, 8),
    (32768, 4096, 12, 1),
    (131072, 256, 8, 1),
    (131072, 256, 4, 1),
    (131072, 256, 8, 8),
    (131072, 64, 4, 8),
]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def roof(repeats: int) -> float:
    """GFLOP/s of a float32 matrix multiplication."""
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = [seconds(lambda: torch.mm(a, b)) for _ in range(repeats + 2)]
    return 2 * size**3 / min(times) / 1e9


def measure(vectors: Tensor, codebook: Tensor, beam: int, repeats: int) -> tuple[float, float]:
    """Median seconds of the kernel and of PyTorch, alternating."""
    few = vectors[: len(vectors) // 8]
    nearest(few, codebook, beam), torch_nearest(few, codebook, beam)
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(seconds(lambda: nearest(vectors, codebook, beam)))
        theirs.append(seconds(lambda: torch_nearest(vectors, codebook, beam)))
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the last line to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    status = next(status for status in backends() if status.name == "cpu")
    if not status.active:
        raise SystemExit(f"nothing to compare: {status.reason}")
    peak = roof(arguments.repeats)
    print(f"{status.reason}; {arguments.threads} threads; matrix multiplication {peak:.0f} GFLOP/s")
    print(
        f"{'vectors':>8} {'centroids':>9} {'len':>3} {'beam':>4} {'ms':>9} {'torch ms':>9} {'ratio':>6} {'of roof':>8}"
    )
    rows = []
    for count, centroids, dim, beam in CASES:
        ours, theirs = measure(torch.randn(count, dim), torch.randn(centroids, dim), beam, arguments.repeats)
        gflops = 2 * count * centroids * dim / ours / 1e9
        rows.append(
            {
                "vectors": count,
                "centroids": centroids,
                "vector_len": dim,
                "beam": beam,
                "seconds": round(ours, 6),
                "torch_seconds": round(theirs, 6),
                "ratio": round(theirs / ours, 2),
                "gflops": round(gflops, 1),
            }
        )
        print(
            f"{count:8} {centroids:9} {dim:3} {beam:4} {ours * 1e3:9.1f} {theirs * 1e3:9.1f} {theirs / ours:6.1f}"
            f" {gflops / peak:8.0%}",
            flush=True,
        )
    result = {"benchmark": "nearest", "threads": arguments.threads, "roof_gflops": round(peak, 1), "rows": rows}
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
