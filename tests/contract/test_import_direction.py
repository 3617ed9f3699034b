"""Imports run one way (docs/architecture.md): a module imports from its own rank or a lower one, never a higher."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "vptq"

RANKS = (
    ("errors", "progress", "extras"),
    ("config", "entry"),
    ("spec",),
    ("packing", "weight", "reference"),
    ("ops",),
    ("linear", "shared_input", "shards", "checkpoint", "index_use", "naming"),
    ("text", "transformers_versions", "kv_cache", "source", "download", "sampling", "streaming"),
    ("quantize",),
    ("model",),
    ("integrations",),
    ("conversation", "generation", "engine"),
    ("evaluate", "publish", "doctor"),
    ("serve", "cli", "app", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
# What a running model needs. It must work where the quantizer's dependencies and its time to import are not wanted.
INFERENCE = ("errors", "extras", "config", "entry", "packing", "weight", "ops", "linear", "shared_input", "shards",
             "checkpoint", "transformers_versions", "source", "model", "integrations", "sampling", "streaming",
             "progress", "download", "kv_cache",
             "conversation", "generation", "engine", "serve")  # fmt: skip
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def part_of(module: str) -> str:
    """The name under vptq that a module belongs to: vptq.ops.dense is of "ops"."""
    return module.split(".")[1]


def module_of(path: Path) -> str:
    return ".".join(("vptq", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imported_modules(source: str) -> Iterator[str]:
    """Modules of this package that a source imports, wherever in the file, except for annotations only."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("vptq."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            if node.module == "vptq":
                yield from (f"vptq.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
            elif (node.module or "").startswith("vptq."):
                yield str(node.module)


def test_the_walker_sees_every_kind_of_import() -> None:
    source = """
if TYPE_CHECKING:
    from vptq.app import unseen
import vptq.ops.dense, os
def later():
    from vptq import linear, __version__
    from vptq.cli.info import show
"""
    assert sorted(imported_modules(source)) == ["vptq.cli.info", "vptq.linear", "vptq.ops.dense"]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_run_one_way(path: Path) -> None:
    own = part_of(module_of(path))
    assert own in RANK, f"{own} has no rank yet: give it one here and in docs/architecture.md"
    for module in imported_modules(path.read_text()):
        other = part_of(module)
        if other == "_C":
            assert own == "ops", "only vptq.ops knows that there is an extension"
            continue
        assert other in RANK, f"{module_of(path)} imports {module}, which has no rank"
        assert RANK[other] <= RANK[own], f"{module_of(path)} imports {module}, which comes after it"
        assert own not in INFERENCE or other != "quantize", f"{module_of(path)} runs models and must not quantize"
