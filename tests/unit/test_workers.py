"""Layers solved in processes of their own: the same bytes, errors that arrive, and settings that are checked."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny
from solver_problems import problem

import vptq
from vptq.config import LayerConfig
from vptq.errors import ConfigError, VPTQError
from vptq.quantize import workers
from vptq.quantize.hessian import Moments
from vptq.quantize.setup import _workers
from vptq.quantize.solver import SolverConfig
from vptq.quantize.workers import Processes, Workers, worker_devices

CPU = torch.device("cpu")


def test_two_workers_give_the_bytes_of_one(tmp_path: Path) -> None:
    model = tiny("qwen2", num_hidden_layers=1)  # with biases
    used = []

    def watched(solve: Any) -> Any:
        def watch(pool: Workers, *arguments: Any, **options: Any) -> Any:
            used.append(type(pool))
            return solve(pool, *arguments, **options)

        return watch

    with pytest.MonkeyPatch.context() as patch:
        for kind in (Workers, Processes):
            patch.setattr(kind, "solve", watched(kind.solve))
        for count in (1, 2):
            options: dict[str, Any] = {"sequences": 3, "seqlen": 16, "device": "cpu", "workers": count}
            vptq.quantize(model, tmp_path / str(count), "v4-k16-16", **options)
    assert used == [Workers] * 7 + [Processes] * 7
    one, two = ([path.read_bytes() for path in sorted((tmp_path / name).glob("*.safetensors"))] for name in "12")
    assert one
    assert one == two


def test_an_error_arrives_as_it_was_and_a_worker_that_ends_is_one_line() -> None:
    weight, hessian = problem(8, 6)
    config = LayerConfig(6, 8, 4, 4)
    options: dict[str, Any] = {"dtype": torch.float16, "solver": SolverConfig()}
    with Processes([CPU, CPU]) as pool:
        with pytest.raises(ConfigError, match="weight holds NaN"):
            pool.solve(weight * torch.nan, Moments(hessian), config, 0, **options)
        assert pool._pool is not None
        for process in list(pool._pool._processes.values()):
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(VPTQError, match=r"a worker of --workers 2 ended by itself.*--resume") as caught:
            pool.solve(weight, Moments(hessian), config, 0, **options)
    assert "\n" not in str(caught.value)


def test_every_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert worker_devices(torch.device("cuda"), 2) == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert worker_devices(torch.device("cuda", 2), 2) == [torch.device("cuda", 2), torch.device("cuda", 3)]
    assert worker_devices(torch.device("cuda", 3), 1) == [torch.device("cuda", 3)]
    assert worker_devices(CPU, 3) == [CPU] * 3
    with pytest.raises(ConfigError, match="--workers is 2, and each needs a GPU of its own: from cuda:3 on there"):
        worker_devices(torch.device("cuda", 3), 2)
    with pytest.raises(ConfigError, match="--workers is 0; at least 1"):
        _workers(CPU, 0, None)


def test_workers_take_devices_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that begin with one queue solve on different devices."""
    import queue

    devices: Any = queue.SimpleQueue()
    devices.put("cuda:1")
    devices.put("cuda:2")
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for expected in (1, 2):
        own: list[torch.device] = []
        monkeypatch.setattr(workers, "_own", own)
        workers._begin(devices, 1)
        assert own == [torch.device("cuda", expected)]
