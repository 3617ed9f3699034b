"""`vptq env` names every backend and, given a folder, the kernels of its layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_layers import random_weight

from vptq.checkpoint import save_checkpoint
from vptq.spec import QuantSpec

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def test_env_names_every_backend_with_a_reason(run: Run) -> None:
    from vptq.ops import backends

    status, out, _ = run("env")
    assert status == 0
    flat = " ".join(out.split())
    for backend in backends():
        assert re.search(rf"^{backend.name} +(in use|not used) +\S", out, re.MULTILINE)
        assert backend.reason.split()[0] in flat
    assert "torch" in flat


def test_env_of_a_folder_names_a_kernel_for_each_kind_of_layer(run: Run, tmp_path: Path) -> None:
    tensors, entries = {}, {}
    for number, spec in enumerate(("v8-k16", "v8-k16", "v4-k16-16")):
        config = QuantSpec.parse(spec).for_layer(24, 40, False)
        entries[f"layers.{number}"] = config.to_entry()
        stored = random_weight(config, torch.bfloat16).to_tensors(torch.bfloat16)
        tensors.update({f"layers.{number}.{name}": tensor for name, tensor in stored.items()})
    config_json = {"quantization_config": {"quant_method": "vptq", "config_for_layers": entries}}
    save_checkpoint(tmp_path / "model", tensors.items(), config_json)
    status, out, _ = run("env", tmp_path / "model")
    assert status == 0
    table = out[out.index("\nlayers") :]
    kinds = re.findall(r"^(v\d+-\S+) .*?bfloat16 +(\d) +(\S+) +(\S+)", table, re.MULTILINE)
    assert [(name, count) for name, count, *_ in kinds] == [("v8-k16", "2"), ("v4-k16-16", "1")]
    assert {kernel for *_, kernel in kinds} <= {"cpu", "torch", "triton"}
    status, _, error = run("env", tmp_path / "nothing")
    assert status == 1
    assert "nothing" in error
