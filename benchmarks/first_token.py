"""How long until the first word of an answer can be read: in `vptq chat` on a terminal, and in `vptq app` in a browser.

    python benchmarks/first_token.py DIR [--rounds 5] [--prompt TEXT] [--json FILE] [--note TEXT]

Both run at once and take turns, so that whatever else the machine does slows both. The terminal is a pseudo-terminal,
the browser Chromium without a window; seconds are from the key that sends the question to the first letter of the
answer. Each round is a new conversation with another question. Every host that the page contacts is counted. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import pty
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from playwright import sync_api

PATIENCE = 600.0  # seconds until something is taken for stuck


class Terminal:
    """`vptq chat` on a terminal of its own."""

    def __init__(self, folder: Path) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="200", NO_COLOR="1")
            os.execvp(sys.executable, [sys.executable, "-m", "vptq", "chat", str(folder)])
        self._seen = ""
        self._wait_for("You: ")

    def ask(self, question: str) -> float:
        """Seconds to the first letter of the answer, which is then waited for; the conversation is forgotten."""
        self._type(question)
        self._wait_for(re.escape(question) + r"\r\n")
        began = time.perf_counter()
        self._wait_for(r"\w")
        seconds = time.perf_counter() - began
        self._wait_for(r"first after .*You: ")
        self._type("/reset")
        self._wait_for("You: ")
        return seconds

    def set(self, setting: str) -> None:
        """Change a setting."""
        self._type(f"/params {setting}")
        self._wait_for("You: ")

    def close(self) -> None:
        """End it."""
        self._type("/exit")
        os.waitpid(self.pid, 0)

    def _type(self, line: str) -> None:
        os.write(self._terminal, f"{line}\r".encode())

    def _wait_for(self, pattern: str) -> None:
        ends = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self._seen, re.DOTALL)):
            assert time.monotonic() < ends, f"no {pattern!r} in {self._seen!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                self._seen += os.read(self._terminal, 65536).decode(errors="replace")
        self._seen = self._seen[found.end() :]


class Page:
    """`vptq app` in a browser."""

    def __init__(self, folder: Path, browser: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "vptq", "app", str(folder), "--no-published", "--port", str(port)]
        self._server = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        ends = time.monotonic() + PATIENCE
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < ends, "the page does not come up"
            time.sleep(0.2)
        self.hosts: set[str] = set()
        self._page = browser.new_page()
        self._page.set_default_timeout(1000 * PATIENCE)
        self._page.on("request", lambda request: self.hosts.add(re.sub(r"^\w+:(//)?([^/:]*).*", r"\2", request.url)))
        self._page.goto(f"http://127.0.0.1:{port}", wait_until="domcontentloaded")
        self._page.wait_for_selector("#question textarea")

    def set_tokens(self, tokens: int) -> None:
        """Change how long answers may be."""
        self._page.get_by_text("Settings").click()
        self._page.fill("#tokens input[type=number]", str(tokens))
        self._page.press("#tokens input[type=number]", "Tab")

    def ask(self, question: str) -> float:
        """Seconds to the first letter of the answer, which is then waited for; the conversation is forgotten."""
        self._page.fill("#question textarea", question)
        began = time.perf_counter()
        self._page.press("#question textarea", "Enter")
        self._page.wait_for_function(
            "/\\w/.test(document.querySelector('#left [data-testid=bot]')?.innerText || '')", polling="raf"
        )
        seconds = time.perf_counter() - began
        self._page.wait_for_function("/ tokens/.test(document.querySelector('#left-status').innerText)")
        self._page.click("#clear")
        self._page.wait_for_function("!document.querySelector('#left [data-testid=bot]')")
        return seconds

    def close(self) -> None:
        """End it."""
        self._page.close()
        self._server.terminate()
        self._server.wait()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        terminal, page = Terminal(arguments.folder), Page(arguments.folder, browser)
        terminal.set("max_new_tokens=4")
        page.set_tokens(4)
        for talker in (terminal, page):  # the page loads its model at the first question
            talker.ask(arguments.prompt)
        questions = [f"{number}. {arguments.prompt}" for number in range(arguments.rounds)]
        rounds = [(terminal.ask(question), page.ask(question)) for question in questions]
        terminal.close()
        page.close()
        browser.close()
    on_terminal, on_page = ([each[side] for each in rounds] for side in (0, 1))
    return {
        "benchmark": "first_token",
        "model": arguments.folder.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "note": arguments.note,
        "rounds": arguments.rounds,
        "terminal_seconds": statistics.median(on_terminal),
        "page_seconds": statistics.median(on_page),
        "page_over_terminal": statistics.median(on_page) / statistics.median(on_terminal),
        "all_terminal_seconds": on_terminal,
        "all_page_seconds": on_page,
        "hosts": sorted(page.hosts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a quantized model with a chat template")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", default="Why is the sky blue? Explain it to a child in three short sentences.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--note", default="", help="about the machine, for the file")
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
