"""Every published layer variant decodes to what the published code, or the format's definition, says it is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORMAT = ROOT.parent / "shared" / "format"


@pytest.mark.skipif(not (FORMAT / "check.py").exists(), reason="golden vectors: ../shared/format is not there")
def test_golden_vectors() -> None:
    """All mandatory and all optional cases, bit-exact weights and the packer included."""
    command = [sys.executable, FORMAT / "check.py", ROOT / "tests/golden/adapter.py", FORMAT / "golden"]
    result = subprocess.run([*command, "--native", "--packing"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 fail, 0 optional fail" in result.stdout
