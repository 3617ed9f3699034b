"""Every command and Python block of README and docs runs, on a model small enough to make on the spot.

A line stays as it is printed: the working directory has the folders and texts that it names, and the hub with its data
sets is a stand-in. What would take too long is shrunk by the tables below and nowhere else, so that a line which a page
gains is run without a change here.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from doc_pages import arguments_of, blocks, shell_lines, words_of
from fake_hub import FakeHub, running_hub
from tiny_llama import WORDS, save_llama
from visitor import free_port, visiting

import vptq
from vptq.evaluate import throughput
from vptq.source import load_tokenizer
from vptq.text import NAMED

Run = Callable[..., tuple[int, str, str]]
Provide = Callable[[list[str]], None]

# Values that are too much for a context of 256 tokens and a test of seconds.
SMALL = {
    **{"--spec": "v4-k16-4", "--sequences": "2", "--seqlen": "32", "--windows": "2", "--limit": "2"},
    **{"--ray": "local"},  # there is no cluster
    **{"--prompt-tokens": "8", "--tokens": "4", "--rounds": "1"},
}
# Where the defaults are too much as well.
SMALL_DEFAULTS = {
    **dict.fromkeys(("quantize", "finetune", "plan"), ("--sequences", "--seqlen")),
    "eval": ("--seqlen",),
    "bench": ("--prompt-tokens", "--tokens", "--rounds"),
}
# The same for Python; and there may be no GPU, which is device 0.
SMALL_PYTHON = {
    'spec="v8-k65536-256"': 'spec="v4-k16-4", sequences=2, seqlen=32',
    'max_memory={0: "10GiB", ': "max_memory={",
}
SERVERS = ("serve", "app")  # they run until Ctrl-C

LINES = [line for line in shell_lines() if arguments_of(words_of(line)[0]) is not None]
CLIENTS = [code for code in blocks("python") if "import openai" in code]  # they ask `vptq serve`
PYTHON = [code for code in blocks("python") if code not in CLIENTS]
TEXT = " ".join(WORDS * 20)
QUESTIONS = "ba de\nfi go\n"


@pytest.fixture(scope="module")
def original(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of a size for which the budgets that pages name, from 2.25 to 3 bits, can be met."""
    folder = tmp_path_factory.mktemp("original") / "tiny"
    save_llama(folder, tiny_tokenizer, hidden_size=128, intermediate_size=192)
    return folder


@pytest.fixture(scope="module")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized folder with the figures that `vptq compare` and `vptq push` look for."""
    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    text = folder.with_name("text.txt")
    text.write_text(TEXT)
    vptq.quantize(original, folder, "v4-k16", sequences=2, seqlen=32)
    figures = vptq.evaluate(folder, original, str(text), seqlen=32, windows=2).to_dict()
    (folder / "eval.json").write_text(json.dumps(figures))
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that takes what is pushed, and whose named data sets are `TEXT`."""
    import datasets

    load_dataset, named = datasets.load_dataset, {text.path for text in NAMED.values()}

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return [{"text": TEXT}] if path in named else load_dataset(path, *arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


@pytest.fixture
def provide(original: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Provide:
    """Puts what words name into a working directory that begins empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(throughput, "TRIAD_BYTES", 1 << 20)  # an array to measure memory bandwidth with
    monkeypatch.setattr(throughput, "peak_of_model", lambda *_, **__: 1 << 20)  # starts a process, which takes seconds

    def provide(words: list[str]) -> None:
        for word in words:
            if word.isupper():
                shutil.copytree(original if word in ("MODEL", "FOLDER") else quantized, word)
            elif word.endswith(".txt"):
                Path(word).write_text(QUESTIONS if word == "questions.txt" else TEXT)

    return provide


def value_of(option: str, arguments: list[str]) -> str:
    return arguments[arguments.index(option) + 1] if option in arguments else ""


def shrunk(arguments: list[str]) -> list[str]:
    """The same with values of `SMALL`: of an option that is given twice the last value counts."""
    options = [option for option in SMALL if option in (*arguments, *SMALL_DEFAULTS.get(arguments[0], ()))]
    return arguments + [word for option in options for word in (option, SMALL[option])]


def with_tasks(arguments: list[str], tiny_task_dir: Path) -> list[str]:
    """Has tasks by the names in a line: lm-eval's own have their data on the hub."""
    folder = Path(value_of("--task-dir", arguments) or "tasks")
    folder.mkdir()
    for name in value_of("--tasks", arguments).split(","):
        task = (tiny_task_dir / "tiny_choices.yaml").read_text()
        (folder / f"{name}.yaml").write_text(task.replace("tiny_choices", name))
    return [*arguments, "--task-dir", str(folder)]


@pytest.mark.parametrize("line", [line for line in LINES if words_of(line)[0][1] not in SERVERS])
def test_a_command_does_its_work(
    line: str, run: Run, provide: Provide, hub: FakeHub, tiny_task_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, files = words_of(line)
    arguments = arguments_of(words) or []
    written = [value_of(option, arguments) for option in ("-o", "--json", "--picture")]
    provide([word for word in (*arguments, files.get("<", "")) if word not in written])
    if "--tasks" in arguments:
        arguments = with_tasks(arguments, tiny_task_dir)
    if "--ray" in arguments:
        pytest.importorskip("ray")
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray writes a token into the home folder
    if arguments == ["--install-completion"]:
        monkeypatch.setenv("HOME", str(Path.cwd()))
        monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(Path(files["<"]).read_text() if "<" in files else QUESTIONS))
    with redirect_stdout(Path(files[">"]).open("w")) if ">" in files else nullcontext():
        status, out, err = run(*shrunk(arguments))
    assert status == 0, err
    assert (Path(files[">"]).read_text() if ">" in files else out).strip()
    for path in map(Path, filter(None, written)):
        assert (path / "config.json" if path.suffix == "" else path).stat().st_size
    if arguments[0] == "push":
        assert hub.files.keys() == (set() if "--dry-run" in arguments else {arguments[2]})


@pytest.mark.parametrize("line", [line for line in LINES if words_of(line)[0][1] in SERVERS])
def test_a_server_answers_until_ctrl_c(line: str, run: Run, provide: Provide) -> None:
    arguments, port = arguments_of(words_of(line)[0]) or [], free_port()
    provide(arguments)

    def visit() -> str:
        if arguments[0] == "app":
            return urllib.request.urlopen(f"http://127.0.0.1:{port}").read().decode()
        with redirect_stdout(io.StringIO()) as answer:
            for code in CLIENTS:
                exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{port}"), {})
        return answer.getvalue()

    with visiting(port, visit) as said:
        status, _, err = run(*arguments, "--port", str(port))
    assert status in (0, 130), err  # 130 is "interrupted", which Gradio does not pass on once it only waits
    assert said[0].strip()


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str, provide: Provide, capsys: pytest.CaptureFixture[str]) -> None:
    provide(["MODEL"] if '"MODEL"' in code else ["DIR"])
    for long, short in SMALL_PYTHON.items():
        code = code.replace(long, short)
    given: dict[str, Any] = {"batches": [torch.arange(8)[None]]}  # by the reader's own program
    if "model, tokenizer" in code:
        given |= {"model": vptq.AutoModelForCausalLM.from_pretrained("DIR"), "tokenizer": load_tokenizer("DIR")}
    exec(code, given)
    assert ("print(" in code) == bool(capsys.readouterr().out.strip())
