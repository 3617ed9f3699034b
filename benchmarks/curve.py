"""Bits against accuracy: the rows of benchmarks/results/curve.json and the picture docs/accuracy.png.

    python benchmarks/curve.py MODEL --data ../shared/data --work DIR [--bits 2.25 2 2.5] [--stages quantize eval]

Every step is a command a reader could type, and leaves a file or a folder in DIR: what is there is not done again, so
that hours of work may be interrupted (`--resume` is passed on). All budgets go through a stage before the next begins.
Minutes and memory are those of the command's process; a resumed command has no honest minutes, and shows none. Beside
other work minutes say little, so the processor's are noted too. Rows that DIR knows nothing of stay as they were: a
curve may be made in several sittings, and on several machines.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vptq.checkpoint import write_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "curve.json"
PICTURE = ROOT / "docs" / "accuracy.png"
BUDGETS = (2.25, 2.0, 2.5, 3.0, 3.5, 1.5, 1.75, 2.75, 3.25)
STAGES = {
    "quantize": ("quantize", "none"),
    "eval": ("eval", "none"),
    "finetune": ("finetune", "e2e"),
    "eval-finetuned": ("eval", "e2e"),
    "tasks": ("tasks", "none"),
    "tasks-finetuned": ("tasks", "e2e"),
    "both": ("quantize", "both"),
    "eval-both": ("eval", "both"),
    "tasks-both": ("tasks", "both"),
}
"""Name -> what is done, and to which rows by their finetuning."""
SUFFIXES = {"none": "", "e2e": "-finetuned", "both": "-both"}
"""Finetuning -> how the folders of its rows end."""
TEXTS = {"test": "wikitext-2/test.txt", "c4": "calibration/c4_eval.txt", "wiki": "calibration/wiki_eval.txt"}
TASKS = ("hellaswag_local", "piqa_local", "arc_easy_local", "winogrande_local")

PEERS = {
    "llama.cpp IQ": {
        "IQ2_XXS, mixed": (2.09, 175),
        "IQ2_XS": (2.31, 134),
        "IQ2_XS, mixed": (2.33, 80.8),
        "IQ2_S": (2.56, 77.9),
        "IQ2_M, mixed": (2.69, 48.4),
        "IQ3_XXS": (3.06, 31.3),
        "IQ3_S": (3.44, 25.5),
    },
    "llama.cpp K": {"Q2_K": (2.63, 57.2), "Q2_K, mixed": (2.93, 35.5), "Q3_K": (3.44, 25.7)},
    "published VPTQ": {"v4-k256, without its normalization": (2.08, 47.9), "v8-k256-256": (2.20, 68.3)},
    "GPTQ": {"3 bits, groups of 128": (3.18, 61.7)},
}
"""Who -> format -> (true bits, perplexity) of the same layers on the same 20 windows.

The project was given these; this file does not measure them.
"""


@dataclass(frozen=True)
class Row:
    """One folder of the curve: a budget, and what was finetuned (a key of `SUFFIXES`)."""

    work: Path
    bits: float
    finetune: str = "none"

    @property
    def folder(self) -> Path:
        """The quantized model."""
        return self.work / f"{self.bits:g}{SUFFIXES[self.finetune]}"

    def file(self, kind: str) -> Path:
        """What a command has measured of it."""
        return self.folder.with_name(f"{self.folder.name}.{kind}.json")


@dataclass(frozen=True)
class Bench:
    """What every command is given."""

    model: str
    data: Path
    work: Path
    task_dir: Path

    def command(self, step: str, row: Row) -> list[str]:
        """The words after `vptq` that quantize, finetune or measure `row`."""
        text = ["--calibration", str(self.data / "wikitext-2" / "valid.txt"), "--sequences", "64"]
        if step == "quantize":
            training = ["--finetune", row.finetune] if row.finetune != "none" else []
            return ["quantize", self.model, "-o", str(row.folder), "--bits", f"{row.bits:g}", *text, *training]
        if step == "finetune":
            return ["finetune", str(Row(row.work, row.bits).folder), self.model, "-o", str(row.folder), *text]
        return self.measurement(step, str(row.folder), row.file(step))

    def measurement(self, step: str, folder: str, file: Path) -> list[str]:
        """The words after `vptq` that measure a folder: on texts ("eval"), or by zero-shot tasks ("tasks")."""
        if step == "tasks":
            tasks = ["--tasks", ",".join(TASKS), "--task-dir", str(self.task_dir), "--limit", "400"]
            # bfloat16 has twice the speed of float32 here, and 16 requests a pass take 4/5 of the time of 8.
            return ["eval", folder, *tasks, "--dtype", "bfloat16", "--batch-size", "16", "--json", str(file)]
        texts = [word for name in TEXTS.values() for word in ("--text", str(self.data / name))]
        # float32 because it is quicker than bfloat16 on a CPU without AMX; the original's perplexity is 18.51 in both.
        measure = ["--windows", "20", "--dtype", "float32", "--json", str(file)]
        return ["eval", folder, "--reference", self.model, "--remember", *texts, *measure]

    def run(self, step: str, row: Row) -> None:
        """Does a step of a row, unless that is done or what it starts from is missing."""
        makes = row.folder if step in ("quantize", "finetune") else row.file(step)
        needs = Row(row.work, row.bits).folder if step == "finetune" else row.folder
        if makes.exists() or (step != "quantize" and not needs.exists()):
            return
        words = self.command(step, row)
        resumed = makes.with_name(f"{makes.name}.work").exists()
        print(shlex.join(["vptq", *words]), flush=True)
        cost = run_vptq([*words, "--resume"] if resumed else words, self.work / f"{makes.name}.log")
        if step in ("quantize", "finetune"):
            write_json(row.file("cost"), cost if not resumed else {**cost, "minutes": None, "processor_minutes": None})


def run_vptq(words: list[str], log: Path) -> dict[str, Any]:
    """Runs a command to its end; its minutes and the most memory it held, in GB."""
    began = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, "-m", "vptq", *words], stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"that failed; {log} says why")
    minutes, worked = (time.monotonic() - began) / 60, (usage.ru_utime + usage.ru_stime) / 60
    return {"minutes": minutes, "processor_minutes": worked, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def collect(work: Path, known: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    """The rows that have been measured, by bits; the original first.

    Args:
        work: folders and figures.
        known: rows of an earlier sitting; those that `work` has figures of are made anew.
    """
    before = {(row.get("wanted"), row["finetune"]): row for row in known or []}
    original = {**before.get((None, None), {}), "finetune": None, **measured(None, work / "original.tasks.json")}
    rows: list[dict[str, Any]] = [original]
    for bits in sorted(BUDGETS):
        for finetune in SUFFIXES:
            row = Row(work, bits, finetune)
            if not row.file("eval").exists():
                rows += filter(None, [before.get((bits, finetune))])
                continue
            stored = json.loads((row.folder / "report.json").read_text())
            facts = {"wanted": bits, "bits_per_weight": stored["bits_per_weight"], "specs": stored["spec"]}
            cost = json.loads(row.file("cost").read_text()) if row.file("cost").exists() else {}
            rows.append({**facts, "finetune": finetune, **cost, **measured(row.file("eval"), row.file("tasks"))})
            rows[0] |= {key: rows[-1].pop(f"original_{key}") for key in [f"{name}_perplexity" for name in TEXTS]}
    return rows


def measured(texts: Path | None, tasks: Path) -> dict[str, Any]:
    """The figures in what `vptq eval` has written."""
    found: dict[str, Any] = {}
    if texts is not None:
        for name, text in zip(TEXTS, json.loads(texts.read_text())["texts"], strict=True):
            found |= {f"{name}_perplexity": text["perplexity"], f"{name}_divergence": text["kl_divergence"]}
            found[f"original_{name}_perplexity"] = text["reference_perplexity"]
    if tasks.exists():
        for task in json.loads(tasks.read_text())["tasks"]:
            found[task["task"].removesuffix("_local")] = task["metrics"]["acc"]["value"]
    return found


def beside_peers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each peer, and our largest row that is no larger."""
    found = []
    for who, formats in PEERS.items():
        for name, (bits, perplexity) in formats.items():
            row: dict[str, Any] = {"peer": f"{who}: {name}", "bits_per_weight": bits, "perplexity": perplexity}
            for kind, key in (("none", "ours"), ("e2e", "ours_finetuned")):
                smaller = [ours for ours in rows if ours["finetune"] == kind and ours["bits_per_weight"] <= bits]
                if smaller:
                    best = max(smaller, key=lambda ours: float(ours["bits_per_weight"]))
                    row |= {f"{key}_bits": best["bits_per_weight"], key: best["test_perplexity"]}
            found.append(row)
    return sorted(found, key=lambda row: float(row["bits_per_weight"]))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity and divergence against true bits, peers on the same axes."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    kinds = {
        "none": ("vptq, no finetuning", "o-", "tab:blue"),
        "e2e": ("vptq, finetuned", "o-", "tab:green"),
        "both": ("vptq, blocks finetuned too", "D", "tab:purple"),
    }
    for kind, (label, style, color) in kinds.items():
        ours = [row for row in rows if row["finetune"] == kind]
        if not ours:
            continue
        for axes, key in ((left, "test_perplexity"), (right, "test_divergence")):
            axes.plot([r["bits_per_weight"] for r in ours], [r[key] for r in ours], style, color=color, label=label)
        bits = [row["bits_per_weight"] for row in ours]
        right.plot(bits, [row["c4_divergence"] for row in ours], "s:", color=color, label=f"{label}, web text")
    for (label, points), marker in zip(PEERS.items(), "v^xd", strict=True):
        left.plot(*zip(*points.values(), strict=True), marker, color="0.45", label=label)
    if "test_perplexity" in rows[0]:
        left.axhline(rows[0]["test_perplexity"], color="black", linewidth=0.8, linestyle="--", label="the original")
    left.set(yscale="log", ylabel="perplexity, WikiText-2 test", yticks=[20, 30, 50, 100, 170])
    right.set(yscale="log", ylabel="KL to the original, nats a token", yticks=[0.05, 0.1, 0.2, 0.5, 1, 2])
    for axes in (left, right):
        axes.get_yaxis().set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set(xlabel="true bits per weight")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("SmolLM2-135M-Instruct")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits against accuracy, before and after finetuning.")
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext-2, calibration, zero_shot")
    parser.add_argument("--task-dir", type=Path, help="where zero_shot/write_yaml.py wrote (default: zero_shot)")
    parser.add_argument("--work", type=Path, required=True, help="where folders, figures and logs go")
    parser.add_argument("--bits", type=float, nargs="*", default=list(BUDGETS))
    usual = [stage for stage, (_, finetune) in STAGES.items() if finetune != "both"]  # an hour a row, on top of hours
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=usual)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.model, args.data, args.work, args.task_dir or args.data / "zero_shot")
    for step, finetune in map(STAGES.__getitem__, args.stages):
        original = args.work / "original.tasks.json"
        if step == "tasks" and not original.exists():
            run_vptq(bench.measurement(step, args.model, original), args.work / "original.log")
        for bits in args.bits:
            bench.run(step, Row(args.work, bits, finetune))
    known = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    rows = collect(args.work, known)
    write_json(args.json, {"benchmark": "curve", "rows": rows, "peers": beside_peers(rows)})
    draw(rows, args.picture)
    print(json.dumps({"benchmark": "curve", "rows": len(rows)}))


if __name__ == "__main__":
    main()
