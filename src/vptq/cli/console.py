"""What the commands share for talking to people.

Results go to standard output, everything about the way there to standard error, so that output can be piped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vptq.errors import ConfigError
from vptq.extras import missing


def output() -> Console:
    """A console on standard output; made per use, so that it follows a redirected one."""
    return Console(highlight=False)


def messages() -> Console:
    """A console on standard error."""
    return Console(stderr=True, highlight=False)


def print_error(text: str) -> None:
    """Print an error as one line, however long."""
    one_line = " ".join(text.split())
    console = messages()
    console.print("[bold red]error:[/bold red]", end=" ")
    console.print(one_line, style="red", markup=False, soft_wrap=True)


def print_warning(text: str) -> None:
    """Print a warning as one line, however long."""
    console = messages()
    console.print("[bold yellow]warning:[/bold yellow]", end=" ")
    console.print(" ".join(text.split()), markup=False, soft_wrap=True)


def plain_table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the style of all commands: names on the left, figures on the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def facts(rows: dict[str, str]) -> Table:
    """A two-column table without a header."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for what, value in rows.items():
        table.add_row(what, value)
    return table


def check_json_file(path: Path | None) -> None:
    """Raises ConfigError where --json names no file that could be written."""
    if path is not None:
        _check_file(path, "--json")


def check_picture_file(path: Path, option: str) -> None:
    """Raises ConfigError where an option names no picture that could be drawn and written."""
    _check_file(path, option)
    if find_spec("matplotlib") is None:
        raise ConfigError(missing(f"{option} {path} is a picture; drawing it", "matplotlib", "plot"))


def write_json_file(data: Mapping[str, Any], path: Path, option: str = "--json") -> None:
    """Writes what an option asks for; ConfigError where that cannot be done."""
    write_file((json.dumps(data, indent=2) + "\n").encode(), path, option)


def write_file(content: bytes, path: Path, option: str) -> None:
    """Writes what an option asks for, under a temporary name first; ConfigError where that cannot be done."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {option} {path}: {error.strerror}") from error


def write_picture(png: bytes, path: Path, option: str) -> None:
    """Writes the picture that an option asks for, and says where; ConfigError where that cannot be done."""
    write_file(png, path, option)
    output().print(f"drawn in {path}", style="dim", markup=False, soft_wrap=True)


def _check_file(path: Path, option: str) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path} is no file in a folder that exists; choose another")


def by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10: config.json is sorted by letters."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def file_size(count: float) -> str:
    """Bytes for people, in decimal units as disks and hubs count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.4g} TB"


def quiet_transformers() -> None:
    """Silence the hints and bars of the libraries underneath; ours say what is going on (`vptq.cli.progress`).

    To be called before torch is imported: tqdm, which comes with it, reads its environment variable only then.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
