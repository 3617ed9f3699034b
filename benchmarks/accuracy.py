"""What quantizing costs in accuracy: the rows of benchmarks/results/smollm2.json, beside the published algorithm's.

    python benchmarks/accuracy.py --collect HESSIANS --original MODEL --text valid.txt --sequences 64
    vptq quantize MODEL -o DIR --spec v4-k256 --hessian-dir HESSIANS
    vptq eval DIR --reference MODEL --text test.txt --windows 20 --json DIR.json
    python benchmarks/accuracy.py DIR... --original MODEL --hessians HESSIANS

The proxy loss of a layer is tr(E H E^T) / tr(W H W^T). E = W - W_hat comes from what is stored, read back and decoded
by the reference implementation; H is the original model's, whatever Hessians the layer was quantized with. So the
figure says nothing about the solver's own bookkeeping, and folders made in different ways compare. Perplexity and
divergence are taken from DIR.json. A row is known by its command: measuring it again replaces it, others stay.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from calibrated import Moments, calibrated
from torch import Tensor

from vptq.checkpoint import Checkpoint, staged_folder, write_json
from vptq.errors import VPTQError
from vptq.quantize.hessian import COMMUNITY_TAGS, load_hessian
from vptq.quantize.report import Report, load_report
from vptq.quantize.setup import HESSIAN_INPUTS
from vptq.quantize.weights import WeightFiles
from vptq.reference import dequantize
from vptq.spec import QuantSpec

RESULTS = Path(__file__).parent / "results" / "smollm2.json"

TUTORIAL = ("published_perplexity", "published_proxy_loss")
WITHOUT_NORM = ("published_perplexity_without_norm", "published_proxy_loss_without_norm")
# The published algorithm run faithfully on a CPU on the same text, with its tutorial's settings (norm and perm on) and
# without its normalization, which hurts it; issue 2, section 4, says how.
PUBLISHED = {
    "v4-k256": dict(zip(TUTORIAL + WITHOUT_NORM, (92.4, 0.0382, 47.9, 0.0289), strict=True)),
    "v8-k256-256": dict(zip(TUTORIAL + WITHOUT_NORM, (68.3, 0.0390, 48.3, 0.0303), strict=True)),
    "v6-k4096": dict(zip(TUTORIAL, (39.7, 0.0253), strict=True)),
    "v4-k64-64": dict(zip(WITHOUT_NORM, (27.4, 0.0127), strict=True)),
    "v8-k4096-4096": dict(zip(TUTORIAL, (22.5, 0.0073), strict=True)),
}


def collect(model: str, text: Path, sequences: int, seqlen: int, folder: Path) -> None:
    """Writes the original model's Hessians on a text in the QuIP#/VPTQ community layout."""
    with calibrated(model, text, sequences, seqlen) as original, staged_folder(folder) as staging:
        blocks = len(original.skeleton.blocks)
        for index in range(blocks):
            save_moments(original.moments(index), index, staging)
            print(f"block {index + 1} of {blocks}", flush=True)


def save_moments(moments: Moments, block: int, folder: Path) -> None:
    """One file `{block}_{tag}.pt` for each input of a block.

    The layout splits E[x x^T] into covariance and mean, and every reader adds mean mean^T back. A mean of zero with the
    whole second moment in the covariance's place is the same to all of them, and loses no digits to the subtraction.
    """
    seen: dict[str, tuple[str, ...]] = {}
    for group, moment in moments:
        rows, columns = torch.tril_indices(group.features, group.features)
        stored = {
            "flatH": moment.hessian()[rows, columns].cpu(),
            "mu": torch.zeros(group.features),
            "n": group.features,
            "ct": moment.tokens,
        }
        tails = [name.rpartition(".")[2] for name in group.names]
        for tag in dict.fromkeys(COMMUNITY_TAGS.get(tail, tail) for tail in tails):
            if tag in seen:
                sys.exit(f"block {block}: {group.names[0]} and {seen[tag][0]} would share one file {block}_{tag}.pt")
            seen[tag] = group.names
            torch.save(stored, folder / f"{block}_{tag}.pt")


def proxy_losses(folder: Path, original: WeightFiles, hessians: Path) -> tuple[dict[str, float], float]:
    """The proxy loss of every quantized layer by its path, and the true bits per weight of all."""
    checkpoint = Checkpoint.open(folder)
    layers = checkpoint.layers()

    @lru_cache(maxsize=8)
    def hessian(block: int, tag: str, features: int) -> Tensor:
        return load_hessian(hessians, block, [tag], features)

    losses = {}
    for path, config in layers.items():
        stored = checkpoint.load_layer(path)
        decoded = dequantize(stored.config, stored.to_tensors(stored.codebook.dtype)).float()
        weight = original.load(f"{path}.weight").float()
        tail = path.rpartition(".")[2]
        moment = hessian(block_of(path), COMMUNITY_TAGS.get(tail, tail), config.in_features)
        losses[path] = energy(weight - decoded, moment) / energy(weight, moment)
    weights = sum(config.in_features * config.out_features for config in layers.values())
    return losses, sum(config.stored_bits for config in layers.values()) / weights


def energy(weight: Tensor, hessian: Tensor) -> float:
    """tr(W H W^T)."""
    return float((weight * (weight @ hessian)).sum(dtype=torch.float64))


def block_of(path: str) -> int:
    """The number in a module path such as model.layers.7.mlp.up_proj: that of its decoder block."""
    return next(int(part) for part in path.split(".") if part.isdigit())


def command_of(report: Report, hessian_inputs: str) -> str:
    """What would make this folder again, with the reader's own names for model and folders."""
    words = ["vptq quantize MODEL -o DIR --spec", report.spec]
    norm = all(layer.entry["enable_norm"] for layer in report.layers)
    if norm != QuantSpec.parse(report.spec).enable_norm:
        words.append("--norm" if norm else "--no-norm")
    text = re.fullmatch(r"(\d+) x (\d+) tokens of (.+)", report.calibration)
    if report.calibration.startswith("Hessian files"):
        words.append("--hessian-dir HESSIANS")
    else:
        words.append(f"--hessian-inputs {hessian_inputs}")
        if text:
            sequences = int(text[1]) - report.finetuning.get("held_out", 0)
            words.append(f"--calibration {text[3]} --sequences {sequences} --seqlen {text[2]}")
    if finetuning_of(report) != "none":
        words.append(f"--finetune {finetuning_of(report)}")
    return " ".join(words) + (f" --seed {report.seed}" if report.seed else "")


def finetuning_of(report: Report) -> str:
    """The value of --finetune that the run had."""
    return {(False, False): "none", (True, False): "block", (False, True): "e2e", (True, True): "both"}[
        bool(report.block_finetuning), bool(report.finetuning)
    ]


def row(folder: Path, original: WeightFiles, hessians: Path, hessian_inputs: str | None) -> dict[str, Any]:
    """One line of the table."""
    report = load_report(folder)
    if report is None:
        sys.exit(f"{folder} has no report.json, which says its spec; quantize it again")
    from_files = report.calibration.startswith("Hessian files")
    inputs = report.hessian_inputs or hessian_inputs or ("original" if from_files else "both")
    losses, bits = proxy_losses(folder, original, hessians)
    mean = sum(losses.values()) / len(losses)
    worst = max(losses, key=lambda path: losses[path])
    print(
        f"{folder.name}: {report.spec}, {bits:.4f} bits, mean proxy loss {mean:.4%} over {len(losses)} layers"
        f" (the solver said {report.mean_loss:.4%}), worst {worst} {losses[worst]:.2%}"
    )
    return {
        "spec": report.spec,
        "bits_per_weight": bits,
        **evaluated(folder.with_name(f"{folder.name}.json")),
        "proxy_loss": mean,
        "seconds": report.seconds,
        **PUBLISHED.get(report.spec, {}),
        "hessian_inputs": inputs,
        "finetune": finetuning_of(report),
        "command": command_of(report, inputs),
    }


def evaluated(path: Path) -> dict[str, float | None]:
    """Perplexity and divergence that `vptq eval --json` wrote; nothing, and a line about it, where it did not."""
    if not path.is_file():
        print(f"{path} is missing: no perplexity; make it with vptq eval --json")
        return {"perplexity": None, "divergence": None}
    figures = json.loads(path.read_text())
    return {"perplexity": figures["perplexity"], "divergence": figures["kl_divergence"]}


def original_row(path: Path, original: WeightFiles) -> dict[str, Any]:
    """The unquantized model, from its own `vptq eval --json`."""
    widest = max((original.load(name) for name in original), key=lambda tensor: tensor.numel())
    perplexity = evaluated(path)["perplexity"]
    bits = 8.0 * widest.element_size()
    return {"spec": "original", "bits_per_weight": bits, "perplexity": perplexity, "command": "vptq eval MODEL"}


def merge(rows: Iterable[dict[str, Any]], results: Path) -> None:
    """Replaces the rows of the same command, keeps the others, smallest first."""
    kept = json.loads(results.read_text())["rows"] if results.is_file() else []
    by_command = {entry["command"]: entry for entry in [*kept, *rows]}
    ordered = sorted(by_command.values(), key=lambda entry: (entry["bits_per_weight"], entry["command"]))
    results.parent.mkdir(parents=True, exist_ok=True)
    write_json(results, {"benchmark": "accuracy", "rows": ordered})
    print(f"{results}: {len(ordered)} rows; python docs/tables.py shows them in the README")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", metavar="DIR", help="quantized folders")
    parser.add_argument("--original", required=True, help="the original model; a folder of safetensors for losses")
    parser.add_argument("--hessians", type=Path, help="the original model's Hessians, as --collect writes them")
    parser.add_argument("--hessian-inputs", choices=HESSIAN_INPUTS, help="for folders whose reports do not say")
    parser.add_argument("--baseline", type=Path, help="JSON of vptq eval of the original, for a row of its own")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the rows go (results/smollm2.json)")
    parser.add_argument("--collect", type=Path, metavar="OUT_DIR", help="write the original's Hessians here instead")
    parser.add_argument("--text", type=Path, help="calibration text for --collect")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.collect and not arguments.text:
        parser.error("--collect needs --text FILE")
    if not arguments.collect and not (arguments.folders and arguments.hessians) and not arguments.baseline:
        parser.error("give quantized folders and --hessians, or --collect OUT_DIR")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.collect:
            collect(arguments.original, arguments.text, arguments.sequences, arguments.seqlen, arguments.collect)
            return
        original = WeightFiles(Path(arguments.original))
        rows = [row(f, original, arguments.hessians, arguments.hessian_inputs) for f in arguments.folders]
        if arguments.baseline:
            rows.append(original_row(arguments.baseline, original))
        merge(rows, arguments.json)
    except VPTQError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
