"""What commands show of their work: to people on a terminal, to a log, to programs, and to those who want nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from vptq.cli import main
from vptq.cli.progress import Bars, Form, JsonLines, Lines, View, view, working
from vptq.errors import ConfigError
from vptq.progress import ProgressEvent, StageTimes

Run = Callable[..., tuple[int, str, str]]
COLOR = re.compile(r"\x1b\[[\d;]*[349]\dm")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Time stands still but for the seconds that are let pass."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_programs_get_an_object_a_line_with_the_time_left(capsys: Any, clock: Callable[[float], None]) -> None:
    shown = JsonLines()
    for done in range(4, 9):  # resumed: four were done before
        shown(ProgressEvent("training", done, 10, loss=1 / done))
        clock(2.0)
    shown.warn("short text")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[0] == {"stage": "training", "done": 4, "total": 10, "seconds": 0, "seconds_left": None, "loss": 0.25}
    assert lines[-2] == {"stage": "training", "done": 8, "total": 10, "seconds": 8, "seconds_left": 4, "loss": 0.125}
    assert lines[-1] == {"warning": "short text"}


def test_programs_are_not_flooded_and_miss_no_message_and_no_end(capsys: Any, clock: Callable[[float], None]) -> None:
    shown = JsonLines()
    for done in range(1, 1021):
        clock(0.01)
        shown(ProgressEvent("sampling", done, 1020, message="half" if done == 500 else "", loss=float("nan")))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert 15 <= len(lines) <= 25, "two a second"
    assert (lines[0]["done"], lines[-1]["done"]) == (1, 1020)
    assert [line["done"] for line in lines if "message" in line] == [500]
    assert not any("loss" in line for line in lines), "JSON has no NaN"


def test_an_error_is_an_object_too(capsys: Any) -> None:
    with pytest.raises(Exception, match="1"), JsonLines():
        raise ConfigError("no such text")
    assert json.loads(capsys.readouterr().err) == {"error": "no such text"}


def test_a_mistake_of_ours_keeps_its_trace() -> None:
    with pytest.raises(KeyError), JsonLines():
        raise KeyError("stage")


def test_a_log_gets_a_line_a_stage_and_one_now_and_then(capsys: Any, clock: Callable[[float], None]) -> None:
    shown = Lines()
    shown(ProgressEvent("loading"))
    for done in range(61):
        shown(ProgressEvent("sampling", done, 100))
        clock(1.0)
    shown(ProgressEvent("layers", 1, 2, "q_proj loss 1%"))
    assert capsys.readouterr().err.splitlines() == [
        *("sampling", "sampling 30 of 100, about 70 s left", "sampling 60 of 100, about 40 s left"),
        "q_proj loss 1%",
    ]


def test_a_stage_that_begins_again_is_told_again(capsys: Any, clock: Callable[[float], None]) -> None:
    shown = Lines()
    for done in (5, 6, 0, 1):
        shown(ProgressEvent("sampling", done, 10))
        clock(1.0)
    assert capsys.readouterr().err.splitlines() == ["sampling 5 of 10", "sampling"]


def test_a_command_at_work_quiets_the_libraries() -> None:
    logging.set_verbosity_warning()
    with working(Form.auto, quiet=True):
        assert logging.get_verbosity() == logging.ERROR


def test_elsewhere_than_on_a_terminal_there_are_no_bars() -> None:
    assert type(view()) is Lines
    assert type(view(Form.json)) is JsonLines
    assert type(view(Form.json, quiet=True)) is View


def test_bars_of_what_is_over_go(capsys: Any) -> None:
    bars = Bars()
    for event in (("loading",), ("blocks", 1, 3), ("training block 0", 2, 2), ("training block 1", 1, 2)):
        bars(ProgressEvent(*event))
    left = [(task.description, task.completed, task.total) for task in bars._progress.tasks]
    assert left == [("blocks", 1, 3), ("training block 1", 1, 2)]


def test_time_goes_to_the_stage_that_was_told_about_last(clock: Callable[[float], None]) -> None:
    times = StageTimes(lambda event: clock(0.5))
    for stage, seconds in (("loading", 3), ("training block 1", 2), ("training block 12", 1), ("loading", 1)):
        times(ProgressEvent(stage))
        clock(seconds)
    times.stop()
    assert times.seconds == {"loading": 5.0, "training block": 4.0}


@pytest.fixture
def quantize(run: Run, tiny_model_folder: Path, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Quantize a tiny model with these options."""
    options = ("--spec", "v4-k16", "--sequences", "2", "--seqlen", "16", "-o", tmp_path / "out")
    return lambda *more: run("quantize", tiny_model_folder, *options, *more)


def test_quiet_leaves_results_and_errors(quantize: Run) -> None:
    status, out, err = quantize("--quiet")
    assert (status, err) == (0, "")
    assert "mean proxy loss" in out
    status, out, err = quantize("-q")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: .*exists.*\n", err)


def test_json_says_what_bars_do_and_leaves_the_result_alone(quantize: Run) -> None:
    status, out, err = quantize("--progress", "json")
    assert status == 0
    assert "mean proxy loss" in out
    lines = [json.loads(line) for line in err.splitlines()]
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    assert stages[0] == "starting"
    assert stages[-1] == "writing the folder"
    assert {"checking weights", "sampling calibration text", "quantizing layers"} < set(stages)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 14, "one a layer"
    assert all(0 < loss < 1 for loss in losses)
    status, _, err = quantize("--progress", "json")
    assert status == 1
    assert "exists" in json.loads(err.splitlines()[-1])["error"]


def test_a_pipe_gets_no_color(quantize: Run) -> None:
    _, out, err = quantize("--resume")
    assert "quantizing layers" in err or "loss" in err
    assert "\x1b" not in out + err


def work() -> None:
    with view() as shown:
        shown(ProgressEvent("training", 1, 2, "half done"))
        shown.warn("short text")


def seen_on_a_terminal(do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """What it writes to both outputs, where they are a pseudo-terminal."""
    ours, theirs = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(theirs, "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        patch.setattr(sys, "stderr", screen)
        with suppress(SystemExit):
            do()
    seen = b""
    with suppress(OSError):  # how Linux says that nothing more will come
        while some := os.read(ours, 65536):
            seen += some
    os.close(ours)
    return seen.decode()


@pytest.mark.parametrize("do", [lambda: main(["info", "./missing"]), work], ids=["error", "bars"])
def test_no_color_is_heeded_on_a_terminal(do: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert COLOR.search(seen_on_a_terminal(do, monkeypatch)), "or there were nothing to leave out"
    monkeypatch.setenv("NO_COLOR", "1")
    seen = seen_on_a_terminal(do, monkeypatch)
    assert re.search("no folder|half done.*short text", seen, re.DOTALL)
    assert not COLOR.search(seen)
