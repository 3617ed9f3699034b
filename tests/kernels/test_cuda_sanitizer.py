"""The CUDA decode kernels on a GPU under compute-sanitizer: no byte outside, no race in shared memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_layers import GPU

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


@pytest.mark.gpu
@GPU
@pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer, which comes with the CUDA toolkit")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_kernels_are_clean(tool: str) -> None:
    # PyTorch's allocator would hide what lies beyond a tensor inside a larger block.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        SANITIZER,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        ROOT / "tests/sanitize/cuda_decode.py",
    ]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    # What the tool says at the end only if it saw the program through.
    assert "ERROR SUMMARY: 0 errors" in ended.stdout or "0 hazards displayed" in ended.stdout
