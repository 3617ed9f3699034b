"""The Triton search compiles for real GPUs, on a machine without one: on tensor cores, in registers, without TF32."""

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
from vptq.ops import triton_nearest as kernels

WHOLE = {"tiles": "*i32", "indices": "*i64", "residual_indices": "*i64"}
FLOATS = ("x", "scale", "shift", "weights", "held", "table", "half_norms", "center", "minima", "codebook", "residual",
          "values", "errors", "distances")

def compile(name, target, constants, absent, warps):
    kernel = getattr(kernels, name)
    constants = {**constants, **dict.fromkeys(absent)}
    pointers = {**WHOLE, **dict.fromkeys(FLOATS, "*fp32")}
    signature, fixed, aligned = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument], fixed[(place,)] = "constexpr", constants[argument]
        else:
            signature[argument] = pointers.get(argument, "i32")
            if argument in pointers:
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, aligned)
    compiled = triton.compile(source, target=GPUTarget(*target), options={"num_warps": warps})
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return {
        "shared": compiled.metadata.shared,
        "bfloat16 products": len(re.findall(r"mma\\S*\\.bf16", text)),
        "tf32": "tf32" in text,
        "spilled": len(re.findall(r"ld\\.local|scratch_load", text)),
    }

print(json.dumps([compile(*case) for case in json.loads(sys.argv[1])]))
"""
TURING, AMPERE, HOPPER, MI300 = ("cuda", 75, 32), ("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)
RANK = {"V": 8, "VP": 16, "TILE": 64, "SLOTS": 1, "ROWS": 64, "PRECISION": "ieee"}
EXACT_BFLOAT16 = {**RANK, "PRECISION": "bf16x6"}
SETTLE = {"V": 2, "TILE": 64, "SLOTS": 1, "KEPT": 1, "ROWS": 8}
# Kernel, GPU, compile-time sizes, what is not given, warps.
CASES = (
    ("rank", HOPPER, EXACT_BFLOAT16, ("scale", "shift", "weights"), 4),
    ("rank", HOPPER, EXACT_BFLOAT16, (), 4),
    ("rank", AMPERE, {**EXACT_BFLOAT16, "SLOTS": 32}, ("weights",), 4),
    ("rank", TURING, RANK, (), 4),
    ("rank", MI300, RANK, ("weights",), 4),
    ("settle_nearest", HOPPER, {**SETTLE, "SLOTS": 8, "KEPT": 8}, (), 1),
    ("settle_columns", HOPPER, {**SETTLE, "SLOTS": 8, "KEPT": 8}, (), 1),
    ("settle_columns", MI300, SETTLE, ("weights", "held", "residual", "residual_indices"), 1),
)


@pytest.mark.slow
def test_the_search_compiles_for_every_kind_of_gpu() -> None:
    """In a process of its own: once interpreted, a kernel cannot be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", COMPILE, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    for (_, _, sizes, *_), found in zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert found["shared"] <= 48 * 1024, "what every GPU in use has"
        assert (found["bfloat16 products"] > 0) == (sizes.get("PRECISION") == "bf16x6")
        assert not found["tf32"]
        assert not found["spilled"]
