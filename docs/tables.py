"""Write the tables of README.md and the docs from benchmarks/results and the program, or check that they are current.

    python docs/tables.py [--check]

A figure there that no committed result file holds is one that nobody can trace; so none is typed by hand.
A table stands between `<!-- table NAME -->` and `<!-- end -->`, and shows the "rows" of NAME.json: objects with the
keys of its columns, of which any may be absent (a row for the unquantized model has no proxy loss). Tables named gpu_*
come from benchmarks/gpu_tables.py, which sets what a model predicts beside what was measured. `options.py` and
`sizes.py` say what stands behind `<!-- options ... -->` and `<!-- sizes ... -->`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import options
import sizes
from grid import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Column:
    """A heading, the key of the row it shows, and how to format it."""

    heading: str
    key: str
    form: str = "{}"

    def cell(self, row: dict[str, Any]) -> str:
        """The row's value as text; a dash where it was not measured."""
        value = row.get(self.key)
        return "-" if value is None else self.form.format(value)


KERNEL = (
    Column("config", "config", "`{}`"),
    Column("tokens/s of a 7B's linear layers", "tokens_per_second", "{:.2f}"),
    Column("share of the lookup floor", "share_of_floor", "{:.2f}"),
    Column("times dense bfloat16", "times_dense", "{:.2f}"),
    Column("dense tokens/s", "dense_tokens_per_second", "{:.2f}"),
    Column("streaming bound", "streaming_bound_tokens_per_second", "{:.1f}"),
)

TABLES: dict[str, tuple[Column, ...]] = {
    "smollm2": (
        Column("spec", "spec", "`{}`"),
        Column("bits per weight", "bits_per_weight", "{:.2f}"),
        Column("Hessians of", "hessian_inputs"),
        Column("finetuned", "finetune"),
        Column("perplexity", "perplexity", "{:.2f}"),
        Column("KL to the original", "divergence", "{:.3f}"),
        Column("mean proxy loss", "proxy_loss", "{:.2%}"),
        Column("seconds", "seconds", "{:.0f}"),
        Column("published algorithm: perplexity", "published_perplexity", "{:.1f}"),
        Column("its proxy loss", "published_proxy_loss", "{:.2%}"),
        Column("the same without normalization: perplexity", "published_perplexity_without_norm", "{:.1f}"),
        Column("its proxy loss", "published_proxy_loss_without_norm", "{:.2%}"),
    ),
    "curve": (
        Column("budget", "wanted", "{:.2f}"),
        Column("true bits", "bits_per_weight", "{:.3f}"),
        Column("finetuned", "finetune"),
        Column("perplexity, WikiText-2", "test_perplexity", "{:.2f}"),
        Column("KL", "test_divergence", "{:.3f}"),
        Column("other wiki text", "wiki_perplexity", "{:.2f}"),
        Column("KL", "wiki_divergence", "{:.3f}"),
        Column("web text", "c4_perplexity", "{:.2f}"),
        Column("KL", "c4_divergence", "{:.3f}"),
        Column("HellaSwag", "hellaswag", "{:.3f}"),
        Column("PIQA", "piqa", "{:.3f}"),
        Column("ARC-Easy", "arc_easy", "{:.3f}"),
        Column("WinoGrande", "winogrande", "{:.3f}"),
        Column("minutes", "minutes", "{:.0f}"),
        Column("processor minutes", "processor_minutes", "{:.0f}"),
        Column("peak GB", "peak_gb", "{:.2f}"),
    ),
    "curve peers": (
        Column("peer", "peer"),
        Column("true bits", "bits_per_weight", "{:.2f}"),
        Column("perplexity", "perplexity", "{:.1f}"),
        Column("ours at bits", "ours_bits", "{:.2f}"),
        Column("no finetuning", "ours", "{:.1f}"),
        Column("finetuned", "ours_finetuned", "{:.1f}"),
    ),
    "knobs": (
        Column("changed", "knob"),
        Column("true bits", "bits_per_weight", "{:.2f}"),
        Column("perplexity, WikiText-2", "test_perplexity", "{:.2f}"),
        Column("KL", "test_divergence", "{:.3f}"),
        Column("other wiki text", "wiki_perplexity", "{:.2f}"),
        Column("KL", "wiki_divergence", "{:.3f}"),
        Column("web text", "c4_perplexity", "{:.2f}"),
        Column("KL", "c4_divergence", "{:.3f}"),
        Column("minutes", "minutes", "{:.1f}"),
        Column("processor minutes", "processor_minutes", "{:.1f}"),
        Column("peak GB", "peak_gb", "{:.2f}"),
    ),
    "nearest": (
        Column("vectors", "vectors", "{:,}"),
        Column("centroids", "centroids", "{:,}"),
        Column("length", "vector_len"),
        Column("beam", "beam"),
        Column("C++ seconds", "seconds", "{:.4f}"),
        Column("PyTorch seconds", "torch_seconds", "{:.4f}"),
        Column("times faster", "ratio", "{:.1f}"),
        Column("GFLOP/s", "gflops", "{:.0f}"),
    ),
    **dict.fromkeys(("kernel", "kernel_1_thread", "kernel_8_tokens"), KERNEL),
    "decode": (
        Column("model", "model"),
        Column("threads", "threads"),
        Column("tokens/s", "quantized_tokens_per_second", "{:.1f}"),
        Column("original, bfloat16", "original_tokens_per_second", "{:.1f}"),
        Column("times the original", "times_original", "{:.2f}"),
        Column("share of time in linear layers", "quantized_share_in_linear", "{:.0%}"),
        Column("the original's", "original_share_in_linear", "{:.0%}"),
    ),
    "llama_cpp": (
        Column("format", "model", "`{}`"),
        Column("by", "by"),
        Column("bits per weight", "bits_per_weight", "{:.2f}"),
        Column("tokens/s of a 7B's layers", "tokens_per_second", "{:.2f}"),
    ),
    "int8": (
        Column("spec", "spec", "`{}`"),
        Column("bits per weight", "bits_per_weight", "{:.2f}"),
        Column("perplexity, exact", "exact_perplexity", "{:.3f}"),
        Column("codebooks in bytes", "int8_perplexity", "{:.3f}"),
        Column("change", "change", "{:+.2%}"),
    ),
    "serve": (
        Column("requests", "requests"),
        Column("at a time", "concurrency"),
        Column("errors", "errors"),
        Column("lost when told to stop", "lost_while_stopping"),
        Column("tokens/s", "tokens_per_second", "{:.1f}"),
        Column("seconds to the first text, p50", "first_text_p50", "{:.1f}"),
        Column("p95", "first_text_p95", "{:.1f}"),
        Column("to the end, p50", "answer_p50", "{:.1f}"),
        Column("p95", "answer_p95", "{:.1f}"),
    ),
    "first_token": (
        Column("browser", "browser"),
        Column("words of the question", "words"),
        Column("terminal, seconds", "terminal_seconds", "{:.2f}"),
        Column("browser, seconds", "page_seconds", "{:.2f}"),
        Column("browser over terminal", "page_over_terminal", "{:.2f}"),
    ),
    "silence": (
        Column("command", "command", "`{}`"),
        Column("minutes", "minutes", "{:.1f}"),
        Column("silences of more than 5 seconds", "longer"),
    ),
    "calibration": (
        Column("calibration text", "calibration"),
        Column("perplexity", "perplexity", "{:.2f}"),
        Column("KL to the original", "kl_divergence", "{:.3f}"),
        Column("same top token", "same_top_token", "{:.1%}"),
    ),
}


def render(name: str) -> str:
    """The Markdown table of benchmarks/results/NAME.json ("NAME KEY" for another list than "rows"), or of a GPU."""
    if name.startswith("gpu_"):
        return str(gpu_tables().render(name.removeprefix("gpu_")))
    file, _, key = name.partition(" ")
    path = RESULTS / f"{file}.json"
    if not path.exists():
        return f"(`{path.relative_to(ROOT)}` has not been measured yet.)"
    columns = TABLES[name]
    rows = [[column.cell(row) for column in columns] for row in json.loads(path.read_text())[key or "rows"]]
    return table([[column.heading for column in columns], *rows])


def gpu_tables() -> Any:
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("gpu_tables")


def fill(page: str) -> str:
    """A page with its tables rendered anew."""
    makers: dict[str, Callable[[str], str]] = {
        "table": render,
        "sizes": sizes.render,
        "options": lambda words: options.render(words, page),
    }
    return re.sub(
        r"(<!-- (table|sizes|options) (.+?) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{makers[match[2]](match[3])}\n{match[4]}",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tables of README.md and the docs.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a table is out of date")
    check = parser.parse_args().check
    try:
        pages = {page: fill(page.read_text()) for page in PAGES}
    except ValueError as error:
        sys.exit(f"docs: {error}")
    for page, current in pages.items():
        if current == page.read_text():
            continue
        if check:
            sys.exit(f"{page.relative_to(ROOT)} has tables that are out of date; run python docs/tables.py")
        page.write_text(current)
        print(f"wrote the tables of {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
