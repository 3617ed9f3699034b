"""What a command shows of its work while it works, on standard error: one place for all commands.

On a terminal bars, with the time left and a clock that runs even while nothing else can be told. Elsewhere (a pipe, a
file) a line for each stage, and one now and then while it goes on. `--progress json` says the same to programs, as one
JSON object a line, and `--quiet` nothing.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from vptq.cli.console import messages, print_warning, quiet_transformers
from vptq.errors import VPTQError
from vptq.progress import ProgressEvent

# Seconds between two signs of life: for people who read a log, and for programs that draw a bar.
LINE_SECONDS, JSON_SECONDS = 30.0, 0.5


class Form(str, Enum):
    """Who is to read it."""

    auto = "auto"
    json = "json"


ProgressOption = Annotated[
    Form, typer.Option("--progress", help="auto: bars on a terminal, lines elsewhere; json: a JSON object a line.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but results and errors.")]


class View:
    """Shows nothing, which is what `--quiet` asks for; and what the others have in common."""

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The work is done, or has failed."""

    def __call__(self, event: ProgressEvent) -> None:
        """Show one step: a `ProgressCallback`."""

    def warn(self, text: str) -> None:
        """Show what the user should know about the result."""


def view(form: Form = Form.auto, quiet: bool = False) -> View:
    """What the options ask for; to be entered before anything that takes time, imports included."""
    if quiet:
        return View()
    if form is Form.json:
        return JsonLines()
    return Bars() if messages().is_terminal else Lines()


@contextmanager
def working(form: Form, quiet: bool, stage: str = "starting") -> Iterator[View]:
    """`view` of a command's work, which is shown to begin before the imports that it has to make take their time.

    Args:
        form: The `--progress` option.
        quiet: The `--quiet` option.
        stage: What it begins with.
    """
    with view(form, quiet) as shown:
        shown(ProgressEvent(stage))
        quiet_transformers()
        yield shown


def waiting(what: str) -> View:
    """A sign of life on a terminal, for commands whose messages are not about their progress; nothing elsewhere."""
    bars = Bars() if messages().is_terminal else View()
    bars(ProgressEvent(what))
    return bars


class Bars(View):
    """A bar for each stage that is not complete yet; lines worth keeping are printed above."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            # A plain average: layers differ in size in a pattern that repeats over minutes, not seconds.
            TimeLeftColumn(compact=True),
            TextColumn("left  {task.fields[layer]}", style="dim", markup=False),
            console=messages(),
            speed_estimate_period=3600,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: ProgressEvent) -> None:
        """Show one step."""
        if event.stage not in self._tasks:
            self._remove_finished()
            self._tasks[event.stage] = self._progress.add_task(event.stage, total=None, layer="")
        self._progress.update(
            self._tasks[event.stage], completed=event.done, total=event.total or None, layer=event.layer or ""
        )
        if event.message:
            self._progress.console.print(event.message, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print above the bars."""
        self._progress.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def _remove_finished(self) -> None:
        """What is complete goes, and what cannot be counted was over when something else began."""
        for task in self._progress.tasks:
            if task.finished or task.total is None:
                self._progress.remove_task(task.id)
                self._tasks = {stage: number for stage, number in self._tasks.items() if number != task.id}


@dataclass
class _Stage:
    """When a stage began, and with how much of it done; and when something was shown of it last."""

    began: float
    done: int
    shown: float

    def seconds_left(self, event: ProgressEvent) -> float | None:
        """By a plain average; None where nothing has been done or the end is not known."""
        made = event.done - self.done
        return (time.monotonic() - self.began) / made * (event.total - event.done) if made and event.total else None


class Lines(View):
    """A line when a stage that can be counted begins, lines worth keeping, and where there are none one every
    `LINE_SECONDS`."""

    every = LINE_SECONDS
    uncounted = False  # loading and reading pass; what fails there is to be one line in a log

    def __init__(self) -> None:
        self._stages: dict[str, _Stage] = {}

    def __call__(self, event: ProgressEvent) -> None:
        """Show one step, if it is time to."""
        if not (event.total or event.message or self.uncounted):
            return
        now = time.monotonic()
        stage = self._stages.get(event.stage)
        is_new = stage is None or event.done < stage.done
        if stage is None or is_new:
            stage = self._stages[event.stage] = _Stage(now, event.done, now)
        is_complete = 0 < event.total == event.done
        if event.message or is_new or now - stage.shown >= self.every or is_complete:
            stage.shown = now
            self._show(event, now - stage.began, stage.seconds_left(event))

    def _show(self, event: ProgressEvent, seconds: float, seconds_left: float | None) -> None:
        count = f" {event.done:,} of {event.total:,}" if event.total and event.done else ""
        left = f", about {seconds_left:.0f} s left" if seconds_left else ""
        messages().print(event.message or f"{event.stage}{count}{left}", markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a line."""
        print_warning(text)


class JsonLines(Lines):
    """A JSON object a line: `stage`, `done`, `total`, `seconds` since the stage began, `seconds_left` or null, and
    where there are any `loss`, `layer` and `message`. A warning or an error is an object with just that."""

    every = JSON_SECONDS
    uncounted = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, VPTQError):
            self._write({"error": str(error)})
            raise typer.Exit(1) from error

    def _show(self, event: ProgressEvent, seconds: float, seconds_left: float | None) -> None:
        loss = event.loss if event.loss is not None and math.isfinite(event.loss) else None  # JSON has no NaN
        optional = {"loss": loss, "layer": event.layer, "message": event.message or None}
        self._write(
            {
                "stage": event.stage,
                "done": event.done,
                "total": event.total,
                "seconds": round(seconds, 3),
                "seconds_left": None if seconds_left is None else round(seconds_left, 3),
                **{name: value for name, value in optional.items() if value is not None},
            }
        )

    def warn(self, text: str) -> None:
        """Write an object."""
        self._write({"warning": text})

    def _write(self, data: dict[str, Any]) -> None:
        sys.stderr.write(json.dumps(data) + "\n")
        sys.stderr.flush()
