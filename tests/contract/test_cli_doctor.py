"""`vptq doctor` prints findings, writes them down, and says by its exit status whether something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vptq import doctor
from vptq.doctor import Finding

Run = Callable[..., tuple[int, str, str]]
FINDINGS = (
    Finding("torch", "ok", "2.13.0"),
    Finding("extra app", "optional", "web chat: no gradio", "pip install 'vptq[app]'"),
    Finding("typer", "problem", "not installed", "pip install 'typer>=0.15'"),
)


@pytest.mark.parametrize(("count", "status", "summary"), [(2, 0, "no problems"), (3, 1, "1 problem")])
def test_only_problems_fail(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int, status: int, summary: str
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda reach_hub: iter(FINDINGS[:count]))
    found, out, err = run("doctor", "--json", tmp_path / "findings.json")
    assert (found, err) == (status, "")
    assert out.splitlines()[-1] == summary
    assert "$ pip install 'vptq[app]'" in out, "commands stand alone, to be copied"
    written = json.loads((tmp_path / "findings.json").read_text())
    assert written["problems"] == status
    assert [Finding(**each) for each in written["findings"]] == list(FINDINGS[:count])


def test_a_long_finding_stays_on_its_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(doctor, "examine", lambda reach_hub: iter([Finding("part", "problem", "x" * 90, "y " * 60)]))
    _, out, _ = run("doctor")
    assert out.splitlines()[0].endswith("x" * 90)
    assert out.splitlines()[1].strip() == "$ " + ("y " * 60).strip()


def test_it_looks_at_this_installation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, out, err = run("doctor")
    assert err == ""
    parts = [line[10:30].strip() for line in out.splitlines() if line.startswith(("ok", "optional", "problem"))]
    for part in ("python", "torch", "transformers", "loading", "C++ kernels", "GPU", "extra app", "cache", "memory"):
        assert part in parts, f"{part} was not looked at"
    assert "hub" not in parts, "the network is used only with --hub"
