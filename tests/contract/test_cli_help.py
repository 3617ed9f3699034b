"""The help of every command ends with examples that work, and shells can complete what is typed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_lines import parse

from vptq.cli import COMMANDS
from vptq.cli.examples import EXAMPLES

Run = Callable[..., tuple[int, str, str]]


def test_every_command_has_examples_and_nothing_else_has() -> None:
    assert set(EXAMPLES) == {"", *COMMANDS}
    assert all(EXAMPLES.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_ends_with_examples_that_would_run(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(*name.split(), "--help")
    examples = [line.strip() for line in out.partition("\n  Examples:\n")[2].splitlines()]
    assert examples == [example.strip() for example in EXAMPLES[name]], "they are neither wrapped nor followed by more"
    ours = [line for line in examples if "vptq" in line.split()]
    assert ours
    for line in ours:
        words = shlex.split(re.sub(r" 2?[<>] \S+", "", line), comments=True)
        arguments = words[words.index("vptq") + 1 :]
        if arguments != ["--install-completion"]:  # it does its work while it is parsed
            parse(arguments)
        assert not name or arguments[0] == name


def complete(*words: str) -> list[str]:
    """What bash would offer for the last of these words."""
    environment = {"_VPTQ_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", "from vptq.cli import main; main()"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_shells_complete_commands_options_and_their_values() -> None:
    assert complete("vptq", "qu") == ["quantize"]
    assert complete("vptq", "quantize", "--move") == ["--move-indices"]
    assert set(complete("vptq", "quantize", "--hessian-inputs", "")) == {"quantized", "original", "both"}


def test_completion_is_installed_where_bash_looks_for_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from vptq.cli import main; main(['--install-completion', 'bash'])"],
        env={**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert "_VPTQ_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()
