"""What was measured on a GPU stands beside what was predicted, as soon as a result file exists, and not before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_model
import gpu_tables
from gpu_devices import H200
from gpu_model import SHAPES


def result(device: str = "NVIDIA H200", **more: Any) -> dict[str, Any]:
    here = "x".join(map(str, SHAPES[0]))
    row = {"config": "v8-k4096", "shape": here, "tokens": 1, "served": "cuda", "fp16_microseconds": 110.0}
    row |= {"microseconds": {"cuda": 55.0, "tiles": 99.0}, "times_fp16": 2.0}
    peer = {"peer": "AQLM 2x8", "shape": here, "tokens": 1, "microseconds": 50.0}
    return {"benchmark": "gpu", "device": device, "commit": "0123456789", "rows": [row], "peers": [peer], **more}


def test_without_a_result_only_predictions_are_told() -> None:
    told = gpu_tables.of_device(H200, None)
    assert "not measured on a GPU" in told
    assert "**measured**" not in told
    assert told.count("`v6-k4096`, predicted") == len(SHAPES)
    time = gpu_model.predict(H200, "v8-k4096", (4096, 4096), 16).microseconds
    assert f"{time:.1f} ({gpu_model.bound(H200, 'v8-k4096', (4096, 4096), 16) / time:.2f})" in told


def test_measured_lines_follow_the_predicted_ones() -> None:
    lines = gpu_tables.of_device(H200, result()).splitlines()
    assert lines[0] == "H200: measured at commit 0123456."
    place = next(i for i, line in enumerate(lines) if line.startswith("| `v8-k4096`, predicted"))
    share = gpu_model.bound(H200, "v8-k4096", SHAPES[0], 1) / 55.0
    assert lines[place + 1].startswith(f"| `v8-k4096`, **measured** | 55.0 ({share:.2f}) | - | -")
    assert any(line.startswith("| float16 `linear`, **measured** | 110.0 | -") for line in lines)
    assert any(line.startswith("| AQLM 2x8, **measured** | 50.0 | -") for line in lines)
    assert gpu_tables.measured_times(result(), "v8-k4096", 1) == "2.00"
    assert gpu_tables.measured_times(result(), "v8-k4096", 512) == "-"


def test_results_belong_to_their_gpu_and_benchmark(tmp_path: Path) -> None:
    assert gpu_tables.result_of(H200, tmp_path) is None
    others = {"gpu-a": result("NVIDIA A100"), "gpu-quantize": result(benchmark="gpu_quantize")}
    for name, other in others.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(other))
    assert gpu_tables.result_of(H200, tmp_path) is None
    (tmp_path / "gpu-nvidia-h200.json").write_text(json.dumps(result()))
    assert gpu_tables.result_of(H200, tmp_path) == result()


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("device", ["NVIDIA H200", "Another card"])
def test_the_terminal_shows_what_was_measured(
    device: str, rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a GPU without figures no share."""
    monkeypatch.setattr(gpu_tables, "find_spec", lambda name: rich or None)
    gpu_tables.show(result(device))
    said = capsys.readouterr().out
    assert "8192 x 28672" in said
    assert "4096 x 4096" not in said
    assert ("55.0 (0." in said) == (device == "NVIDIA H200")
    assert "AQLM 2x8" in said
    assert ("| --- |" in said) == (not rich)
