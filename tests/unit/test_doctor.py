"""The doctor finds what is wrong, calls it by name, and has one command for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vptq import doctor
from vptq.doctor import Finding, hub, kernels, machine, packages
from vptq.ops.backends import BackendStatus

Lie = Callable[..., None]


@pytest.fixture
def asks_for(monkeypatch: pytest.MonkeyPatch) -> Lie:
    """Pretend that the package's metadata asks for these, and that these versions are installed."""

    def pretend(*requirements: str, **versions: str) -> None:
        def version(package: str) -> str:
            try:
                return versions[package]
            except KeyError:
                raise metadata.PackageNotFoundError(package) from None

        monkeypatch.setattr(metadata, "requires", lambda name: list(requirements))
        monkeypatch.setattr(metadata, "version", version)

    return pretend


def one(findings: Any) -> Finding:
    (finding,) = findings
    assert isinstance(finding, Finding)
    return finding


def test_required_packages_are_held_to_the_versions_asked_for(asks_for: Lie) -> None:
    wanted = ("transformers>=4.57,<5.20", "torch>=2.10", "typer>=0.15", 'gradio>=6; extra == "app"')
    asks_for(*wanted, torch="2.13.0+cpu", transformers="5.21.0")
    transformers, torch_, typer = packages.required()
    assert torch_ == Finding("torch", "ok", "2.13.0+cpu")
    assert typer == Finding("typer", "problem", "not installed", "pip install 'typer>=0.15'")
    assert (transformers.state, transformers.remedy) == ("problem", "pip install 'transformers<5.20,>=4.57'")
    assert "5.21.0" in transformers.found
    assert "4.57" in transformers.found


def test_an_extra_may_be_absent_but_not_of_a_wrong_version(asks_for: Lie) -> None:
    wanted = ('gradio>=6; extra == "app"', 'pandas>=2; extra == "app"', 'gguf>=0.17; extra == "gguf"', "torch>=2.10")
    asks_for(*wanted, gguf="0.19")
    states = {finding.part: finding for finding in packages.extras()}
    assert states["extra gguf"].state == "ok"
    absent = states["extra app"]
    assert (absent.state, absent.remedy) == ("optional", "pip install 'vptq[app]'")
    assert "gradio, pandas" in absent.found
    asks_for(*wanted, gradio="5.1", pandas="2.2")
    wrong = {finding.part: finding for finding in packages.extras()}["extra app"]
    assert (wrong.state, wrong.remedy) == ("problem", "pip install 'vptq[app]'")
    assert "gradio is 5.1, and >=6 is needed" in wrong.found


def test_python_is_held_to_what_the_package_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=3.10"})
    assert [finding.state for finding in packages.python()] == ["ok", "ok"]
    monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": ">=4"})
    *_, python = packages.python()
    assert (python.part, python.state) == ("python", "problem")


def test_a_source_tree_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    for function in ("metadata", "requires", "version", "distribution"):
        monkeypatch.setattr(metadata, function, nothing)
    found = one(packages.python())
    root = Path(__file__).parents[2]
    assert (found.state, found.remedy) == ("problem", f"pip install --no-build-isolation -e {root}")
    assert list(packages.required()) == []
    assert list(packages.extras()) == []


def test_transformers_that_does_not_know_us_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(packages.registered()).state == "ok"
    auto = sys.modules["transformers.quantizers.auto"]
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "vptq", SimpleNamespace)
    assert one(packages.registered()).state == "problem"
    monkeypatch.setitem(sys.modules, "transformers.quantizers.auto", None)
    assert "cannot be imported" in one(packages.registered()).found


def pretend_backend(monkeypatch: pytest.MonkeyPatch, active: bool, reason: str = "why") -> None:
    monkeypatch.setattr("vptq.ops.backends", lambda: [BackendStatus("cpu", active, active, reason)])


def test_kernels_that_are_there_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_backend(monkeypatch, True, "C++ kernels (avx2)")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    cpp, compiler = kernels.cpu()
    assert (cpp.state, cpp.found) == ("ok", "C++ kernels (avx2)")
    assert (compiler.state, compiler.remedy) == ("optional", "sudo apt-get install g++")


def test_kernels_that_are_missing_are_built_again_after_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_backend(monkeypatch, False)
    monkeypatch.setattr(packages, "reinstall_command", lambda: "REINSTALL")
    monkeypatch.setattr(kernels, "reinstall_command", lambda: "REINSTALL")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "dnf" else None)
    assert next(kernels.cpu()).remedy == "sudo dnf install gcc-c++ && REINSTALL"
    monkeypatch.setattr(kernels.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert next(kernels.cpu()).remedy == "REINSTALL"


def test_kernels_left_out_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_backend(monkeypatch, False, "not loaded: VPTQ_BACKEND=reference")
    assert next(kernels.cpu()).remedy == "unset VPTQ_BACKEND"


@pytest.mark.parametrize(
    ("stated", "command"),
    [
        ('{"url": "file:///src/vptq", "dir_info": {"editable": true}}', "--force-reinstall -e /src/vptq"),
        ('{"url": "file:///src/vptq", "dir_info": {}}', "--force-reinstall /src/vptq"),
        (None, "--force-reinstall vptq"),
    ],
)
def test_it_is_built_again_from_where_it_came(
    monkeypatch: pytest.MonkeyPatch, stated: str | None, command: str
) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda file: stated))
    assert packages.reinstall_command().endswith(command)


@pytest.mark.parametrize(
    ("driver", "cuda", "devices", "state", "remedy"),
    [
        (False, None, 0, "ok", ""),
        (True, None, 0, "problem", "pip install --force-reinstall torch"),
        (True, "13.0", 0, "problem", "nvidia-smi"),
        (True, "13.0", 1, "ok", ""),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_a_problem(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    driver: bool,
    cuda: str | None,
    devices: int,
    state: str,
    remedy: str,
) -> None:
    monkeypatch.setattr(kernels, "NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 0)
    card = SimpleNamespace(name="a card", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1e10, 8e10))
    first = next(kernels.gpu())
    assert (first.state, first.remedy) == (state, remedy)
    if devices:
        assert "a card, compute capability 9.0, 10.0 of 80.0 GB free" in first.found


@pytest.mark.parametrize(("cuda", "state", "extra"), [("13.0", "ok", ""), ("12.8", "problem", "cuda12")])
def test_nvrtc_has_to_speak_the_cuda_of_torch(
    monkeypatch: pytest.MonkeyPatch, cuda: str, state: str, extra: str
) -> None:
    pytest.importorskip("cuda.core")
    from cuda.bindings import nvrtc

    monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda: (0, 13, 1))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    *_, found = kernels._gpu_kernels()
    assert (found.part, found.state) == ("NVRTC", state)
    assert found.remedy == (f"pip install 'vptq[{extra}]'" if extra else "")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "to" / "be" / "made"))
    ours, _ = machine.caches()
    assert (ours.state, ours.found) == ("ok", str(tmp_path / "to" / "be" / "made" / "vptq"))
    monkeypatch.setattr(machine.os, "access", lambda folder, mode: folder != tmp_path)
    ours, _ = machine.caches()
    assert (ours.state, ours.remedy) == ("problem", 'export XDG_CACHE_HOME="$PWD/cache"')


@pytest.mark.parametrize(
    ("limit", "used", "available"), [("8000", "3000", 5000), ("max", "3000", 20_000), (None, "", 20_000)]
)
def test_memory_is_what_a_container_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str | None, used: str, available: int
) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20_000, total=30_000))
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(used)
    assert machine.available_memory()[0] == available
    assert one(machine.memory()).state == "problem"


def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
    assert [finding.state for finding in machine.disk()] == ["problem", "problem"]
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**10))
    assert [finding.state for finding in machine.disk()] == ["ok", "ok"]


def test_the_hub_is_asked_only_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def answer(url: str, timeout: float) -> None:
        asked.append(url)
        raise OSError("no route\nsecond line")

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=answer))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert list(doctor.examine()) == []
    assert not asked
    found = one(doctor.examine(reach_hub=True))
    assert asked
    assert (found.state, found.found) == ("problem", "no answer: no route")


def test_a_token_is_shown_by_its_owner_and_never_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda url, timeout: None))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self, token: {"name": "somebody"})
    answers, owner = hub.hub()
    assert (answers.state, owner.state, owner.found) == ("ok", "ok", "of somebody")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert [finding.state for finding in hub.hub()] == ["ok", "optional"]


def test_a_check_that_cannot_run_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ModuleNotFoundError("no torch", name="torch.cuda")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (broken, machine.memory))
    first, second = doctor.examine()
    assert (first.part, first.state, first.remedy) == ("broken", "problem", "pip install torch")
    assert second.part == "memory"


def test_every_problem_has_a_command(asks_for: Lie, monkeypatch: pytest.MonkeyPatch) -> None:
    asks_for("torch>=99", 'gradio>=99; extra == "app"', torch="2.13", gradio="6")
    pretend_backend(monkeypatch, False)
    for finding in doctor.examine():
        assert bool(finding.remedy) == (finding.state != "ok"), finding
