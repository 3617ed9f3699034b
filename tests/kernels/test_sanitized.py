"""The C++ core under the address and undefined-behaviour sanitizers, on buffers of exactly the size it may touch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from column_problems import IMPLEMENTATIONS
from processor import processor_has

ROOT = Path(__file__).parents[2]
INSTRUCTION_SETS = [name for name in IMPLEMENTATIONS if name not in ("torch", "amx")]
if INSTRUCTION_SETS and processor_has("avx512_bf16"):
    INSTRUCTION_SETS.append("amx")
# Tiles are emulated: the instructions are rare, and what is around them is ours.
FLAGS = (
    "-std=c++17",
    "-DVPTQ_EMULATE_AMX",
    "-O1",
    "-g",
    "-w",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None or not INSTRUCTION_SETS:
        pytest.skip("no compiler, or no kernels")
    built = tmp_path_factory.mktemp("sanitized") / "lookup_grid"
    sources = [*sorted((ROOT / "csrc").glob("kernels*.cpp")), ROOT / "csrc" / "isa.cpp"]
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", str(ROOT / "tests/sanitize/lookup_grid.cpp"), *map(str, sources)]
    ended = subprocess.run([*command, "-o", str(built)], capture_output=True, text=True)
    if "cannot find" in ended.stderr and "san" in ended.stderr:
        pytest.skip("this compiler has no sanitizers")
    assert ended.returncode == 0, ended.stderr
    return built


@pytest.mark.slow
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_lookup_grid_touches_nothing_outside(isa: str, program: Path) -> None:
    environment = os.environ | {"VPTQ_CPU_ISA": isa}
    ended = subprocess.run([program, "60"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert ended.stdout == f"60 cases on {isa}\n"
