"""The web chat in a real browser: type, stream, stop, switch, two models, two visitors; nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the extra [app] is not installed")
pytest.importorskip("playwright", reason="it is not installed: pip install playwright")

from playwright import sync_api

import vptq.app.chat
from vptq.app.chat import Chat
from vptq.app.launch import launch
from vptq.app.models import LoadedModels, local_choice
from vptq.app.monitor import Monitor
from vptq.app.page import make_page
from vptq.engine import Engine

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]
COMPLETE = r"\b\d+ tokens(?!/)"
SECONDS = 120_000  # milliseconds, as playwright counts; others use this machine too


@pytest.fixture(scope="module")
def pace() -> threading.Semaphore:
    """Tokens that models may make."""
    return threading.Semaphore(0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """Room for one question to wait."""
    engine = Engine(1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory, engine: Engine, pace: threading.Semaphore
) -> Iterator[str]:
    """A running page with two models of 64 tokens' context."""
    folders = [tmp_path_factory.mktemp("models") / name for name in ("one-llama", "other-llama")]
    for folder in folders:
        shutil.copytree(tiny_model_folder, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    generate = vptq.app.chat.generate_text

    def paced(*args: Any, on_token: Any, **kwargs: Any) -> Any:
        def wait() -> None:
            pace.acquire(timeout=60)
            on_token()

        return generate(*args, on_token=wait, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vptq.app.chat, "generate_text", paced)
        page = make_page([*map(local_choice, folders)], engine, Chat(engine, LoadedModels()), Monitor())
        yield launch(page, "127.0.0.1", None, wait=False)
        pace.release(100_000)
        page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        with playwright.chromium.launch(executable_path=CHROMIUM, args=flags) as chromium:
            yield chromium


@pytest.fixture
def visit(browser: Any, address: str, engine: Engine, pace: threading.Semaphore) -> Iterator[Any]:
    """Opens the page as a new visitor; whom the page contacted is in `page.hosts`."""
    contexts: list[Any] = []

    def visit() -> Any:
        context = browser.new_context(viewport={"width": 1100, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.hosts = set()
        page.on("request", lambda request: page.hosts.add(re.sub(r"^\w+://([^/]*).*", r"\1", request.url)))
        page.goto(address, wait_until="domcontentloaded", timeout=SECONDS)
        page.wait_for_selector("#question textarea")
        return page

    yield visit
    for context in contexts:
        context.close()
    while engine._unfinished:  # whatever was left unanswered ends
        pace.release()
        time.sleep(0.01)
    while pace.acquire(blocking=False):
        pass


def ask(page: Any, question: str) -> None:
    page.fill("#question textarea", question)
    page.click("#send")


def shown(page: Any, side: str = "left") -> list[str]:
    """The turns of a conversation."""
    turns = page.locator(f"#{side} [data-testid=user], #{side} [data-testid=bot]")
    return [text.strip() for text in turns.all_inner_texts()]


def wait_for(page: Any, selector: str, pattern: str) -> str:
    """Wait until an element's text has a pattern; return it all."""
    sync_api.expect(page.locator(selector)).to_contain_text(re.compile(pattern), timeout=SECONDS)
    return str(page.locator(selector).inner_text())


def test_an_answer_streams_and_nothing_comes_from_elsewhere(
    visit: Any, address: str, pace: threading.Semaphore
) -> None:
    page = visit()
    ask(page, "ba de fi")
    pace.release(4)
    page.wait_for_selector("#left [data-testid=bot]")
    wait_for(page, "#left-status", "answering")
    partial = shown(page)[1]
    assert 0 < len(partial.split()) <= 4
    pace.release(1000)
    wait_for(page, "#left-status", COMPLETE)
    assert shown(page)[1].startswith(partial)
    assert len(shown(page)[1]) > len(partial)
    page.wait_for_selector("#chart-2 canvas, #chart-2 svg")
    assert page.hosts == {re.sub(r"^\w+://([^/]*).*", r"\1", address)}


def settled(page: Any) -> list[str]:
    """What is shown once it has not changed for a second."""
    before: list[str] = []
    while (now := shown(page)) != before:
        before = now
        page.wait_for_timeout(1000)
    return before


@pytest.mark.parametrize("how", ["stop", "leave"])
def test_an_answer_nobody_wants_ends_and_keeps_what_there_is(how: str, visit: Any, pace: threading.Semaphore) -> None:
    page, other = visit(), visit()
    ask(page, "ba de fi")
    pace.release(4)
    page.wait_for_selector("#left [data-testid=bot]")
    ask(other, "ku")
    wait_for(other, "#left-status", "Waiting: 1 before this one")
    before = settled(page)
    if how == "stop":
        page.click("#stop")
        page.wait_for_timeout(2000)
    else:
        page.close()
    for _ in range(30):  # a token at a time, so that the page has time to say that it is gone
        pace.release(1)
        other.wait_for_timeout(200)
    assert "Waiting" not in other.inner_text("#left-status"), "the answer went on for nobody"
    if how == "stop":
        assert shown(page) == before


def test_what_an_answer_names_is_not_fetched(visit: Any) -> None:
    page = visit()
    refused = page.evaluate(
        """() => new Promise(tell => {
            document.addEventListener("securitypolicyviolation", event => tell(event.blockedURI));
            new Image().src = "http://127.0.0.2:9/picture.png";
        })"""
    )
    assert refused.startswith("http://127.0.0.2:9")


def test_two_models_side_by_side_answer_the_same_question(visit: Any, pace: threading.Semaphore) -> None:
    page = visit()
    pace.release(2000)
    page.click("#beside input")
    page.wait_for_selector("#right", state="visible")
    ask(page, "ba de fi")
    for side in ("left", "right"):
        wait_for(page, f"#{side}-status", COMPLETE)
        assert shown(page, side)[0] == "ba de fi"
        assert len(shown(page, side)) == 2


def test_another_model_begins_afresh(visit: Any, pace: threading.Semaphore) -> None:
    page = visit()
    pace.release(2000)
    ask(page, "ba de fi")
    wait_for(page, "#left-status", COMPLETE)
    page.click("#model input")
    page.get_by_role("option", name="other-llama").click()
    page.wait_for_selector("#left [data-testid=user]", state="detached")
    ask(page, "ku")
    wait_for(page, "#left-status", COMPLETE)
    assert shown(page)[0] == "ku"


def test_the_second_visitor_is_told_to_wait_and_the_third_to_come_back(visit: Any, pace: threading.Semaphore) -> None:
    first, second, third = visit(), visit(), visit()
    ask(first, "ba")
    wait_for(first, "#left-status", "Reading|Loading")
    ask(second, "de")
    wait_for(second, "#left-status", "Waiting: 1 before this one")
    ask(third, "fi")
    wait_for(third, "#left-status", "Too many are waiting")
    pace.release(2000)
    for page in (first, second):
        wait_for(page, "#left-status", COMPLETE)


def test_the_command_runs_as_a_module_too(tiny_model_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "vptq.app", "--help"], capture_output=True, text=True, check=False)
    assert "SHARE_LINK" in done.stdout


def test_the_choices_say_how_many_bits() -> None:
    from vptq.app.models import KNOWN_MODELS, known_choice

    labels = [known_choice(model).label for model in KNOWN_MODELS]
    assert labels[3] == "Meta-Llama-3.1-8B-Instruct-v8-k65536-256-woft (3 bits)"
    assert all(label.endswith(" bits)") for label in labels)
