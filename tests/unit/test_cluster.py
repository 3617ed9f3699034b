"""A Ray cluster's side of the driver, with a stand-in for Ray; tests/e2e/test_ray.py has the real one."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from solver_problems import problem

import vptq
from vptq.config import LayerConfig
from vptq.errors import CheckpointError, ConfigError, VPTQError
from vptq.quantize import cluster
from vptq.quantize.cluster import Cluster, Share
from vptq.quantize.hessian import Moments
from vptq.quantize.parallel import SMALL_LAYER
from vptq.quantize.solver import SolverConfig

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback\n  of the task\nin many lines")
        self.cause = cause


class GetTimeoutError(RayError):
    pass


class StandIn(ModuleType):
    """Runs a task where it is asked for; `says` is what reading its result raises, `ready` when waiting ends."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[Any] = []
        self.there = [{"NodeID": "1", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {"CPU": 4.0}}]
        self.says: Exception | None = None
        self.ready = True
        self.connected = False
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, GetTimeoutError=GetTimeoutError)
        strategy = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
        self.util = SimpleNamespace(scheduling_strategies=strategy)
        self._private = SimpleNamespace(worker=SimpleNamespace(print_to_stdstream=print))

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, address: str, **options: Any) -> None:
        self.calls.append((address, options))
        self.connected = True

    def shutdown(self) -> None:
        self.connected = False

    def nodes(self) -> list[dict[str, Any]]:
        return self.there

    def remote(self, **request: Any) -> Any:
        def of(function: Any) -> Any:
            task = SimpleNamespace(remote=lambda *sent: lambda: function(*sent))
            task.options = lambda **_: task
            self.calls.append((function.__name__, request))
            return task

        return of

    def cancel(self, answer: Any, force: bool) -> None:
        self.calls.append(("cancelled", force))

    def wait(self, answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return (answers, []) if self.ready else ([], answers)

    def get(self, answer: Any, timeout: float = 0) -> Any:
        if self.says is not None:
            raise self.says
        try:
            return answer()
        except Exception as error:
            raise RayTaskError(error) from error


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setattr(cluster, "try_address", lambda address: stand_in.calls.append(("tried", address)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return stand_in


def solve(pool: Any, weight: torch.Tensor, hessian: torch.Tensor) -> Any:
    config = LayerConfig(6, 8, 4, 4)
    return pool.solve(weight, Moments(hessian), config, 0, dtype=torch.float16, solver=SolverConfig())


def test_a_task_gives_what_this_process_gives(ray: StandIn) -> None:
    weight, hessian = problem(8, 6)
    pool = Cluster("auto", CPU, None)
    here = solve(pool, weight, hessian)
    with pool:
        assert (len(pool), pool.note) == (1, "Ray: 1 node, 1 layer at once, 4 CPUs each")
        there = solve(pool, weight, hessian)
    assert ray.calls[:2] == [("tried", "auto"), ("auto", {"logging_level": "ERROR", "log_to_driver": False})]
    assert ray.calls[-1] == ("_solve", {"max_retries": cluster.RETRIES, "num_cpus": 4, "num_gpus": 0})
    assert there.config == here.config
    assert here.tensors.keys() == there.tensors.keys()
    assert all(torch.equal(there.tensors[name], here.tensors[name]) for name in here.tensors)


def test_what_was_there_before_stays(ray: StandIn) -> None:
    """Only a connection that a run has made is closed, and Ray prints again afterwards."""
    with Cluster("auto", CPU, 1):
        assert ray.connected
        assert ray._private.worker.print_to_stdstream is not print
    assert not ray.connected
    assert ray._private.worker.print_to_stdstream is print
    ray.init("mine")
    with Cluster("auto", CPU, 1):
        pass
    assert ray.connected
    assert [call for call in ray.calls if call[0] in ("auto", "mine")] == [
        ("auto", {"logging_level": "ERROR", "log_to_driver": False}),
        ("mine", {}),
    ]


def test_an_error_in_a_task_arrives_as_it_was(ray: StandIn) -> None:
    weight, hessian = problem(8, 6)
    with Cluster("auto", CPU, 1) as pool, pytest.raises(ConfigError, match="weight holds NaN") as caught:
        solve(pool, weight * torch.nan, hessian)
    assert "\n" not in str(caught.value)


def test_a_lost_layer_is_one_line(ray: StandIn) -> None:
    with Cluster("auto", CPU, 1) as pool:
        ray.says = RayError("The worker died unexpectedly.\nMany\nlines")
        with pytest.raises(VPTQError, match=r"lost a layer .*\(The worker died unexpectedly\.\).*--resume$") as caught:
            solve(pool, *problem(8, 6))
    assert "\n" not in str(caught.value)


def test_nobody_waits_for_a_node_that_does_not_come(ray: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def wait(answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        looks.append(timeout)
        ray.there[0]["Alive"] = len(looks) < 3
        return [], answers

    monkeypatch.setattr(ray, "wait", wait)
    with (
        Cluster("auto", CPU, 1) as pool,
        pytest.raises(VPTQError, match=r"no node .* is left that has 4 CPUs; .*--resume"),
    ):
        solve(pool, *problem(8, 6))
    assert looks == [cluster.LOOK_SECONDS] * 3, "as long as a node is there, it may take its time"


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"vptq": "0.0.5", "torch": "2.9.0"}, r"node 10.0.0.1 has vptq 0.0.5 and torch 2.9.0, and this process vptq"),
        (RayTaskError(ImportError("no")), r"node 10.0.0.1 cannot run vptq \(in many lines\); install there .*: vptq"),
        (GetTimeoutError(), r"node 10.0.0.1 has not answered in 180 s"),
    ],
)
def test_a_node_with_other_packages_is_refused_before_any_work(
    ray: StandIn, tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, there: Any, message: str
) -> None:
    def get(answer: Any, timeout: float) -> Any:
        if isinstance(there, Exception):
            raise there
        return there

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(ConfigError, match=message) as caught:
        vptq.quantize(tiny_model_folder, tmp_path / "out", "v4-k16", device="cpu", ray="auto")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert not ray.connected


def test_a_cluster_without_the_device_is_refused(ray: StandIn) -> None:
    with pytest.raises(ConfigError, match="no node of the cluster offers a GPU, which --device cuda asks for"):
        Cluster("auto", GPU, 2).__enter__()
    assert not ray.connected


def test_without_ray_its_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs ray, which is not installed: pip install 'vptq\[ray\]'"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", "v4-k16", device="cpu", ray="auto")


def test_every_gpu_is_used_and_each_by_one_layer() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}, {"GPU": 1.0, "CPU": 1.0}]
    share = Share.of(nodes, GPU, None)
    assert (share.at_once, share.request) == (3, {"num_cpus": 0, "num_gpus": 1})
    assert [share.fits(node) for node in nodes] == [True, False, True]
    assert Share.of(nodes, GPU, 2).at_once == 2


@given(st.lists(st.integers(0, 128), min_size=1, max_size=5).filter(any), st.integers(1, 20) | st.none())
def test_cpus_are_divided_so_that_a_layer_fits(there: list[int], workers: int | None) -> None:
    nodes = [{"CPU": float(count)} if count else {} for count in there]
    share = Share.of(nodes, CPU, workers)
    assert share.at_once == workers or sum(map(bool, there))
    assert any(map(share.fits, nodes))
    assert share.amount == 1 or share.amount * share.at_once <= sum(there)
    assert share.amount == max(there) or (share.amount + 1) * share.at_once > sum(there), "no more CPUs are idle"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int16])
def test_tensors_come_out_of_bytes_as_they_went_in_and_are_not_copied(dtype: torch.dtype) -> None:
    tensor = (torch.randn(6, 4) * 100).to(dtype)
    sent = cluster.to_arrays({"weight": tensor.T, "seed": 3})
    assert sent["seed"] == 3
    sent["weight"].array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        received = sent["weight"].tensor()
    assert received.dtype == dtype
    assert torch.equal(received, tensor.T)
    assert received.data_ptr() == sent["weight"].array.ctypes.data


@pytest.mark.parametrize(("features", "threads"), [(6, 1), (SMALL_LAYER, 7)])
def test_large_layers_work_with_all_their_cpus(monkeypatch: pytest.MonkeyPatch, features: int, threads: int) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(cluster, "solve_sent", lambda device, **layer: (device, layer))
    layer = {"config": LayerConfig(features, 8, 4, 4)}
    assert cluster._solve("cpu", 7, layer) == (CPU, layer)
    assert set_to == [threads]
    assert cluster._solve("cuda", 1, layer) == (GPU, layer)
    assert set_to == [threads]


def test_a_failed_read_of_a_layer_keeps_its_kind(ray: StandIn) -> None:
    with Cluster("auto", CPU, 1) as pool:
        ray.says = RayTaskError(CheckpointError("as it was"))
        with pytest.raises(CheckpointError, match=r"^as it was$"):
            solve(pool, *problem(8, 6))


def test_a_layer_under_way_can_be_given_up(ray: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(answers: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        pool.give_up()
        return answers, []

    monkeypatch.setattr(ray, "wait", wait)
    with Cluster("auto", CPU, 1) as pool:
        solve(pool, *problem(8, 6))
        assert ray.calls[-1] == ("cancelled", True)
        pool.give_up()
    assert ray.calls.count(("cancelled", True)) == 1, "a finished one is not"
