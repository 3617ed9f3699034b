"""`vptq serve` checks what it is told before it loads anything, and stops in order when a signal says so."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="the official client is not installed: pip install openai")
pytest.importorskip("uvicorn", reason="the extra is not installed: pip install 'vptq[serve]'")

import openai

from vptq.cli import main
from vptq.serve.listen import bind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "TAKEN"], "--port"),
        (["--host", "no-such-host.invalid"], "--host no-such-host.invalid"),
        (["--context", "100000"], "--context is 100000; the model was made for at most 256"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], message: str, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        options = ["--port", "0", *options] if "--port" not in options else options
        with pytest.raises(SystemExit) as caught:
            main(["serve", str(tiny_model_folder), *(port if option == "TAKEN" else option for option in options)])
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.slow
def test_a_signal_stops_it_after_the_last_answer(tiny_model_folder: Path) -> None:
    command = [sys.executable, "-m", "vptq", "serve", str(tiny_model_folder), "--port", "0", "--name", "small"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        ready: Any = re.fullmatch(r"small is at (http://127\.0\.0\.1:\d+/v1)\n", process.stderr.readline())
        client = openai.OpenAI(base_url=ready[1], api_key="unused", max_retries=0)
        chunks = client.completions.create(model="small", prompt="ba", max_tokens=200, temperature=0, stream=True)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] is not None
        assert process.wait(60) == -signal.SIGTERM
        assert process.stderr.read() == ""
