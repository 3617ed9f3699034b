"""`vptq eval --tasks` on a quantized folder, over the tasks that people report: their prompts and their data."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from vptq.cli import main

DATA = Path(__file__).parents[3] / "shared" / "data" / "zero_shot"
# And what lm-eval measures of each.
TASKS = {
    "hellaswag_local": {"acc", "acc_norm"},
    "piqa_local": {"acc", "acc_norm"},
    "arc_easy_local": {"acc", "acc_norm"},
    "winogrande_local": {"acc"},
    "lambada_openai_local": {"acc", "perplexity"},
}


@pytest.fixture
def task_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Task files over the shared data; they are written beside the script that does it, hence the copy."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("write_yaml.py", "local_utils.py"):
        shutil.copy(DATA / name, folder)
    subprocess.run([sys.executable, folder / "write_yaml.py", DATA], check=True, capture_output=True)
    return folder


def test_a_quantized_folder_answers_the_common_tasks(
    make_checkpoint: Callable[..., Any],
    tiny_tokenizer: PreTrainedTokenizerBase,
    task_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, figures = make_checkpoint().folder, tmp_path / "figures.json"
    tiny_tokenizer.save_pretrained(folder)
    arguments = ("--tasks", ",".join(TASKS), "--task-dir", task_dir, "--limit", "3", "--json", figures)
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in ("eval", folder, *arguments, "--device", "cpu", "--dtype", "float32", "--quiet")])
    captured = capsys.readouterr()
    assert (caught.value.code or 0, captured.err) == (0, "")
    measured = json.loads(figures.read_text())
    assert {scores["task"]: set(scores["metrics"]) for scores in measured["tasks"]} == TASKS
    assert {scores["examples"] for scores in measured["tasks"]} == {3}
    assert all(0 <= scores["metrics"]["acc"]["value"] <= 1 for scores in measured["tasks"])
