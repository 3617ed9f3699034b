"""What README and docs tell a reader to type exists, and their tables are those of the committed results."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest
from command_lines import parse
from doc_pages import README, ROOT, arguments_of, blocks, shell_lines, words_of

import vptq


def test_the_readme_has_commands_and_python() -> None:
    assert len(shell_lines()) >= 5
    assert any(blocks("python"))


@pytest.mark.parametrize("line", shell_lines())
def test_shell_command_is_understood(line: str) -> None:
    words, _ = words_of(line)
    arguments = arguments_of(words)
    if arguments is not None:
        parse(arguments)
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[:2] == ["vllm", "serve"] or words[:2] == ["python", "-m"]:
        assert words[-1] == "DIR"  # vLLM's own programs, which need nothing but a folder: tests/e2e/test_vllm_engine.py
    elif words[:2] in (["pip", "install"], ["pip", "uninstall"]) or words[0] in ("git", "cd", "ray"):
        return
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        pytest.fail(f"nobody checks commands of {words[0]}")


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match=r"[Nn]o such option"):
        parse(["quantize", "MODEL", "-o", "DIR", "--no-such-option"])


@pytest.mark.parametrize("code", list(blocks("python")))
def test_python_uses_names_that_exist(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "vptq":
            assert node.attr in vptq.__all__
            assert getattr(vptq, node.attr) is not None


def test_file_map_names_files_that_exist() -> None:
    section = README.partition("## Where things are")[2].partition("\n## ")[0]
    paths = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    assert len(paths) >= 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_tables_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs/tables.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_extra_the_readme_names_is_declared() -> None:
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = {extra for group in re.findall(r"\.\[([\w,]+)\]", README) for extra in group.split(",")}
    assert named <= set(declared)
