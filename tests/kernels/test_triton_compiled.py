"""The Triton kernels compile for real GPUs, on a machine without one; and one index costs one load."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vptq.ops import triton_kernels as kernels
from vptq.ops.triton_tiles import DENSE_TILES, MATRIX_TILES, VECTOR_TILES

FIRST = {"multiply_vector": VECTOR_TILES, "multiply_tiles": MATRIX_TILES, "dequantize_tiles": DENSE_TILES}
FLOATS = ("x", "out", "bias", "codebook", "residual_codebook", "outlier_codebook", "scale", "shift")

def compile(name, target, floats, v, absent):
    kernel, tile, padded = getattr(kernels, name), FIRST[name][0], 1 << (v - 1).bit_length()
    constants = {
        "GROUPS": 1, "BITS": 12, "RESIDUAL_BITS": 0, "V": v, "VP": padded, "VO": 4, "ROWS": tile.rows(padded),
        "COLUMNS": tile.columns, "TOKENS": 16, **dict.fromkeys(absent),
    }
    pointers = {"indices": "*i32", "outlier_indices": "*i16", "perm": "*i16", "inverse": "*i32"}
    pointers.update(dict.fromkeys(FLOATS, floats))
    fixed, aligned = {}, {}

    def described(argument, *path):
        if argument in constants:
            fixed[path] = constants[argument]
            return "constexpr"
        if argument in pointers:
            aligned[path] = [["tt.divisibility", 16]]
        return pointers.get(argument, "i32")

    def layer(*path):
        return kernels.Layer(*(described(field, *path, at) for at, field in enumerate(kernels.Layer._fields)))

    signature = {
        argument: (layer(place, 0), layer(place, 1)) if argument == "layers" else described(argument, place)
        for place, argument in enumerate(kernel.arg_names)
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    source = ASTSource(kernel, signature, fixed, aligned)
    compiled = triton.compile(source, target=GPUTarget(*target), options=options)
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return {
        "shared": compiled.metadata.shared,
        "whole vectors": len(re.findall(r"ld\\.global\\S*\\.v4\\.b32", text)),
        "tensor cores": len(re.findall("mma|mfma", text)),
    }

print(json.dumps([compile(*case) for case in json.loads(sys.argv[1])]))
"""
AMPERE, HOPPER, MI300 = ("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)
RESIDUAL = ("residual_codebook", "residual_indices")
OUTLIERS = ("outlier_codebook", "outlier_indices")
# Kernel, GPU, dtype, vector length, what the layer does not have.
CASES = (
    ("multiply_vector", AMPERE, "*fp16", 8, RESIDUAL + OUTLIERS),
    ("multiply_vector", HOPPER, "*bf16", 6, RESIDUAL),
    ("multiply_tiles", HOPPER, "*bf16", 8, RESIDUAL + OUTLIERS),
    ("multiply_tiles", MI300, "*fp16", 8, RESIDUAL + OUTLIERS),
    ("dequantize_tiles", HOPPER, "*fp16", 12, RESIDUAL + OUTLIERS),
)
LOOKUPS = {"multiply_vector": 2 * 4, "multiply_tiles": 8, "dequantize_tiles": 4}
"""A thread's vectors of a tile: rows times columns over the threads of four warps. Of two layers in the first."""


@pytest.mark.slow
def test_every_kernel_compiles_and_loads_whole_vectors() -> None:
    """In a process of its own: once interpreted, a kernel cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COMPILE, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, target, *_), found in zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert found["shared"] <= 64 * 1024, "what every GPU in use has"
        assert (found["tensor cores"] > 0) == (name == "multiply_tiles")
        if target[0] == "cuda":
            assert found["whole vectors"] >= LOOKUPS[name]
