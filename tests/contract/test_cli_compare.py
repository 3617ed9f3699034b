"""`vptq compare` and `vptq info --indices`: tables, pictures, and what is not known."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vptq.errors import CheckpointError
from vptq.evaluate.compare import compare
from vptq.quantize.report import Report, save_report

Run = Callable[..., tuple[int, str, str]]
PNG = b"\x89PNG\r\n\x1a\n"


def evaluation(perplexity: float, **changes: Any) -> dict[str, Any]:
    on = {"text": "wikitext2", "windows": 20, "seqlen": 2048}
    figures = {"perplexity": perplexity, "reference_perplexity": 18.5, "kl_divergence": perplexity / 100}
    return {**on, **figures, **changes}


def benchmark(speed: float, **changes: Any) -> dict[str, Any]:
    on = {"device": "cpu", "threads": 2, "prompt_tokens": 128, "new_tokens": 32}
    speeds = {"model": {"decode_tokens_per_second": speed}, "reference": {"decode_tokens_per_second": 16.25}}
    return {**on, **speeds, **changes}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a folder with a report and these figures."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def make(name: str, bits: float, evaluated: Any = None, benched: Any = None) -> Path:
        folder = Path(name)
        folder.mkdir()
        report = Report("original", f"spec-of-{name}", bits, [], 1.0, 1, "a text", 0, 1, 1)
        save_report(report, folder)
        for file, data in (("eval.json", evaluated), ("bench.json", benched)):
            if data is not None:
                (folder / file).write_text(data if isinstance(data, str) else json.dumps(data))
        return folder

    return make


def test_folders_are_in_the_table_and_the_picture(make: Callable[..., Path], run: Run) -> None:
    folders = [make("large", 3.0625, evaluation(22.6), benchmark(11)), make("small", 2.0625, evaluation(33.4))]
    status, out, err = run("compare", *folders, "--json", "all.json")
    assert status == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert list(rows)[:3] == ["small", "large", "original"], "the fewest bits first"
    assert rows["small"] == ["spec-of-small", "2.062", "33.400", "0.3340"]
    assert rows["large"] == ["spec-of-large", "3.062", "22.600", "0.2260", "11.00"]
    assert rows["original"] == ["18.500", "16.25"]
    assert re.fullmatch(r"warning: small: no speed \(vptq bench small --json small/bench.json\)\n", err)
    assert Path("compare.png").read_bytes().startswith(PNG)
    written = json.loads(Path("all.json").read_text())["folders"]
    assert [folder["name"] for folder in written] == ["small", "large"]


def test_what_was_measured_otherwise_is_left_out_and_named(make: Callable[..., Path]) -> None:
    folders = [
        make("a", 2, evaluation(30), benchmark(10)),
        make("b", 3, evaluation(20, text="c4"), benchmark(9, threads=1)),
        make("c", 4, evaluation(19), benchmark(8)),
    ]
    a, b, c = compare(folders)
    assert (a.perplexity, b.perplexity, c.perplexity) == (30, None, 19)
    assert (b.kl_divergence, b.tokens_per_second, c.tokens_per_second) == (None, None, 8)
    assert b.missing == (
        "its eval.json is of c4 20 2048, that of a of wikitext2 20 2048",
        "its bench.json is of cpu 1 128 32, that of a of cpu 2 128 32",
    )


def test_the_original_is_not_drawn_where_the_folders_have_different_ones(make: Callable[..., Path], run: Run) -> None:
    folders = [make("a", 2, evaluation(30)), make("b", 3, evaluation(20, reference_perplexity=9.0))]
    status, out, _ = run("compare", *folders)
    assert status == 0
    assert "original" not in out


@pytest.mark.parametrize("damaged", ["", "[]", "{", '{"perplexity": "low"}', '{"perplexity": true}', "[" * 100_000])
def test_damaged_figures_are_named(damaged: str, make: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"^a/eval.json [^\n]*measure again$"):
        compare([make("a", 2, damaged)])


def test_without_any_figures_it_says_how_to_get_them(make: Callable[..., Path], run: Run) -> None:
    status, out, err = run("compare", make("a", 2), make("b", 3))
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "vptq eval DIR --reference MODEL --json DIR/eval.json" in err
    assert not Path("compare.png").exists()


def test_a_folder_with_neither_report_nor_weights_is_named(make: Callable[..., Path]) -> None:
    folder = make("a", 2, evaluation(30))
    (folder / "report.json").unlink()
    with pytest.raises(CheckpointError, match=r"^a: there is no model\.safetensors"):
        compare([folder])
