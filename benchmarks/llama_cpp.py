"""Beside llama.cpp: single tokens through Llama-2-7B's layer shapes, by this package and by llama.cpp's own benchmark.

    python benchmarks/llama_cpp.py BIN [--specs v8-k4096,...] [--types Q4_0,Q2_K,...] [--threads 2] [--json FILE]

BIN is a folder with llama-bench and llama-quantize. One decoder block with random weights is written as a GGUF file and
quantized by llama.cpp to each of its types, then repeated four times; the same four blocks run here through
transformers' generate (benchmarks/decode.py --synthetic). Both have an output head of 1024 tokens, so that layers are
all that counts. Round by round every model generates the same number of tokens; figures are medians, as tokens/s of 32
blocks. Bits are those of the blocks' linear layers. Where llama.cpp asks for an importance matrix it gets one of ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from decode import generate_seconds, synthetic

from vptq.linear import VQuantLinear
from vptq.shards import write_json
from vptq.spec import QuantSpec

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY, BLOCKS, WHOLE = 4096, 11008, 32, 1024, 4, 32
SPECS = "v8-k4096,v6-k4096,v8-k256-256,v8-k65536,v4-k256,v8-k4096/int8,v4-k256/int8"
TYPES = "Q4_0,Q2_K,IQ3_XXS,IQ2_XS,IQ2_XXS"
LINEARS = {
    **{f"attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")},
    **{"ffn_gate": (INTERMEDIATE, HIDDEN), "ffn_up": (INTERMEDIATE, HIDDEN), "ffn_down": (HIDDEN, INTERMEDIATE)},
}


def new_file(path: Path, blocks: int) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(blocks)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    return writer


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_one_block(path: Path) -> None:
    draw = np.random.default_rng(0)
    writer = new_file(path, 1)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", (draw.standard_normal((VOCABULARY, HIDDEN)) * 0.02).astype(np.float16))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    for name, shape in LINEARS.items():
        writer.add_tensor(f"blk.0.{name}.weight", (draw.standard_normal(shape) * 0.02).astype(np.float16))
    close(writer)


def write_importance(path: Path) -> None:
    """llama.cpp's older imatrix file: for each tensor its name, number of calls and column weights."""
    content = struct.pack("<i", len(LINEARS))
    for name, (_, columns) in LINEARS.items():
        encoded = f"blk.0.{name}.weight".encode()
        content += struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", 1, columns)
        content += np.ones(columns, dtype=np.float32).tobytes()
    path.write_bytes(content)


def repeat_block(one: Path, path: Path) -> float:
    """Writes the file again with its block `BLOCKS` times; returns the bits per weight of the block's linear layers."""
    reader, writer = gguf.GGUFReader(one), new_file(path, BLOCKS)
    stored = weights = 0
    for tensor in reader.tensors:
        in_block = tensor.name.startswith("blk.0.")
        for block in range(BLOCKS if in_block else 1):
            writer.add_tensor(tensor.name.replace("blk.0.", f"blk.{block}."), tensor.data, raw_dtype=tensor.tensor_type)
        if in_block and "norm" not in tensor.name:
            stored, weights = stored + tensor.n_bytes, weights + int(tensor.n_elements)
    close(writer)
    return 8 * stored / weights


class Theirs:
    """The four blocks in one of llama.cpp's types."""

    def __init__(self, binaries: Path, kind: str, folder: Path, threads: int) -> None:
        self.name, self.binary, self.threads = kind, binaries / "llama-bench", threads
        one, self.path = folder / f"one-{kind}.gguf", folder / f"{kind}.gguf"
        quantize = [binaries / "llama-quantize", "--imatrix", folder / "ones.dat", folder / "one.gguf", one, kind]
        subprocess.run([str(word) for word in quantize], check=True, capture_output=True)
        self.bits = repeat_block(one, self.path)
        one.unlink()

    def rate(self, tokens: int) -> float:
        """Tokens/s of the four blocks."""
        command = [self.binary, "-m", self.path, "-t", self.threads, "-p", 0, "-n", tokens, "-r", 1, "-o", "json"]
        done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
        return float(json.loads(done.stdout)[0]["avg_ts"])


class Ours:
    """The four blocks at a spec, in transformers."""

    def __init__(self, name: str) -> None:
        self.name = name
        spec, _, form = name.partition("/")
        self.model = synthetic(QuantSpec.parse(spec), BLOCKS)
        layers = [module for module in self.model.modules() if isinstance(module, VQuantLinear)]
        for layer in layers:
            layer.codebook_form = form
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        self.bits = sum(layer.config.stored_bits for layer in layers) / weights

    def rate(self, tokens: int) -> float:
        """Tokens/s of the four blocks, without the prompt's share."""
        return (tokens - 1) / (generate_seconds(self.model, tokens) - generate_seconds(self.model, 1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", type=Path, metavar="BIN")
    parser.add_argument("--specs", default=SPECS, help="names of specs; /int8 behind one for codebooks in bytes")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_one_block(folder / "one.gguf")
        write_importance(folder / "ones.dat")
        peers: list[Any] = [
            Theirs(arguments.binaries, kind, folder, arguments.threads) for kind in arguments.types.split(",")
        ]
        models = [*map(Ours, arguments.specs.split(",")), *peers]
        rates: dict[str, list[float]] = {model.name: [] for model in models}
        for number in range(arguments.rounds + 1):
            for model in models:
                rate = model.rate(arguments.tokens) * BLOCKS / WHOLE
                if number:  # the first warms up
                    rates[model.name].append(rate)
    rows = [
        {
            "model": model.name,
            "by": "llama.cpp" if model in peers else "vptq",
            "bits_per_weight": model.bits,
            "tokens_per_second": statistics.median(rates[model.name]),
        }
        for model in models
    ]
    rows.sort(key=lambda row: row["bits_per_weight"])
    for row in rows:
        print(
            f"{row['model']:16} {row['by']:10} {row['bits_per_weight']:.2f} bits {row['tokens_per_second']:.2f} tok/s"
        )
    result = {"benchmark": "llama_cpp", "threads": arguments.threads, "torch": torch.__version__, "rows": rows}
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
