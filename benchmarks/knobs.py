"""What each knob of `vptq quantize` changes, all else alike: the rows of benchmarks/results/knobs.json.

    python benchmarks/knobs.py MODEL --data ../shared/data --work DIR [--only "other seed" rotate]

A whole run a row, at a spec that is quick to solve and on little text, so that a knob costs minutes and not an hour:
the order of the knobs is what counts here, not how good the models are. Two rows differ in nothing but the seed; what
differs less than they do is chance. Every row is two commands that a reader could type. Figures are kept in DIR and in
the results: what is there is not measured again, and a table may be made in several sittings.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from curve import ROOT, TEXTS, measured, run_vptq

from vptq.checkpoint import write_json

RESULTS = ROOT / "benchmarks" / "results" / "knobs.json"
SPEC, SEQUENCES, WINDOWS = "v4-k256", 16, 6
VALID = "wikitext-2/valid.txt"
KNOBS = {
    "nothing": "",
    "other seed": "--seed 1",
    "--hessian-inputs original": "--hessian-inputs original",
    "--hessian-inputs quantized": "--hessian-inputs quantized",
    "--hessian fisher": "--hessian fisher",
    "--hessian rows": "--hessian rows",
    "--rotate": "--rotate",
    "--no-norm": "--no-norm",
    "--no-perm": "--no-perm",
    "--finetune block": "--finetune block",
    "--finetune e2e": "--finetune e2e",
    "--finetune both": "--finetune both",
    "--move-indices, e2e": "--finetune e2e --move-indices 0.01",
    "4 times the text": "--sequences 64",
    "web text": "--calibration calibration/c4_calib.txt",
    "half web text": f"--calibration {VALID},calibration/c4_calib.txt",
}
"""What is changed -> the words for it; texts are named from the folder of data."""


def quantize_words(model: str, data: Path, folder: Path, knob: str) -> list[str]:
    """The words after `vptq` that quantize with one knob turned."""
    usual = {"--spec": SPEC, "--calibration": VALID, "--sequences": str(SEQUENCES), "--seed": "0"}
    words = shlex.split(KNOBS[knob])
    kept = [word for option, value in usual.items() if option not in words for word in (option, value)]
    words = kept + words
    at = words.index("--calibration") + 1
    words[at] = ",".join(str(data / text) for text in words[at].split(","))
    return ["quantize", model, "-o", str(folder), *words]


def eval_words(model: str, data: Path, folder: Path, file: Path) -> list[str]:
    """The words after `vptq` that measure a folder."""
    texts = [word for name in TEXTS.values() for word in ("--text", str(data / name))]
    measure = ["--windows", str(WINDOWS), "--dtype", "float32", "--json", str(file)]
    return ["eval", str(folder), "--reference", model, "--remember", *texts, *measure]


def row(model: str, data: Path, work: Path, knob: str) -> dict[str, Any]:
    """Quantizes and measures, unless that is done."""
    folder = work / knob.strip("-").replace(" ", "-")
    cost, file = folder.with_suffix(".cost.json"), folder.with_suffix(".eval.json")
    log = folder.with_suffix(".log")
    if not folder.exists():
        resumed = folder.with_name(f"{folder.name}.work").exists()
        words = quantize_words(model, data, folder, knob)
        spent = run_vptq([*words, "--resume"] if resumed else words, log)
        write_json(cost, spent if not resumed else {**spent, "minutes": None, "processor_minutes": None})
    if not file.exists():
        run_vptq(eval_words(model, data, folder, file), log)
    report = json.loads((folder / "report.json").read_text())
    facts = {"knob": knob, "bits_per_weight": report["bits_per_weight"], **measured(file, work / "no tasks")}
    return {**facts, **json.loads(cost.read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description="What each knob of vptq quantize changes, all else alike.")
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext-2 and calibration")
    parser.add_argument("--work", type=Path, required=True, help="where folders, figures and logs go")
    names = {knob.lstrip("-"): knob for knob in KNOBS}
    parser.add_argument("--only", nargs="*", choices=list(names), default=list(names), metavar="KNOB")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    known = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    rows = {known_row["knob"]: known_row for known_row in known}
    for knob in map(names.__getitem__, args.only):
        print(knob, flush=True)
        rows[knob] = row(args.model, args.data, args.work, knob)
        done = [rows[name] for name in KNOBS if name in rows]
        settings = {"spec": SPEC, "sequences": SEQUENCES, "windows": WINDOWS}
        write_json(args.json, {"benchmark": "knobs", **settings, "rows": done})
    print(json.dumps({"benchmark": "knobs", "rows": len(rows)}))


if __name__ == "__main__":
    main()
