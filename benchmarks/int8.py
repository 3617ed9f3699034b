"""What codebooks rounded to bytes (`VPTQ_CPU_CODEBOOK=int8`) cost in perplexity.

    python benchmarks/int8.py DIR... --text test.txt [--windows 20] [--json FILE]

The kernel rounds each coordinate of a codebook to 255 steps of its own size, and does so for single tokens only. Here
the same rounding is applied to the codebooks of the loaded model (in float32, which holds the rounded entries exactly),
so that whole windows can be scored at once. The input's rounding to sixteen bits, a hundred times finer, is left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vptq
from vptq.linear import Codebook, VQuantLinear
from vptq.quantize.report import load_report
from vptq.shards import write_json
from vptq.source import load_tokenizer


def rounded(codebook: Tensor, vector_len: int) -> Tensor:
    """Each codebook's entries [G, K * v], every coordinate to 127 steps either way."""
    entries = codebook.view(codebook.shape[0], -1, vector_len)
    scale = entries.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    return ((entries / scale).round() * scale).view_as(codebook)


def round_codebooks(model: Any) -> None:
    """Rounds what the kernel would: codebooks of up to 4096 entries of up to 8 coordinates."""
    for layer in model.modules():
        if isinstance(layer, VQuantLinear):
            books = [child for child in layer.children() if isinstance(child, Codebook)]
            assert layer.config.vector_len <= 8, "the kernel leaves longer vectors exact"
            assert max(book.weight.shape[1] for book in books) <= 4096 * layer.config.vector_len, "nor larger codebooks"
            for book in books:
                book.weight.data = rounded(book.weight.data, layer.config.vector_len)


def measure(folder: Path, text: Path, windows: int) -> dict[str, Any]:
    model = vptq.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    report = load_report(folder)
    options: dict[str, Any] = {"tokenizer": load_tokenizer(folder), "text": str(text), "windows": windows}
    exact = vptq.evaluate(model, **options).perplexity
    round_codebooks(model)
    in_bytes = vptq.evaluate(model, **options).perplexity
    row = {
        "spec": report.spec if report else folder.name,
        "bits_per_weight": report.bits_per_weight if report else None,
        "exact_perplexity": exact,
        "int8_perplexity": in_bytes,
        "change": in_bytes / exact - 1,
    }
    print(f"{row['spec']:16} {exact:.4f} exact, {in_bytes:.4f} in bytes: {row['change']:+.3%}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [measure(folder, arguments.text, arguments.windows) for folder in arguments.folders]
    result = {"benchmark": "int8", "windows": arguments.windows, "rows": rows}
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
