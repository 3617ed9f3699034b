"""Generating text on a CPU: whole models through transformers' generate, quantized beside original.

    python benchmarks/decode.py DIR [--original MODEL] [--threads 2] [--tokens 48] [--rounds 5] [--json FILE]
    python benchmarks/decode.py --synthetic v8-k4096    # four blocks of Llama-2-7B's shapes, random weights

Both models generate greedily with a static cache, alternating, in bfloat16; a round's figure is tokens/s over all new
tokens but the first, so that the prompt does not count. Medians over rounds, one line of JSON last. "in linear layers"
is the share of a step's time in the linear layers' operator (vptq::linear or aten::linear), which is what a kernel can
change; the rest is attention, norms, the output head and Python. Memory is what a fresh process holds after loading the
model and generating two tokens, less what it held after doing the same with a tiny model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vptq
from vptq.quantize.report import load_report
from vptq.shards import write_json
from vptq.spec import QuantSpec

MEMORY = """
import sys, torch, transformers, vptq, vptq.linear
from vptq.integrations import transformers as _
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
tiny = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=16
)
prompt = torch.ones(1, 4, dtype=torch.long)
transformers.LlamaForCausalLM(tiny).generate(prompt, max_new_tokens=2, do_sample=False)
before = resident()
model = vptq.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.inference_mode():
    model.generate(prompt, max_new_tokens=2, do_sample=False)
print(resident() - before)
"""


def generate_seconds(model: Any, tokens: int) -> float:
    """Seconds of one generate call of this many new tokens."""
    prompt = torch.arange(1, 17)[None]
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, cache_implementation="static", disable_compile=True, pad_token_id=0,
        )  # fmt: skip
    return time.perf_counter() - began


def speeds(models: dict[str, Any], tokens: int, rounds: int) -> dict[str, float]:
    """Median tokens/s of each model, without the prompt's share, in alternating rounds."""
    found: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            rate = (tokens - 1) / (generate_seconds(model, tokens) - generate_seconds(model, 1))
            if number:  # the first warms up
                found[name].append(rate)
    return {name: statistics.median(rates) for name, rates in found.items()}


def share_in_linear(model: Any, operator: str) -> float:
    """Share of the time of eight decoding steps in one operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        generate_seconds(model, 8)
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return float(sum(event.cpu_time_total for event in events if event.key == operator) / total)


def synthetic(spec: QuantSpec | None, blocks: int = 4) -> Any:
    """A Llama of 7B's layer shapes with random weights, quantized or (without a spec) dense."""
    from kernel import random_layer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=1024, max_position_embeddings=256, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta" if spec else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if spec is None:
        return model.eval()
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, random_layer(spec.for_layer(child.in_features, child.out_features, False)))
    rotary = type(model.model.rotary_emb)(config)
    for parameter_name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = parameter_name.rpartition(".")
            value = torch.full(parameter.shape, 0.02, dtype=torch.bfloat16)
            model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    model.model.rotary_emb = rotary
    return model.eval()


def memory(folder: Path) -> int:
    ended = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, check=True)
    return int(ended.stdout.split()[-1])


def files(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def whole_model(arguments: argparse.Namespace) -> dict[str, Any]:
    models = {"quantized": vptq.AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.bfloat16).eval()}
    if arguments.original:
        models["original"] = vptq.AutoModelForCausalLM.from_pretrained(arguments.original, dtype=torch.bfloat16).eval()
    report = load_report(arguments.folder)
    result = {
        "model": f"{report.model} at {report.spec}" if report else arguments.folder.name,
        **measured(models, arguments),
    }
    return result | {"file_bytes": files(arguments.folder), "loaded_bytes": memory(arguments.folder)}


def measured(models: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    rates = speeds(models, arguments.tokens, arguments.rounds)
    found: dict[str, Any] = {f"{name}_tokens_per_second": rate for name, rate in rates.items()}
    if "original" in rates:
        found["times_original"] = rates["quantized"] / rates["original"]
        found["original_share_in_linear"] = share_in_linear(models["original"], "aten::linear")
    found["quantized_share_in_linear"] = share_in_linear(models["quantized"], "vptq::linear")
    return found


def merge(row: dict[str, Any], path: Path) -> None:
    """Adds a row to the results, in place of an earlier one of the same model and threads."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [other for other in rows if (other["model"], other["threads"]) != (row["model"], row["threads"])]
    rows = sorted([*rows, row], key=lambda other: (other["model"], other["threads"]))
    write_json(path, {"benchmark": "decode", "rows": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="a quantized model")
    parser.add_argument("--original", help="the model it was made from")
    parser.add_argument("--synthetic", metavar="SPEC", help="four 7B-shaped blocks with random weights instead")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.folder is None) == (arguments.synthetic is None):
        parser.error("give a quantized model's folder, or --synthetic SPEC")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    if arguments.synthetic:
        models = {"quantized": synthetic(QuantSpec.parse(arguments.synthetic)), "original": synthetic(None)}
        result = {"model": f"4 blocks of 7B, {arguments.synthetic}", **measured(models, arguments)}
    else:
        result = whole_model(arguments)
    result = {"benchmark": "decode", "threads": arguments.threads, "torch": torch.__version__, **result}
    for key, value in result.items():
        print(f"{key:32} {value:.3f}" if isinstance(value, float) else f"{key:32} {value}")
    if arguments.json:
        merge(result, arguments.json)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
