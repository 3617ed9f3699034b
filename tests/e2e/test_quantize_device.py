"""Quantizing on a GPU, as far as that can be seen without one: every tensor is where it has to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import GPU, FakeGpu

import vptq
from vptq.quantize import original, slabs
from vptq.quantize.weights import WeightFiles

QUICK: dict[str, Any] = {"sequences": 3, "seqlen": 16}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    load = WeightFiles.load
    monkeypatch.setattr(WeightFiles, "load", lambda files, name: fake.tag(load(files, name), torch.device("cpu")))
    for module in (original, slabs):
        monkeypatch.setattr(module, "device_memory_bytes", lambda device: 0 if device.type == "cpu" else 1 << 34)
    return fake


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("ba be bi bo bu da de di do du fa fe fi " * 60)
    return path


def test_a_mixed_operation_is_noticed(gpu: FakeGpu) -> None:
    with gpu:
        here, there = torch.ones(3), torch.ones(3, device=GPU)
        assert there.device == (there * 2).device == here.to("cuda").view(3, 1).device == GPU
        assert here.device == there.cpu().device == torch.device("cpu")
        here.copy_(there)
        with pytest.raises(AssertionError, match="add mixes devices"):
            torch.add(here, there)
        with pytest.raises(AssertionError, match="mixes devices"):
            torch.cat([there, here])
        with pytest.raises(AssertionError, match="mixes devices"):
            here[there > 0]


@pytest.mark.parametrize(
    "options",
    [
        {"spec": "v4-k16-16", "finetune": "both", "lm_head": "v4-k16", "move_indices": 0.1},
        {"bits": 3.0, "hessian_inputs": "quantized", "rotate": True, "lm_head": "auto"},
        {"spec": "v4-k16-o9x8v2", "hessian": "fisher", "hessian_inputs": "original"},
    ],
    ids=["finetuned", "planned", "fisher"],
)
def test_nothing_mixes_devices(
    options: dict[str, Any], gpu: FakeGpu, tiny_model_folder: Path, text: Path, tmp_path: Path
) -> None:
    with gpu:
        report = vptq.quantize(tiny_model_folder, tmp_path / "out", calibration=text, device="cuda", **QUICK | options)
    assert all(layer.loss < 0.5 for layer in report.layers)
    assert {"addmm_", "linalg_cholesky_ex", "scaled_dot_product_attention"} <= gpu.ran, "the work was done there"
    assert any("nearest" in name for name in gpu.ran)
    stored = WeightFiles(tmp_path / "out")
    assert all(bool(stored.load(name).isfinite().all()) for name in stored)
