"""How long until the first word of an answer can be read: in `vptq chat` on a terminal, and in `vptq app` in a browser.

    python benchmarks/first_token.py DIR [--rounds 7] [--prompt TEXT ...] [--json FILE] [--note TEXT]

Both run at once and take turns, so that whatever else the machine does slows both. The terminal is a pseudo-terminal,
the browser Chromium without a window. Seconds are from the key that sends the question to the first letter of the
answer, in the browser by its own clock until the frame that shows it is drawn: asking the browser from outside takes
longer than a frame. All is measured twice: with everything on the same cores, where the browser draws at the expense of
the model, and with the last core for the browser alone, as where it is on the desk of who asks. Each round is a new
conversation with another question. Every host that the page contacts is counted. The last line is JSON.
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

from vptq.shards import write_json

PATIENCE = 600.0  # seconds until something is taken for stuck
SHORT = "Why is the sky blue? Explain it to a child in three short sentences."
LONG = """My sister and I are planning a week in the mountains with our three children, who are four, seven and eleven
 years old. We would like to walk every day, but not for longer than three hours, to swim in a lake at least twice, and
 to visit one old town with a market. The youngest one gets tired quickly and is afraid of dogs, the middle one collects
 stones, and the eldest wants to see a glacier from near by. We have a car, two small tents and a cooker, and we do not
 want to spend more than eighty a day on food and places to sleep. Please write a plan for the seven days.""".replace(
    "\n", ""
)


WATCH = """
addEventListener('keydown', event => {
    if (event.key !== 'Enter') return;
    const began = performance.now();
    window.firstWord = null;
    const drawn = () => { window.firstWord = (performance.now() - began) / 1000; };
    const watcher = new MutationObserver(() => {
        if (!/\\w/.test(document.querySelector('#left [data-testid=bot]')?.innerText || '')) return;
        watcher.disconnect();
        requestAnimationFrame(() => setTimeout(drawn));
    });
    watcher.observe(document.body, {childList: true, characterData: true, subtree: true});
}, true);
"""
"""Run in the page: seconds from the key until the frame is drawn in which the answer has a letter, as `firstWord`."""


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
        self._page.add_init_script(WATCH)
        self._page.goto(f"http://127.0.0.1:{port}", wait_until="domcontentloaded")
        self._page.wait_for_selector("#question textarea")

    def set(self, **settings: float) -> None:
        """Change settings, by the names of their sliders."""
        self._page.get_by_text("Settings").click()
        for name, value in settings.items():
            self._page.fill(f"#{name} input[type=number]", str(value))
            self._page.press(f"#{name} input[type=number]", "Tab")

    def ask(self, question: str) -> float:
        """Seconds to the first letter of the answer, which is then waited for; the conversation is forgotten."""
        self._page.fill("#question textarea", question)
        self._page.press("#question textarea", "Enter")
        self._page.wait_for_function("/ tokens/.test(document.querySelector('#left-status').innerText)", polling=100)
        seconds: float = self._page.evaluate("window.firstWord")
        self._page.click("#clear")
        self._page.wait_for_function("!document.querySelector('#left [data-testid=bot]')")
        return seconds

    def close(self) -> None:
        """End it."""
        self._page.close()
        self._server.terminate()
        self._server.wait()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """A row a question and place of the browser."""
    cores = sorted(os.sched_getaffinity(0))
    places = {"on the same cores": (cores, cores)}
    if len(cores) > 1:
        places["on a core of its own"] = (cores[:-1], cores[-1:])
    rows, hosts = [], set()
    for place, (ours, the_browsers) in places.items():
        found, contacted = side_by_side(arguments, ours, the_browsers)
        rows += [{"browser": place, **row} for row in found]
        hosts |= contacted
    return {
        "benchmark": "first_token",
        "model": arguments.folder.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "note": arguments.note,
        "rounds": arguments.rounds,
        "rows": rows,
        "hosts": sorted(hosts),
    }


def side_by_side(
    arguments: argparse.Namespace, ours: list[int], the_browsers: list[int]
) -> tuple[list[dict[str, Any]], set[str]]:
    """A row a question, with the browser on some cores and all else on others; and the hosts that it contacted."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    os.sched_setaffinity(0, the_browsers)  # processes stay where they are started
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        os.sched_setaffinity(0, ours)
        terminal, page = Terminal(arguments.folder), Page(arguments.folder, browser)
        # Where tokens are drawn, a small model at few bits now and then says nothing at all.
        terminal.set("max_new_tokens=4 temperature=0")
        page.set(tokens=4, temperature=0)
        for talker in (terminal, page):  # the page loads its model at the first question
            talker.ask(SHORT)
        rows = [compare(terminal, page, question, arguments.rounds) for question in arguments.prompt or (SHORT, LONG)]
        terminal.close()
        page.close()
        browser.close()
    return rows, page.hosts


def compare(terminal: Terminal, page: Page, question: str, rounds: int) -> dict[str, Any]:
    """Ask both in turn."""
    questions = [f"{number}. {question}" for number in range(rounds)]
    on_terminal, on_page = zip(*((terminal.ask(question), page.ask(question)) for question in questions), strict=True)
    medians = statistics.median(on_terminal), statistics.median(on_page)
    return {
        "words": len(question.split()),
        "terminal_seconds": medians[0],
        "page_seconds": medians[1],
        "page_over_terminal": medians[1] / medians[0],
        "all_terminal_seconds": on_terminal,
        "all_page_seconds": on_page,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a quantized model with a chat template")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a question (default: a short and a long one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--note", default="", help="about the machine, for the file")
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
