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

name, target, floats, v = json.loads(sys.argv[1])
kernel = getattr(kernels, name)
tile = {"multiply_vector": VECTOR_TILES, "multiply_tiles": MATRIX_TILES, "dequantize_tiles": DENSE_TILES}[name][0]
padded = 1 << (v - 1).bit_length()
constants = {
    "GROUPS": 2, "BITS": 12, "RESIDUAL_BITS": 8, "V": v, "VP": padded, "VO": 4, "ROWS": tile.rows(padded),
    "COLUMNS": tile.columns, "TOKENS": 16, "WHOLE": True, "residual_indices": None,
}
pointers = {"indices": "*i32", "outlier_indices": "*i16", "perm": "*i16", "inverse": "*i32"}
floating = ("x", "out", "bias", "codebook", "residual_codebook", "outlier_codebook", "scale", "shift")
pointers.update(dict.fromkeys(floating, floats))
signature, fixed, aligned = {}, {}, {}
for place, argument in enumerate(kernel.arg_names):
    if argument in constants:
        signature[argument], fixed[(place,)] = "constexpr", constants[argument]
    else:
        signature[argument] = pointers.get(argument, "i32")
        if argument in pointers:
            aligned[(place,)] = [["tt.divisibility", 16]]
source = ASTSource(kernel, signature, fixed, aligned)
options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
compiled = triton.compile(source, target=GPUTarget(*target), options=options)
text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
print(json.dumps({
    "shared": compiled.metadata.shared,
    "whole vectors": len(re.findall(r"ld\\.global\\S*\\.v4\\.b32", text)),
    "tensor cores": len(re.findall(r"mma", text)),
}))
"""
AMPERE, HOPPER, MI300 = ("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)


@pytest.mark.parametrize(
    ("name", "target", "floats", "v"),
    [
        ("multiply_vector", AMPERE, "*fp16", 8),
        ("multiply_vector", HOPPER, "*bf16", 6),
        ("multiply_tiles", AMPERE, "*bf16", 8),
        ("multiply_tiles", MI300, "*fp16", 8),
        ("dequantize_tiles", HOPPER, "*fp16", 12),
    ],
)
def test_compiles(name: str, target: tuple[str, object, int], floats: str, v: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COMPILE, json.dumps([name, target, floats, v])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shared"] <= 64 * 1024, "what every GPU in use has"
    if target[0] == "cuda":
        # Rows times columns of the tile, a vector each from both codebooks, over the threads of four warps.
        lookups = {"multiply_vector": 4, "multiply_tiles": 8, "dequantize_tiles": 4}[name] * 2
        assert found["whole vectors"] >= lookups
    assert (found["tensor cores"] > 0) == (name == "multiply_tiles")
