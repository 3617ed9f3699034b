"""`vptq eval` prints what it writes: figures of texts and of tasks."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


def test_eval_prints_and_writes_the_figures(run: Run, tiny_model_folder: Path, tmp_path: Path) -> None:
    text, figures = tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text("ba de fi go ku " * 20)
    status, out, err = run(
        *("eval", tiny_model_folder, "--reference", tiny_model_folder, "--text", text),
        *("--seqlen", "16", "--windows", "3", "--json", figures, "--device", "cpu", "--quiet"),
    )
    assert (status, err) == (0, "")
    measured = json.loads(figures.read_text())
    assert (measured["windows"], measured["seqlen"]) == (3, 16)
    assert measured["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert f"{measured['perplexity']:.4f}" in out
    status, _, err = run("eval", tiny_model_folder, "--text", text, "--seqlen", "512", "--device", "cpu")
    assert status == 0
    *_, warning = err.splitlines()
    assert warning.startswith("warning: ")
    assert "only 100 tokens" in warning


def test_eval_measures_texts_and_tasks_in_one_run(
    run: Run, tiny_model_folder: Path, tiny_task_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    texts, figures = [tmp_path / "one.txt", tmp_path / "two.txt"], tmp_path / "figures.json"
    for index, text in enumerate(texts):
        text.write_text(f"ba de fi go {'ku' if index else 'ka'} " * 20)
    status, out, err = run(
        *("eval", tiny_model_folder, "--reference", tiny_model_folder, "--text", texts[0], "--text", texts[1]),
        *("--seqlen", "16", "--windows", "3", "--tasks", "tiny_choices, tiny_last_word", "--task-dir", tiny_task_dir),
        *("--limit", "9", "--batch-size", "3", "--json", figures, "--device", "cpu", "--quiet"),
    )
    assert (status, err) == (0, "")
    measured = json.loads(figures.read_text())
    assert [scores["text"] for scores in measured["texts"]] == [str(text) for text in texts]
    assert measured["perplexity"] == measured["texts"][0]["perplexity"]
    for scores in measured["texts"]:
        (row,) = (line for line in out.splitlines() if line.startswith(scores["text"]))
        assert row.split()[-5:-2] == ["16", f"{scores['perplexity']:.4f}", f"{scores['reference_perplexity']:.4f}"]
    assert [scores["task"] for scores in measured["tasks"]] == ["tiny_choices", "tiny_last_word"]
    for scores in measured["tasks"]:
        assert scores["examples"] == 9
        for metric, estimate in scores["metrics"].items():
            assert scores["reference_metrics"][metric] == estimate
            figure = f"{estimate['value']:.4f} ± {estimate['stderr']:.4f}"
            assert re.search(rf"^{scores['task']} +9 +{metric} +{figure} +{figure} *$", out, re.MULTILINE)


def test_eval_says_which_tasks_are_near_one_that_is_not_there(run: Run, tiny_model_folder: Path) -> None:
    status, out, err = run("eval", tiny_model_folder, "--tasks", "helaswag")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: there is no task 'helaswag' in lm-eval; near are ")
    assert "hellaswag" in err
