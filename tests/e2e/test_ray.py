"""Layers as tasks of a real Ray, started here: the bytes of a run without it, lost processes, errors that arrive."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from solver_problems import problem

import vptq
from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.quantize import cluster
from vptq.quantize.cluster import Cluster
from vptq.quantize.hessian import Moments
from vptq.quantize.slabs import StoredWeight
from vptq.quantize.solver import SolverConfig

ray = pytest.importorskip("ray")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home := tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray writes a token into the home folder
        patch.delenv("RAY_ADDRESS", raising=False)
        with Cluster("local", CPU, 2) as pool:
            yield pool
        assert not ray.is_initialized()
        assert not list(home.iterdir())


def test_a_run_whose_processes_die_gives_the_bytes_of_one_without_ray(
    pool: Cluster, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = tmp_path / "died"

    def solve(device: str, amount: int, layer: dict[str, Any]) -> StoredWeight:
        from vptq.quantize.cluster import _solve

        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return _solve(device, amount, layer)

    options: dict[str, Any] = {"sequences": 3, "seqlen": 16, "device": "cpu"}
    vptq.quantize(tiny_model_folder, tmp_path / "without", "v4-k16-16", **options)
    monkeypatch.setattr(cluster, "_solve", solve)
    vptq.quantize(tiny_model_folder, tmp_path / "with", "v4-k16-16", ray="local", workers=2, **options)
    assert died.exists()
    assert ray.is_initialized(), "the connection was there before the run"
    here, there = ([*(tmp_path / name).glob("*.safetensors")] for name in ("without", "with"))
    assert [path.name for path in here] == [path.name for path in there]
    assert [path.read_bytes() for path in here] == [path.read_bytes() for path in there]


def test_an_error_in_a_task_arrives_as_it_was(pool: Cluster) -> None:
    weight, hessian = problem(8, 6)
    options: dict[str, Any] = {"dtype": torch.float16, "solver": SolverConfig()}
    with pytest.raises(ConfigError, match=r"^weight holds NaN") as caught:
        pool.solve(weight * torch.nan, Moments(hessian), LayerConfig(6, 8, 4, 4), 0, **options)
    assert type(caught.value) is ConfigError
