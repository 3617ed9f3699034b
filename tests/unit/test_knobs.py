"""benchmarks/knobs.py: each row changes what it says and nothing else, and what was measured stays."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from vptq.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def knobs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "curve", raising=False)
    return runpy.run_path(str(ROOT / "benchmarks" / "knobs.py"))


def options(words: list[str]) -> dict[str, Any]:
    """What `vptq` understands by the words: option -> value."""
    name, *rest = words
    command = get_command(app).get_command(None, name)  # type: ignore[attr-defined, arg-type]
    return dict(command.make_context(name, list(rest), resilient_parsing=False).params)


def test_each_row_is_one_option_away_from_one_before_it(knobs: dict[str, Any], tmp_path: Path) -> None:
    usual, *rows = [
        options(knobs["quantize_words"]("MODEL", tmp_path, tmp_path / "out", knob)) for knob in knobs["KNOBS"]
    ]
    assert usual["calibration"] == str(tmp_path / "wikitext-2" / "valid.txt")
    before = [usual]
    for knob, row in zip(list(knobs["KNOBS"])[1:], rows, strict=True):
        changes = [[name for name in row if row[name] != other[name]] for other in before]
        assert all(changes), f"{knob} is the same run as another row"
        assert 1 in map(len, changes), f"{knob}: {changes[0]}"
        before.append(row)


def test_texts_are_those_of_the_data_folder(knobs: dict[str, Any], tmp_path: Path) -> None:
    mixed = options(knobs["quantize_words"]("MODEL", tmp_path, tmp_path / "out", "half web text"))["calibration"]
    assert mixed == f"{tmp_path / 'wikitext-2/valid.txt'},{tmp_path / 'calibration/c4_calib.txt'}"
    words = knobs["eval_words"]("MODEL", tmp_path, tmp_path / "out", tmp_path / "out.json")
    assert len(options(words)["text"]) == 3


def test_what_is_measured_is_not_measured_again_and_other_rows_stay(
    knobs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(words: list[str], log: Path) -> dict[str, Any]:
        ran.append(words[0])
        given = options(words)
        if words[0] == "quantize":
            given["output_dir"].mkdir()
            (given["output_dir"] / "report.json").write_text('{"bits_per_weight": 2.08}')
        else:
            text = {"perplexity": 33.0, "kl_divergence": 0.6, "reference_perplexity": 18.5}
            given["json_file"].write_text(json.dumps({"texts": [text] * 3, "tasks": []}))
        return {"minutes": 4.0}

    monkeypatch.setitem(knobs["main"].__globals__, "run_vptq", run)
    results = tmp_path / "knobs.json"
    results.write_text(json.dumps({"rows": [{"knob": "--rotate", "test_perplexity": 40.0}]}))
    for names in (["nothing"], ["nothing", "no-norm"]):
        arguments = ["knobs.py", "MODEL", "--data", str(tmp_path), "--work", str(tmp_path / "work"), "--only", *names]
        monkeypatch.setattr(sys, "argv", [*arguments, "--json", str(results)])
        knobs["main"]()
    assert ran == ["quantize", "eval"] * 2
    rows = json.loads(results.read_text())["rows"]
    assert [(row["knob"], row["test_perplexity"]) for row in rows] == [
        ("nothing", 33.0), ("--rotate", 40.0), ("--no-norm", 33.0)
    ]  # fmt: skip
    assert (rows[0]["bits_per_weight"], rows[0]["c4_divergence"], rows[0]["minutes"]) == (2.08, 0.6, 4.0)
