"""Which kernels run: chosen by VPTQ_BACKEND once a process, so each case is a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

REPORT = """
import dataclasses, json, logging, sys
if sys.argv[1] == "without":
    sys.modules["vptq._C"] = None  # importing it fails, as where it was never built
if sys.argv[1] == "without triton":
    import importlib.util
    importlib.util.find_spec = lambda name, found=importlib.util.find_spec: None if name == "triton" else found(name)
from vptq import ops
import torch
caught = []
handler = logging.Handler()
handler.emit = lambda record: caught.append(record.getMessage())
logging.getLogger("vptq").addHandler(handler)
kernel = torch._C._dispatch_has_kernel_for_dispatch_key("vptq::nearest", "CPU")
print(json.dumps({
    "backends": {status.name: dataclasses.asdict(status) for status in ops.backends()},
    "kernel": kernel,
    "quiet": not caught,
    "nearest": [ops.nearest(torch.tensor([[0.9]]), torch.tensor([[0.0], [1.0]]))[0].tolist() for _ in range(2)][1],
    "warnings": caught,
}))
"""


def report(extension: str, backend: str | None, required: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if "VPTQ" not in key and "TRITON" not in key}
    if backend is not None:
        environment["VPTQ_BACKEND"] = backend
    if required is not None:
        environment["VPTQ_REQUIRE_BACKEND"] = required
    command = [sys.executable, "-c", REPORT, extension]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_reference_loads_no_kernels() -> None:
    found = json.loads(report("with", "reference").stdout)
    assert [name for name, status in found["backends"].items() if status["active"]] == ["reference"]
    assert found["backends"]["cpu"]["reason"] == "not loaded: VPTQ_BACKEND=reference"
    assert not found["kernel"]
    assert found["nearest"] == [[1]]
    assert found["warnings"] == []


def test_extension_is_used_when_it_is_there() -> None:
    pytest.importorskip("vptq._C")
    found = json.loads(report("with", None).stdout)
    assert found["backends"]["cpu"]["active"]
    assert "vptq::nearest" in found["backends"]["cpu"]["reason"]
    assert found["kernel"]
    assert found["nearest"] == [[1]]
    assert found["warnings"] == []


def test_missing_extension_is_told_once_with_the_remedy() -> None:
    found = json.loads(report("without", None).stdout)
    assert not found["backends"]["cpu"]["available"]
    assert found["nearest"] == [[1]]
    assert found["quiet"], "importing says nothing"
    assert len(found["warnings"]) == 1
    assert "install a C++ compiler" in found["warnings"][0]


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("fast", "VPTQ_BACKEND is 'fast'; choose one of reference, cpu, triton, or leave it unset"),
        ("cpu", "VPTQ_BACKEND=cpu, but the C++ kernels are not usable"),
        pytest.param(
            "triton",
            "VPTQ_BACKEND=triton, but there is no GPU that this torch can use; TRITON_INTERPRET=1 runs",
            marks=pytest.mark.skipif(torch.cuda.is_available() or not find_spec("triton"), reason="needs no GPU"),
        ),
    ],
)
def test_a_backend_that_cannot_be_used_is_an_error(backend: str, said: str) -> None:
    result = report("without", backend)
    assert result.returncode == 1
    assert f"BackendError: {said}" in result.stderr.splitlines()[-1]


def test_a_missing_triton_is_told_with_the_remedy() -> None:
    said = "BackendError: VPTQ_BACKEND=triton, but Triton is not installed; pip install triton"
    assert said in report("without triton", "triton").stderr.splitlines()[-1]


def test_a_required_backend() -> None:
    pytest.importorskip("vptq._C")
    assert json.loads(report("with", None, required="cpu").stdout)["backends"]["cpu"]["active"]
    for extension, backend, said in (
        ("without", None, "VPTQ_REQUIRE_BACKEND=cpu, but the C++ kernels are not usable"),
        ("with", "reference", "VPTQ_REQUIRE_BACKEND=cpu, but not loaded: VPTQ_BACKEND=reference"),
    ):
        result = report(extension, backend, required="cpu")
        assert result.returncode == 1
        assert f"BackendError: {said}" in result.stderr.splitlines()[-1]
    assert "VPTQ_REQUIRE_BACKEND is 'gpu'" in report("with", None, required="gpu").stderr
