"""README.md of a quantized folder: what it is, what it was made from and how, what it measures, how to load it.

The card is derived from the report, so it says nothing the report does not know. The license is the original's:
`vptq push` asks the hub for its name, and a card without one names the original and leaves the license to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vptq.errors import CheckpointError
from vptq.quantize.report import Report
from vptq.spec import QuantSpec

NAME = "README.md"
HESSIANS_OF = {
    "both": "the original and the quantized model",
    "quantized": "the quantized model",
    "original": "the original model",
}


def model_card(
    report: Report,
    base_model: str | None = None,
    measured: Mapping[str, str] | None = None,
    license: str = "",
    bits_per_weight: float | None = None,
) -> str:
    """Write the card of a quantized model.

    Args:
        report: The run that made it.
        base_model: Hub id of the original; None when it has none that a reader could follow.
        measured: Further figures, what -> how much, such as {"perplexity (wikitext2)": "23.1"}.
        license: Name of the original's license on the hub, such as "apache-2.0"; empty where it is not known.
        bits_per_weight: As counted from the tensors; None for what the report says.

    Returns:
        Markdown with the hub's front matter.
    """
    bits = report.bits_per_weight if bits_per_weight is None else bits_per_weight
    sections = [
        _front_matter(base_model, license),
        f"# {report.model}, {bits:.2f} bits per weight\n",
        _introduction(report, base_model, license, bits),
        _how_made(report),
        _figures(report, measured or {}),
        _how_to_load(),
    ]
    return "\n".join(sections)


def save_card(
    report: Report, folder: Path, base_model: str | None = None, measured: Mapping[str, str] | None = None
) -> None:
    """Write `model_card` to README.md of a folder, replacing the one that is there.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    partial = folder / f"{NAME}.partial"
    try:
        partial.write_text(model_card(report, base_model, measured), encoding="utf-8")
        partial.replace(folder / NAME)
    except OSError as error:
        raise CheckpointError(f"cannot write the model card to {folder}: {error.strerror}") from error


def _front_matter(base_model: str | None, license: str) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- vptq", "- quantized"]
    if base_model is not None:
        lines += [f"base_model: {base_model}", "base_model_relation: quantized"]
    lines += [f"license: {license}"] if license else []
    return "\n".join([*lines, "---", ""])


def _introduction(report: Report, base_model: str | None, license: str, bits: float) -> str:
    original = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else report.model
    what = "linear layers and its output head" if report.lm_head else "linear layers"
    return (
        f"{original} with its {what} quantized by vector post-training quantization (VPTQ) to "
        f"**{bits:.3f} bits per weight**: every stored bit of those layers, codebooks and scales "
        f"included, over their weights. The license is that of the original{f', {license}' if license else ''}.\n"
    )


def _how_made(report: Report) -> str:
    rows = {
        **(_one_spec(report.spec) if not report.budget else _planned(report)),
        **({"output head": f"quantized too, `{report.lm_head}`"} if report.lm_head else {}),
        "calibration": report.calibration,
        **({"Hessians of inputs in": HESSIANS_OF[report.hessian_inputs]} if report.hessian_inputs else {}),
        **({"finetuning": _finetuning(report.finetuning)} if report.finetuning else {}),
        **({"rotations": "of the residual stream and the heads, folded into the weights"} if report.rotated else {}),
        "seed": str(report.seed),
    }
    again = f"\nThe same again, from the same model and text:\n\n```sh\n{report.command}\n```\n"
    return "## How it was made\n\n" + _table(rows) + (again if report.command else "")


def _planned(report: Report) -> dict[str, str]:
    return {
        "budget": f"{report.budget}, given to the layers by their measured sensitivity",
        "specs": ", ".join(f"`{spec}` ({count} layers)" for count, spec in _counted(report.spec)),
    }


def _counted(summary: str) -> Iterator[tuple[str, str]]:
    """("90", "v8-k256-256"), ... of a plan's summary."""
    for part in summary.split(", "):
        count, _, spec = part.partition(" x ")
        yield count, spec


def _one_spec(name: str) -> dict[str, str]:
    spec = QuantSpec.parse(name)
    residual = f", then {spec.num_residual_centroids} residual centroids" if spec.num_residual_centroids else ""
    return {
        "spec": f"`{name}`",
        "vectors": f"{spec.vector_len} weights, {spec.num_centroids} centroids{residual}",
        "index bits per weight": f"{spec.index_bits_per_weight:.3f}",
        "column groups": str(spec.num_groups),
        "outlier columns": _outliers(spec),
    }


def _outliers(spec: QuantSpec) -> str:
    if not spec.outlier_num_centroids:
        return "none"
    return (
        f"{spec.outlier_percent:g}% of the columns, in vectors of {spec.outlier_vector_len} weights, "
        f"{spec.outlier_num_centroids} centroids"
    )


def _finetuning(done: Mapping[str, Any]) -> str:
    moved = f"; {done['moved']:,} vectors got other indices" if done.get("moved") else ""
    return (
        f"end to end, {done['steps']} steps on {done['sequences']} sequences: KL to the original on held-out text "
        f"{done['before']:.4f} before, {done['after']:.4f} after{moved}"
    )


def _figures(report: Report, measured: Mapping[str, str]) -> str:
    share = report.quantized_weights / report.total_weights if report.total_weights else math.nan
    rows = {
        "quantized layers": str(len(report.layers)),
        "quantized weights": f"{report.quantized_weights:,} of {report.total_weights:,} ({share:.1%})",
    }
    if report.layers:
        worst = max(report.layers, key=lambda layer: layer.loss)
        rows["mean proxy loss"] = f"{report.mean_loss:.3%}"
        rows["largest proxy loss"] = f"{worst.loss:.3%} ({worst.name})"
    rows |= {"quantized in": _duration(report.seconds), **measured}
    warnings = "".join(f"- {warning}\n" for warning in report.warnings)
    note = (
        "\nProxy loss is tr(E H E^T) / tr(W H W^T): the output energy of a layer's error, over that of its weights, "
        "on the calibration text. Per layer: report.json and report.png.\n"
    )
    return "## Figures\n\n" + _table(rows) + note + (f"\nWarnings of the run:\n\n{warnings}" if warnings else "")


def _how_to_load() -> str:
    return (
        "## How to load it\n\n"
        "```python\n"
        "import vptq, transformers  # pip install vptq\n\n"
        'folder = "."  # this folder, or its name on the hub\n'
        "tokenizer = transformers.AutoTokenizer.from_pretrained(folder)\n"
        'model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="auto")\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))\n"
        "```\n\n"
        "Or talk to it: `python -m vptq --model . --chat`.\n"
    )


def _table(rows: Mapping[str, str]) -> str:
    cells = ((what, value.replace("|", "\\|").replace("\n", " ")) for what, value in rows.items())
    return "| | |\n|---|---|\n" + "".join(f"| {what} | {value} |\n" for what, value in cells)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
