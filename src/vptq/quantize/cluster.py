"""Layers solved on the nodes of a Ray cluster: each is a Ray task, which Ray gives a GPU, or CPUs, somewhere.

Ray queues the tasks, and runs one again elsewhere when its process or its node is lost. The driver (the process that
quantizes) is one node of the cluster: it runs the models and sends a weight with its Hessian; a node needs the same
packages, and no folder in common.

A task that no node is left for would wait for ever, so that the nodes are counted while a layer takes its time.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vptq
from vptq.config import LayerConfig
from vptq.errors import ConfigError, VPTQError
from vptq.extras import needed
from vptq.quantize.hessian import Moments
from vptq.quantize.parallel import SMALL_LAYER
from vptq.quantize.ray_address import checked_address, try_address
from vptq.quantize.slabs import StoredWeight
from vptq.quantize.workers import Workers, layer_to_send, solve_sent

RETRIES = 3
"""How often a layer is solved again when its process or its node is lost; as many as Ray gives by itself."""

ANSWER_SECONDS = 180
"""For a node's first task, which imports torch, perhaps from a slow disk."""

LOOK_SECONDS = 60
"""How often the nodes are counted while a layer is solved; Ray itself takes about half of that to miss one."""


class Cluster(Workers):
    """Solves layers on the nodes of a Ray cluster, while inside its context."""

    def __init__(self, address: str, device: torch.device, workers: int | None) -> None:
        """Neither connects nor starts anything.

        Args:
            address: "auto" is what RAY_ADDRESS says, or else the cluster this machine belongs to; "local" starts one
                of this machine alone; otherwise the head's HOST:PORT.
            device: a layer gets a GPU, or where this is a CPU, CPUs.
            workers: how many layers at once; None for all the GPUs there are, or one for each node's CPUs.

        Raises:
            ConfigError: Ray is not installed, or the address is none.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read at the import; nothing leaves the cluster
        with needed("ray", "--ray"):
            import ray
        self._ray: Any = ray
        self.address = checked_address(address)
        self.device = device
        self._workers = workers
        self._task: Any = None
        self._share = Share("", 0, 1)
        self._leave = ExitStack()
        self._asked: set[Any] = set()

    def __len__(self) -> int:
        return self._share.at_once

    def __enter__(self) -> Cluster:
        try:
            self._connect()
            nodes = self._nodes()
            self._share = Share.of([node["Resources"] for node in nodes], self.device, self._workers)
            self._check_versions([node for node in nodes if self._share.fits(node["Resources"])])
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self._task = self._ray.remote(max_retries=RETRIES, **self._share.request)(_solve)
        self.note = f"Ray: {len(nodes)} node{'s' * (len(nodes) != 1)}, {self._share}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task = None
        self._leave.close()

    def give_up(self) -> None:
        """As in `Workers`: otherwise Ctrl-C would wait for layers that take minutes."""
        for answer in tuple(self._asked):
            self._ray.cancel(answer, force=True)

    def solve(self, weight: Tensor, moments: Moments, config: LayerConfig, seed: int, **options: Any) -> StoredWeight:
        """As in `Workers`."""
        if self._task is None:
            return super().solve(weight, moments, config, seed, **options)
        layer = layer_to_send(weight, moments, config, seed, options)
        errors, answer = self._ray.exceptions, None
        try:
            answer = self._task.remote(self.device.type, self._share.amount, to_arrays(layer))
            self._asked.add(answer)
            while not self._ray.wait([answer], timeout=LOOK_SECONDS)[0]:
                self._check_nodes()
            stored: StoredWeight = self._ray.get(answer)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            raise VPTQError(
                f"the Ray cluster lost a layer and could not solve it again ({_first_line(error)}); finished blocks "
                "are kept: go on with --resume"
            ) from error
        finally:
            self._asked.discard(answer)
        return stored

    def _connect(self) -> None:
        ray = self._ray
        if ray.is_initialized():  # the caller's connection, which stays
            return
        local: dict[str, Any] = {"include_dashboard": False} if self.address == "local" else {}
        if not local:
            try_address(self.address)
        self._leave.enter_context(_without_raylet_lines(ray))
        try:
            ray.init(self.address, logging_level="ERROR", log_to_driver=False, **local)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(f"--ray {self.address}: Ray does not start here: {_first_line(error)}") from error
        self._leave.callback(ray.shutdown)  # ends what `local` has started; any other cluster goes on

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _check_nodes(self) -> None:
        if not any(self._share.fits(node["Resources"]) for node in self._nodes()):
            raise VPTQError(
                f"no node of the Ray cluster is left that has {self._share.each}; finished blocks are kept: go on with "
                "--resume when one is back"
            )

    def _check_versions(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        """Raises ConfigError where a node has other packages than this process, or none."""
        ray, here = self._ray, _versions()
        on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        ask = ray.remote(num_cpus=0)(_versions)
        asked = [ask.options(scheduling_strategy=on_node(node["NodeID"], soft=False)).remote() for node in nodes]
        for node, answer in zip(nodes, asked, strict=True):
            where = f"--ray {self.address}: node {node['NodeManagerAddress']}"
            try:
                there = ray.get(answer, timeout=ANSWER_SECONDS)
            except ray.exceptions.GetTimeoutError as error:
                raise ConfigError(f"{where} has not answered in {ANSWER_SECONDS} s") from error
            except ray.exceptions.RayError as error:
                raise ConfigError(
                    f"{where} cannot run vptq ({_last_line(error)}); install there what is here: {_said(here)}"
                ) from error
            if there != here:
                raise ConfigError(f"{where} has {_said(there)}, and this process {_said(here)}; install the same")


@dataclass(frozen=True)
class Share:
    """What of a cluster's resources a layer gets.

    Attributes:
        kind: "GPU" or "CPU".
        amount: how many of them a layer gets: one GPU, or CPUs and as many threads (a small layer works with one, as
            everywhere).
        at_once: how many layers are solved at the same time, where nobody else uses the cluster.
    """

    kind: str
    amount: int
    at_once: int

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, float]], device: torch.device, workers: int | None) -> Share:
        """What is fair: a GPU for each layer; CPUs are divided by the layers, but no node can give more than it has.

        Args:
            nodes: the resources of each.
            device: a GPU's, or a CPU's.
            workers: how many layers at once; None for each GPU one, or for each node with CPUs.

        Raises:
            ConfigError: there are none.
        """
        kind = "CPU" if device.type == "cpu" else "GPU"
        there = [count for node in nodes if (count := int(node.get(kind, 0)))]
        if not there:
            raise ConfigError(
                f"--ray: no node of the cluster offers a {kind}, which --device {device.type} asks for; "
                f"see `ray status`, and `ray start --num-{kind.lower()}s`"
            )
        if kind == "GPU":
            return cls(kind, 1, workers or sum(there))
        workers = workers or len(there)
        return cls(kind, max(1, min(max(there), sum(there) // workers)), workers)

    @property
    def request(self) -> dict[str, int]:
        """The same in Ray's words."""
        return {"num_cpus": self.amount if self.kind == "CPU" else 0, "num_gpus": self.amount * (self.kind == "GPU")}

    @property
    def each(self) -> str:
        """What one layer gets."""
        return f"{self.amount} {self.kind}{'s' * (self.amount != 1)}"

    def __str__(self) -> str:
        return f"{self.at_once} layer{'s' * (self.at_once != 1)} at once, {self.each} each"

    def fits(self, node: Mapping[str, float]) -> bool:
        """Whether a node with these resources can solve a layer."""
        return node.get(self.kind, 0) >= self.amount


def to_arrays(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as the bytes of NumPy arrays, which a task reads in Ray's store; tensors would be copied out of it."""
    return {
        name: _Bytes(value.contiguous().view(torch.uint8).numpy(), value.dtype) if isinstance(value, Tensor) else value
        for name, value in layer.items()
    }


@dataclass(frozen=True)
class _Bytes:
    """A CPU tensor [..., n]: uint8 [..., n times the size of its dtype]."""

    array: np.ndarray[Any, Any]
    dtype: torch.dtype

    def tensor(self) -> Tensor:
        with warnings.catch_warnings():  # the array is read-only, and the solver does not write into what it is given
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self.array).view(self.dtype)


@contextmanager
def _without_raylet_lines(ray: Any) -> Iterator[None]:
    """A node that dies is dozens of lines on standard output, which is for results; no setting of Ray keeps them away,
    and `ray status` tells the same."""
    worker, name = ray._private.worker, "print_to_stdstream"
    shown = getattr(worker, name, None)
    if shown is None:
        yield
        return
    setattr(worker, name, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(worker, name, shown)


def _solve(device: str, amount: int, layer: dict[str, Any]) -> StoredWeight:
    """On a node."""
    if device == "cpu":
        config = layer["config"]
        torch.set_num_threads(1 if config.in_features * config.out_features <= SMALL_LAYER else amount)
    given: dict[str, Any] = {
        name: value.tensor() if isinstance(value, _Bytes) else value for name, value in layer.items()
    }
    return solve_sent(torch.device(device), **given)  # Ray shows a task the GPU it has been given, and no other


def _versions() -> dict[str, str]:
    """What the bytes of a layer depend on."""
    return {"vptq": vptq.__version__, "torch": torch.__version__.partition("+")[0]}


def _said(versions: Mapping[str, str]) -> str:
    return " and ".join(f"{package} {version}" for package, version in versions.items())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2].strip()
