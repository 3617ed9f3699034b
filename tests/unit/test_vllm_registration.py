"""vLLM finds the plugin by an entry point, and nothing of it is in anybody's way; vLLM itself is not needed here."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from vptq import integrations

ROOT = Path(__file__).parents[2]


def test_the_entry_point_names_a_function_that_is_there() -> None:
    section = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."vllm.general_plugins"]')[2]
    stated = re.match(r'\s*vptq = "([\w.]+):(\w+)"', section)
    assert stated is not None
    assert stated[1] == integrations.__name__
    assert callable(getattr(integrations, stated[2]))


def test_neither_the_package_nor_the_entry_point_s_module_imports_vllm() -> None:
    code = "import sys, vptq.integrations; print({'vllm', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "set()\n"


def test_a_vllm_that_does_not_fit_is_told_of_and_not_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every start of vLLM calls this, for whatever model."""
    monkeypatch.setitem(sys.modules, "vllm.config", None)
    monkeypatch.delitem(sys.modules, "vptq.integrations.vllm", raising=False)
    with pytest.warns(UserWarning, match="vptq cannot register with this version of vllm .*vllm"):
        integrations.register_with_vllm()


def test_registering_again_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vptq.integrations.vllm", ModuleType("vptq.integrations.vllm"))
    with warnings.catch_warnings(action="error"):
        integrations.register_with_vllm()
        integrations.register_with_vllm()
