"""The implementations of `vptq::assign_columns`, one after another; and where CUDA kernels lie that g++ compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
from column_problems import IMPLEMENTATIONS, Assign

from vptq import ops
from vptq.ops import columns as in_torch


@pytest.fixture(params=IMPLEMENTATIONS)
def assign(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Assign:
    if request.param == "torch":
        return in_torch.assign_columns
    monkeypatch.setenv("VPTQ_CPU_ISA", request.param)
    return ops.assign_columns


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")
