"""How long a command leaves the screen silent: what somebody sees who sits before it for the first time.

    python benchmarks/silence.py [--longest 5] [--name TEXT] [--json FILE] [--append] -- COMMAND [ARGUMENT ...]

The command runs on a pseudo-terminal, and every stretch without a byte from it that is longer than `--longest` seconds
is printed with the last line before it. The command's own output goes to standard output. The last line is JSON; with
`--append` it becomes one more row of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import sys
import time
from pathlib import Path
from typing import Any

from vptq.shards import write_json


class Watch:
    """Copies what a command prints, and notes where nothing came for long."""

    def __init__(self, longest: float) -> None:
        self.silences: list[dict[str, Any]] = []
        self._longest = longest
        self._heard = time.monotonic()
        self._tail = ""

    def read(self, terminal: int) -> bytes:
        """What came next."""
        data = os.read(terminal, 65536)
        self.note()
        self._tail = (self._tail + data.decode(errors="replace"))[-2000:]
        return data

    def note(self) -> None:
        """Something came, or the end."""
        silent, self._heard = time.monotonic() - self._heard, time.monotonic()
        if silent > self._longest:
            lines = [line.strip() for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*\w", "", self._tail))]
            self.silences.append({"seconds": silent, "after": next((line for line in reversed(lines) if line), "")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--longest", type=float, default=5.0, metavar="SECONDS", help="what is still no silence")
    parser.add_argument("--name", metavar="TEXT", help="what the file calls it (default: the command)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--append", action="store_true", help="add to the rows that the file has")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    watch = Watch(arguments.longest)
    began = time.monotonic()
    status = os.waitstatus_to_exitcode(pty.spawn(arguments.command, watch.read))
    watch.note()
    row = {
        "command": arguments.name or " ".join(arguments.command),
        "status": status,
        "minutes": (time.monotonic() - began) / 60,
        "longest_allowed": arguments.longest,
        "longer": len(watch.silences),
        "silences": watch.silences,
    }
    if arguments.json:
        rows = json.loads(arguments.json.read_text())["rows"] if arguments.append and arguments.json.exists() else []
        write_json(arguments.json, {"benchmark": "silence", "rows": [*rows, row]})
    print(json.dumps(row))
    sys.exit(status)


if __name__ == "__main__":
    main()
