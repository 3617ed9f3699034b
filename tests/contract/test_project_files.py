"""Promises of the project's files: lengths, versions, a lean and quiet import, an optional extension."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vptq

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for folder in ("src", "csrc", "tests", "benchmarks", "docs", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu")
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300, "a file that passes 300 lines wants to be two"
    if path.suffix == ".py" and text.strip():
        assert text.lstrip().startswith(('"""', "#!", 'r"""')), "a module begins with what it is and why"


def test_version_is_the_same_everywhere() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version[1]
    assert vptq.__version__ == version[1]
    assert f'"{version[1]}"' in (ROOT / "src/vptq/__init__.py").read_text(), "the version of a bare source tree"


def test_import_is_lean_and_quiet() -> None:
    heavy = ["torch", "transformers", "numpy", "matplotlib", "typer", "datasets"]
    done = python(f"import sys, vptq; print([name for name in {heavy} if name in sys.modules])")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_help_needs_no_torch() -> None:
    done = python("import sys, vptq.cli; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False False\n")


def test_setup_without_torch_declares_no_extension_and_says_so_in_one_line() -> None:
    code = f"""
import sys, pathlib, setuptools
sys.modules["torch"] = None
declared = {{}}
setuptools.setup = lambda **arguments: declared.update(arguments)
path = pathlib.Path({str(ROOT / "setup.py")!r})
exec(compile(path.read_text(), str(path), "exec"), {{"__name__": "__main__"}})
print(declared)
"""
    done = python(code)
    assert (done.returncode, done.stdout) == (0, "{}\n")
    assert done.stderr.count("\n") == 1
    assert "without the C++ kernels (torch is not importable" in done.stderr
