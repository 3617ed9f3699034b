"""`vptq chat` in a pipe, and on a terminal: what is typed, what Ctrl-C does, what the arrow keys bring back."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vptq.cli.chat import _take_turn
from vptq.cli.loading import load
from vptq.conversation import Conversation
from vptq.generation import WORDLESS

Run = Callable[..., tuple[int, str, str]]
STATUS = re.compile(r"\d+ tokens? \| .* \| context \d+ of 256 \| memory [\d.]+ [MG]B")


@pytest.fixture
def piped(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command line with these lines as its standard input."""

    def piped(lines: str, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return run(*arguments)

    return piped


def test_a_pipe_gets_one_answer_a_question_and_nothing_else(
    tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    questions = f"/params max_new_tokens=5\nba de\nfi go\n/nonsense\n/save {tmp_path}/saved.json\nla \xff\n/exit\nmo\n"
    done = subprocess.run(
        [sys.executable, "-m", "vptq", "chat", str(tiny_model_folder), "--device", "cpu"],
        input=questions.encode("latin-1"),  # the \xff is no UTF-8
        capture_output=True,
        timeout=300,
        check=False,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert len(out.splitlines()) == 3, "what comes after /exit is not asked"
    assert set(out.split()) <= set(tiny_tokenizer.get_vocab())
    assert len(STATUS.findall(err)) == 3
    assert re.search("^error: there is no command /nonsense; there are /help, ", err, re.MULTILINE)
    assert "\x1b" not in out + err
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert [message["content"] for message in saved["messages"]][::2] == ["ba de", "fi go"]
    assert [message["content"] for message in saved["messages"]][1::2] == [line.strip() for line in out.splitlines()][
        :2
    ]


@pytest.mark.parametrize("end", ["exit\nba\n", "\nba\n", ""])
def test_the_flags_of_the_published_command_line_chat(
    end: str, piped: Run, tiny_model_folder: Path, tmp_path: Path
) -> None:
    lines = f"/params max_new_tokens=3 temperature=0\nba de\n/save {tmp_path}/saved.json\n/system\n{end}"
    status, out, err = piped(lines, "--model", tiny_model_folder, "--chat", "--chat-system-prompt", "ku ku")
    assert (status, len(out.splitlines())) == (0, 1)
    assert "The system prompt is: ku ku" in err
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert (saved["system_prompt"], len(saved["messages"])) == ("ku ku", 2)


def test_commands_change_what_is_asked(piped: Run, tiny_model_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    lines = [
        *("/params max_new_tokens=3 temperature=0 seed=4", "ba de", "/system ku", f"/save {first}", "/reset"),
        *("fi go", f"/save {second}", "/system none", "/system", f"/load {first}", "/params", "/help"),
    ]
    status, _, err = piped("\n".join(lines), "chat", tiny_model_folder)
    assert status == 0
    stored = [json.loads(path.read_text()) for path in (first, second)]
    assert stored[0]["messages"][0]["content"] == "ba de"
    assert stored[1]["messages"][0]["content"] == "fi go"
    assert [each["system_prompt"] for each in stored] == ["ku", "ku"]
    assert (stored[1]["sampling"]["seed"], stored[1]["sampling"]["top_p"]) == (4, None)
    assert "The system prompt is: (none)" in err
    assert "1 turn loaded" in err
    assert re.search(r"^seed +4", err, re.MULTILINE)
    for name in ("/help", "/reset", "/system", "/save", "/load", "/params", "/exit"):
        assert re.search(rf"^{name} .*\w", err, re.MULTILINE), f"{name} is not in /help"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/load", "/load needs a file"),
        ("/load no-such-file", "cannot read /load no-such-file: No such file"),
        ("/load broken.json", "is no JSON file"),
        ("/load list.json", "no conversation of version 1"),
        ("/load deep.json", "is no JSON file"),
        ("/save", "/save needs a file"),
        ("/save no/such/folder", "cannot write /save"),
        ("/params top_p=2", "top_p is 2.0"),
        ("/params nonsense", "'nonsense' is no setting"),
        ("ba " * 300, "the model's context holds 256"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_the_chat_goes_on(
    line: str, message: str, piped: Run, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("list.json").write_text("[]")
    Path("deep.json").write_text("[" * 100_000)
    status, out, err = piped(f"{line}\n/params max_new_tokens=2\nba\n", "chat", tiny_model_folder)
    assert (status, len(out.splitlines())) == (0, 1)
    (error,) = (each for each in err.splitlines() if each.startswith("error: "))
    assert message in error


@pytest.mark.parametrize(("interactive", "out"), [(True, ""), (False, "\n")])
def test_an_answer_without_a_word_is_said_to_be_one(
    interactive: bool, out: str, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def end_at_once(module: torch.nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        return logits + 1000 * (torch.arange(logits.shape[-1]) == tokenizer.eos_token_id)

    model, tokenizer = load(str(tiny_model_folder))
    model.lm_head.register_forward_hook(end_at_once)
    _take_turn(Conversation(model, tokenizer, ""), "ba de", interactive)
    captured = capsys.readouterr()
    assert captured.out == out
    said, status = captured.err.splitlines()
    assert said == f"{WORDLESS}."
    assert status.startswith("1 token | ")


@pytest.fixture
def plain_tokenizer(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The model's tokenizer without its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_without_a_template_each_line_is_continued(piped: Run, tiny_model_folder: Path, plain_tokenizer: Path) -> None:
    lines = "/params max_new_tokens=3 temperature=0\nba de\nfi go\nba de\n"
    status, out, err = piped(lines, "chat", tiny_model_folder, "--tokenizer", plain_tokenizer)
    assert status == 0
    assert err.count("no chat template") == 1
    answers = out.splitlines()
    assert answers[0] == answers[2] != answers[1]


def test_the_published_flag_without_a_template_continues_the_prompt(
    run: Run, tiny_model_folder: Path, plain_tokenizer: Path
) -> None:
    status, out, err = run("--model", tiny_model_folder, "--tokenizer", plain_tokenizer, "--chat", "--prompt", "ba")
    assert status == 0
    assert "no chat template" in err
    assert err.count("\n") == 1
    assert out.startswith("ba ")


class Terminal:
    """A program on a terminal of its own, as a person sees and types it."""

    def __init__(self, *command: str) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it, and so would their children
            os.environ.update(TERM="xterm", COLUMNS="89")  # words of two letters do not end there
            os.execvp(command[0], command)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, pattern: str, seconds: float = 300) -> str:
        """What is printed up to and with a pattern, which later calls do not see again."""
        ends = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < ends, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._terminal], [], [], 1)[0]:
                self.seen += os.read(self._terminal, 65536).decode()
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def status(self, seconds: float = 300) -> int:
        ends = time.monotonic() + seconds
        while not (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < ends, "it does not end"
            time.sleep(0.1)
        return os.waitstatus_to_exitcode(done[1])


@pytest.fixture
def slow_model_folder(tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """Twenty times the blocks: an answer takes seconds, so that Ctrl-C comes before its end on a quick machine too."""
    config = AutoConfig.from_pretrained(tiny_model_folder)
    config.num_hidden_layers = 40
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "slow")
    tiny_tokenizer.save_pretrained(tmp_path / "slow")
    return tmp_path / "slow"


@pytest.fixture
def terminal(slow_model_folder: Path) -> Iterator[Terminal]:
    terminal = Terminal(sys.executable, "-m", "vptq", "chat", str(slow_model_folder), "--device", "cpu")
    yield terminal
    with suppress(ProcessLookupError, ChildProcessError):  # it has ended by itself
        os.kill(terminal.pid, signal.SIGKILL)
        os.waitpid(terminal.pid, 0)


def test_on_a_terminal_ctrl_c_stops_the_answer_and_arrows_bring_lines_back(terminal: Terminal, tmp_path: Path) -> None:
    up, left, ctrl_c, ctrl_d = "\x1b[A", "\x1b[D", "\x03", "\x04"
    terminal.wait_for("You: ")
    terminal.type("half a line")
    terminal.wait_for("half a line")
    time.sleep(0.5)  # CPython loses a signal that comes between a prompt's last byte and readline's wait for a key
    terminal.type(ctrl_c)
    terminal.wait_for("You: ")
    terminal.type("/params max_new_tokens=200 seed=1 repetition_penalty=50\r")
    terminal.wait_for("You: ")
    terminal.type("ba de fi\r")
    terminal.wait_for(r"ba de fi\r\n[^\r]* ")  # the answer has begun
    terminal.wait_for(r"\x1b\[1D\x1b\[K\r\n\w\w")  # a word that does not fit its line is taken to the next
    terminal.type(ctrl_c)
    terminal.wait_for(r"stopped \| \d+ tokens")
    terminal.wait_for("You: ")
    terminal.type("/params max_new_tokens=2\r")
    terminal.wait_for("You: ")
    terminal.type(f"{up}{up}{left}{left}ku \r")  # "ba de fi" again, with a word put in before the last
    terminal.wait_for(r"2 tokens \|.*You: ")
    terminal.type(f"/save {tmp_path}/said.json\r")
    terminal.wait_for("2 turns saved.*You: ")
    terminal.type(ctrl_d)
    assert terminal.status() == 0
    said = [message["content"] for message in json.loads((tmp_path / "said.json").read_text())["messages"]]
    assert said[::2] == ["ba de fi", "ba de ku fi"]
    assert 0 < len(said[1].split()) < 200, "what there was of the stopped answer is kept"
