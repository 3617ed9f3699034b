"""The documentation site holds every page, stays plain Markdown, and keeps up with the program.

Links, anchors and the pages of the navigation are checked by MkDocs itself (`make docs`, a step of .ci/run); here is
what it does not look at, and what should be noticed without it.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
SITE = (ROOT / "mkdocs.yml").read_text()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports docs/NAME.py, as docs/tables.py does."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module


def test_every_page_is_in_the_navigation_once_and_the_changelog_with_them() -> None:
    assert sorted(re.findall(r"^ +- [^:]+: (\S+\.md)$", SITE, re.MULTILINE)) == sorted([*PAGES, "changelog.md"])


def test_the_site_is_built_strictly_and_every_kind_of_broken_link_counts() -> None:
    assert re.search(r"^\t.*mkdocs build --strict$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    validation = SITE.partition("\nvalidation:")[2]
    kinds = dict(re.findall(r"(\w+): (warn|info|ignore)", validation))
    assert {"omitted_files", "not_found", "anchors", "absolute_links", "unrecognized_links"} == kinds.keys()
    assert set(kinds.values()) == {"warn"}
    assert "make docs" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_pages_need_no_site_to_be_read(page: str) -> None:
    """Syntax of MkDocs alone would stand on GitHub as it is written."""
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^(?:!!!|\?\?\?|=== |--8<--).*|\{[:.#][^}]*\}", prose, re.MULTILINE) == []


@pytest.mark.parametrize("page", PAGES)
def test_the_readme_leads_to_every_page(page: str) -> None:
    assert f"(docs/{page}" in (ROOT / "README.md").read_text()


def test_every_environment_variable_of_ours_is_among_the_knobs() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    native = "\n".join(path.read_text() for path in (ROOT / "csrc").iterdir())
    read = set(re.findall(r'(?:environ\b.*|_VARIABLE = |envvar=)"(VPTQ_[A-Z_]+)"', code))
    read |= set(re.findall(r'getenv\("(VPTQ_\w+)"\)', native))
    assert {"VPTQ_BACKEND", "VPTQ_REQUIRE_BACKEND", "VPTQ_TRITON_TUNE", "VPTQ_CPU_ISA", "VPTQ_API_KEY"} <= read
    assert {name for name in read if f"`{name}`" not in (DOCS / "knobs.md").read_text()} == set()


def test_every_option_of_every_command_is_in_a_table_of_the_knobs(script) -> None:
    options = script("options")
    page = (DOCS / "knobs.md").read_text()
    markers = [words.partition(":") for words in re.findall(r"<!-- options (.+?) -->", page)]
    for command in options.COMMANDS:
        shown = [flags.split() for names, _, flags in markers if command in names.split()]
        complete = [] in shown or ["rest"] in shown
        assert complete if shown else ("others", "", "") in markers
        named = [flag for flags in shown for flag in flags]
        assert len(named) == len(set(named)), "an option is in two tables"


def test_the_rest_are_the_options_that_no_other_table_shows(script) -> None:
    options = script("options")
    page = "<!-- options plan: --bits --size --json -->\n<!-- options plan: rest -->"
    table = options.render("plan: rest", page)
    shown = re.findall(r"^\| .*?`(--[\w-]+)`", table, re.MULTILINE)
    assert {"--bits", "--size", "--json", *shown} == options.options_of("plan").keys()
    assert {"--bits", "--size", "--json"}.isdisjoint(shown)


def test_commands_that_the_page_does_not_name_are_shown_all_the_same(script) -> None:
    options = script("options")
    others = "<!-- options others -->"
    table = options.render("others", f"<!-- options quantize: --spec -->\n{others}")
    assert "### vptq serve\n\nServe a model by OpenAI's protocol.\n\n| option | default |" in table
    assert "### vptq quantize" not in table


def test_a_table_of_options_says_default_and_commands(script) -> None:
    table = script("options").render("quantize plan: --norm --spec --output --hessian", "")
    assert "| `--norm`, `--no-norm` | what the spec says | Normalize input columns. | quantize, plan |" in table
    assert re.search(r"\| `--spec` \| 3 index bits, .+ without a budget \| .+ \| quantize \|", table)
    assert "| `-o`, `--output` | required | Folder to write. | quantize |" in table
    assert "| `--hessian` | `plain` |" in table
    with pytest.raises(ValueError, match="--nonsense"):
        script("options").render("quantize: --nonsense", "")


def test_sizes_are_what_the_arithmetic_on_the_page_gives(script) -> None:
    sizes = script("sizes")
    shape = next(shape for shape in sizes.SHAPES if shape.name == "Llama-3.1-70B")
    spec = shape.spec(2.0)
    assert spec.name == "v8-k65536"
    indices, codebooks = 80 * 855_638_016 * 16 // 8 // 8, 80 * 7 * 65_536 * 8 * 2
    columns, others = 80 * 77_824 * 2 * 2, 2 * 128_256 * 8_192 * 2 + 161 * 8_192 * 2
    assert shape.file_bytes(spec) == indices + codebooks + columns + others
    assert f"{indices + codebooks + columns + others:,}" in (DOCS / "choosing.md").read_text()


def test_memory_never_holds_less_when_it_is_larger(script) -> None:
    sizes = script("sizes")
    for shape in sizes.SHAPES:
        found = [sizes._widest(shape, memory * sizes.GIB) for memory in sizes.MEMORIES]
        widths = ["-", *(f"`{shape.spec(bits).name}`" for bits in sizes.WIDTHS), "16 bits"]
        assert [widths.index(spec) for spec in found] == sorted(widths.index(spec) for spec in found)


def test_what_a_browser_would_fetch_from_elsewhere_is_a_warning(script, caplog: pytest.LogCaptureFixture) -> None:
    hooks = script("hooks")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    links = '<a href="https://arxiv.org/abs/2409.17066">x</a><link rel="stylesheet" href="assets/main.css">'
    with caplog.at_level(logging.WARNING, "mkdocs"):
        hooks.on_post_page(links, page, None)
        assert caplog.records == []
        hooks.on_post_page(f'{links}<script defer src="https://cdn.example/x.js"></script>', page, None)
    assert [record.getMessage() for record in caplog.records] == [
        "index.md would make a browser fetch https://cdn.example/x.js"
    ]


def test_a_notebook_becomes_a_page(script) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Words."]},
        {"cell_type": "code", "source": ["import vptq\n", "vptq.__version__"], "outputs": []},
    ]
    page = script("hooks").notebook_page(json.dumps({"cells": cells}))
    assert page == "# Title\n\nWords.\n\n```python\nimport vptq\nvptq.__version__\n```"
