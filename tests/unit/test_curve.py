"""benchmarks/curve.py: its commands are vptq's, work that is done stays done, and rows show what was measured."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from vptq.cli import app

ROOT = Path(__file__).parents[2]
TEXTS = ["test", "c4", "wiki"]


@pytest.fixture
def curve() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "curve.py"))


def pretend(curve: dict[str, Any], work: Path, bits: float, finetune: str, perplexity: float) -> Any:
    """A folder and the figures that commands would have left."""
    row = curve["Row"](work, bits, finetune)
    row.folder.mkdir(parents=True)
    (row.folder / "report.json").write_text(json.dumps({"bits_per_weight": bits - 0.01, "spec": "mixed"}))
    texts = [
        {"text": text, "perplexity": perplexity + i, "kl_divergence": perplexity / 10, "reference_perplexity": 18.0 + i}
        for i, text in enumerate(TEXTS)
    ]
    row.file("eval").write_text(json.dumps({"texts": texts, "tasks": []}))
    return row


def understood(words: list[str]) -> dict[str, Any]:
    """What `vptq` makes of a command; it refuses what it does not know."""
    name, *rest = words
    command = get_command(app).get_command(None, name)  # type: ignore[attr-defined, arg-type]
    return dict(command.make_context(name, list(rest), resilient_parsing=False).params)


def test_its_commands_are_options_that_vptq_has(curve: dict[str, Any], tmp_path: Path) -> None:
    bench = curve["Bench"]("MODEL", tmp_path, tmp_path, tmp_path)
    for stage, (step, finetune) in curve["STAGES"].items():
        row = curve["Row"](tmp_path, 2.25, finetune)
        given = understood(bench.command(step, row))
        if step == "quantize":
            assert (given["bits"], given["finetune"].value) == (2.25, finetune), stage
        assert str(row.folder) in map(str, given.values()), stage


def test_what_is_there_is_not_done_again(
    curve: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, ran = curve["Bench"]("MODEL", tmp_path, tmp_path, tmp_path), []
    monkeypatch.setitem(bench.run.__func__.__globals__, "run_vptq", lambda words, log: ran.append(words[0]) or {})
    done, missing = pretend(curve, tmp_path, 2.0, "none", 30.0), curve["Row"](tmp_path, 3.0)
    for row in (done, missing):
        for stage in ("quantize", "eval", "tasks"):
            bench.run(stage, row)
        bench.run("finetune", curve["Row"](tmp_path, row.bits, "e2e"))
    assert ran == ["eval", "finetune", "quantize"], "tasks and training of the one, quantizing of the other"


def test_rows_hold_what_was_measured_and_are_drawn(curve: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for bits, perplexity in ((2.0, 30.0), (3.0, 22.0)):
        pretend(curve, tmp_path, bits, "none", perplexity)
    trained = pretend(curve, tmp_path, 2.0, "e2e", 25.0)
    trained.file("cost").write_text(json.dumps({"minutes": 12.5, "peak_gb": 1.5}))
    tasks = [{"task": "piqa_local", "metrics": {"acc": {"value": 0.6}, "acc_norm": {"value": 0.7}}}]
    trained.file("tasks").write_text(json.dumps({"texts": [], "tasks": tasks}))
    rows = curve["collect"](tmp_path)
    kinds = [(row.get("wanted"), row["finetune"]) for row in rows]
    assert kinds == [(None, None), (2.0, "none"), (2.0, "e2e"), (3.0, "none")]
    assert (rows[0]["test_perplexity"], rows[0]["wiki_perplexity"]) == (18.0, 20.0)
    row = rows[2]
    assert (row["test_perplexity"], row["c4_perplexity"], row["wiki_divergence"]) == (25.0, 26.0, 2.5)
    assert (row["bits_per_weight"], row["minutes"], row["piqa"]) == (1.99, 12.5, 0.6)
    peers = {peer["peer"]: peer for peer in curve["beside_peers"](rows)}
    assert peers["llama.cpp IQ: IQ2_XXS, mixed"]["ours"] == 30.0
    peer = peers["llama.cpp IQ: IQ3_XXS"]
    assert (peer["ours_bits"], peer["ours"], peer["ours_finetuned"]) == (2.99, 22.0, 25.0), "each kind by itself"
    curve["draw"](rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_rows_of_an_earlier_sitting_stay_unless_they_are_measured_again(curve: dict[str, Any], tmp_path: Path) -> None:
    known = [
        {"finetune": None, "test_perplexity": 18.5, "piqa": 0.68},
        {"wanted": 2.0, "finetune": "none", "test_perplexity": 33.0},
        {"wanted": 2.0, "finetune": "e2e", "test_perplexity": 28.0},
        {"wanted": 3.5, "finetune": "none", "test_perplexity": 20.0},
    ]
    pretend(curve, tmp_path, 2.0, "none", 30.0)
    rows = curve["collect"](tmp_path, known)
    found = [(row.get("wanted"), row["finetune"], row["test_perplexity"]) for row in rows]
    assert found == [(None, None, 18.0), (2.0, "none", 30.0), (2.0, "e2e", 28.0), (3.5, "none", 20.0)]
    assert rows[0]["piqa"] == 0.68
