"""The command line keeps its promises: options, help, exit status, one line per error."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from transformers import PreTrainedTokenizerBase

from vptq.cli import app

README = Path(__file__).parents[2] / "README.md"
COMMANDS: Any = typer.main.get_command(app)

# What scripts out there rely on; options may be added, and none of these may go.
PROMISED = {
    "": {
        "--install-completion",
        "--show-completion",
        "--model",
        "--tokenizer",
        "--prompt",
        "--chat",
        "--chat-system-prompt",
    },
    "quantize": {
        *("-o", "--output", "--spec", "--bits", "--calibration", "--sequences", "--seqlen", "--seed", "--device"),
        *("--size", "--dtype", "--hessian-dir", "--hessian-inputs", "--overwrite", "--resume"),
        *("--norm", "--no-norm", "--perm", "--no-perm", "--absorb-perm", "--no-absorb-perm", "--rotate"),
        *("--hessian", "--finetune", "--lm-head", "--move-indices", "--workers"),
    },
    "finetune": {
        *("-o", "--output", "--calibration", "--sequences", "--seqlen", "--seed", "--device", "--overwrite"),
        *("--resume", "--move-indices", "--progress", "--quiet"),
    },
    "eval": {
        *("--reference", "--text", "--seqlen", "--windows", "--json", "--device", "--dtype"),
        *("--tasks", "--task-dir", "--limit", "--batch-size", "--progress", "--quiet"),
    },
    "plan": {
        *("--bits", "--size", "--calibration", "--sequences", "--seqlen", "--seed", "--device", "--dtype", "--json"),
        *("--norm", "--no-norm", "--perm", "--no-perm", "--absorb-perm", "--no-absorb-perm", "--rotate"),
        *("--lm-head", "--progress", "--quiet"),
    },
    "info": {"--layers", "--no-layers", "--indices", "--picture"},
    "chat": {"--tokenizer", "--system", "--codebook-form", "--device", "--dtype"},
    "bench": {
        *("--reference", "--prompt-tokens", "--tokens", "--rounds", "--threads", "--codebook-form", "--json"),
        *("--device", "--dtype", "--progress", "--quiet"),
    },
    "push": {"--public", "--eval", "--base-model", "--license", "--dry-run", "--progress", "--quiet"},
    "compare": {"-o", "--output", "--json"},
    "serve": {
        "--host",
        "--port",
        "--name",
        "--api-key",
        "--context",
        "--queue",
        "--max-body",
        "--grace",
        "--tokenizer",
    },
    "app": {"--host", "--port", "--published", "--no-published", "--queue"},
    "env": set(),
    "doctor": {"--hub", "--json"},
}

Run = Callable[..., tuple[int, str, str]]


def command(name: str) -> Any:
    return COMMANDS.commands[name] if name else COMMANDS


@pytest.mark.parametrize("name", PROMISED)
def test_help_names_every_option_in_full(name: str, run: Run) -> None:
    status, out, _ = run(*name.split(), "--help")
    assert status == 0
    options = {flag for parameter in command(name).params for flag in (*parameter.opts, *parameter.secondary_opts)}
    options = {option for option in options if option.startswith("-")}
    assert options >= PROMISED[name]
    for option in options:
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", out), f"{option} is not in the help of {name!r}"
    for parameter in command(name).params:
        if parameter.help:
            assert "".join(parameter.help.split()) in "".join(out.split()), "a help text is cut off"


def test_every_command_is_in_the_help(run: Run) -> None:
    _, out, _ = run("--help")
    assert set(PROMISED) == {"", *COMMANDS.commands}
    for name in COMMANDS.commands:
        assert re.search(rf"^  {name} +\S.*[^.]\.$", out, re.MULTILINE), f"{name} is missing or its line is cut off"


def test_the_readme_shows_every_command() -> None:
    shown = set(re.findall(r"^vptq (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert shown == set(COMMANDS.commands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model"),
        (["--no-such-option"], "No such option"),
        (["nonsense"], "No such command"),
        (["quantize", "model"], "--output"),
        (["quantize", "model", "-o", "out", "--spec", "v8-k256", "--bits", "2"], "not more"),
        (["plan", "model", "--size", "1GB", "--bits", "2"], "one of --bits and --size"),
        (["quantize", "model", "-o", "out", "--resume", "--overwrite"], "not both"),
        (["quantize", "model", "-o", "out", "--sequences", "0"], "--sequences"),
        (["quantize", "model", "-o", "out", "--dtype", "int8"], "--dtype"),
        (["eval"], "MODEL"),
        (["eval", "model", "--seqlen", "1"], "--seqlen"),
        (["eval", "model", "--tasks", "piqa", "--limit", "0"], "--limit"),
        (["eval", "model", "--tasks", "piqa", "--batch-size", "0"], "--batch-size"),
        (["eval", "model", "--tasks", " , "], "--tasks"),
        (["chat"], "MODEL"),
        (["bench", "model", "--tokens", "1"], "--tokens"),
        (["compare"], "DIR"),
        (["info", "model", "--picture", "x.png"], "--picture"),
        (["serve"], "MODEL"),
        (["push", "DIR"], "REPO"),
        (["eval", "model", "--progress", "xml"], "--progress"),
        (["serve", "model", "--port", "70000"], "--port"),
        (["app", "--port", "0"], "--port"),
        (["info"], "SPEC"),
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "MODEL", "-o", "out", "--spec", "nonsense"], "not a quantization spec"),
        (["quantize", "MODEL", "-o", "out", "--spec", "v8-k1000"], "power of two"),
        (["quantize", "MODEL", "-o", "out", "--spec", "v7-k256"], "no kernel takes"),
        (["quantize", "MODEL", "-o", "out", "--bits", "7"], "--bits is 7; this model's layers can take"),
        (["quantize", "MODEL", "-o", "out", "--size", "1kB"], "the smallest possible is"),
        (["plan", "MODEL", "--bits", "0.5"], "--bits is 0.5; this model's layers can take"),
        (["plan", "MODEL", "--bits", "2", "--json", "no/such/folder/file.json"], "--json"),
        (["quantize", "./missing", "-o", "out"], "no model at ./missing"),
        (["quantize", "./missing", "-o", "out", "--spec", "v4-k16"], "no model at ./missing"),
        (["quantize", "MODEL", "-o", "out", "--spec", "v4-k16", "--calibration", "./no.txt"], "./no.txt"),
        (["quantize", "MODEL", "-o", "out", "--spec", "v4-k16", "--calibration", "EMPTY"], "is empty"),
        (["quantize", "MODEL", "-o", "MODEL", "--spec", "v4-k16"], "exists"),
        (["eval", "./missing"], "no model at ./missing"),
        (["eval", "MODEL", "--text", "./no.txt"], "no text at"),
        (["eval", "MODEL", "--text", "EMPTY"], "is empty"),
        (["eval", "MODEL", "--text", "TEXT", "--json", "no/such/folder/file.json"], "--json"),
        (["eval", "MODEL", "--tasks", "piqa", "--task-dir", "./no"], "no folder no to read task files from"),
        (["eval", "MODEL", "--limit", "3"], "there are no tasks"),
        (["eval", "MODEL", "--tasks", "piqa", "--windows", "3"], "only tasks are measured"),
        (["serve", "./missing"], "no model at ./missing"),
        (["push", "./missing", "me/it"], "no folder missing"),
        (["push", "MODEL", "a/b/c"], "no name of a repository"),
        (["push", "MODEL", "me/it"], "not a quantized model"),
        (["app", "./missing"], "no model at ./missing"),
        (["app", "--no-published"], "no model to offer"),
        (["info", "./missing"], "no folder ./missing"),
        (["info", "Llama-3-8B"], "not a quantization spec"),
        (["info", "MODEL"], "not a quantized model"),
        (["--model", "./missing"], "no model at ./missing"),
        (["chat", "./missing"], "no model at ./missing"),
        (["bench", "./missing"], "no model at ./missing"),
        (["bench", "MODEL", "--prompt-tokens", "250"], "do not fit the context"),
        (["bench", "MODEL", "--json", "no/such/folder/file.json"], "--json"),
        (["compare", "./missing"], "no folder missing"),
        (["compare", "MODEL"], "not a quantized model"),
        (["compare", "MODEL", "-o", "no/such/folder/picture.png"], "--output"),
        (["info", "MODEL", "--indices"], "not a quantized model"),
        (["info", "v8-k256", "--indices"], "--indices"),
        (["--model", "MODEL", "--codebook-form", "int4"], "allowed are exact and int8"),
    ],
)
def test_an_error_is_one_line_exit_1_and_nothing_written(
    arguments: list[str],
    message: str,
    run: Run,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "text.txt").write_text("ba de fi go ku " * 50)
    places = {"MODEL": tiny_model_folder, "EMPTY": tmp_path / "empty.txt", "TEXT": tmp_path / "text.txt"}
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path, tiny_model_folder)
    status, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert status == 1
    assert out == ""
    *progress, error = err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert not any(line.startswith("error") for line in progress)
    assert snapshot(tmp_path, tiny_model_folder) == before


def snapshot(*folders: Path) -> dict[Path, int]:
    """Every file and folder, with when a file was last written; a folder's own time tells of what is gone again."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.stat().st_mtime_ns if path.is_file() else 0 for path in paths}


def test_info_of_a_published_name(run: Run) -> None:
    status, out, _ = run("info", "Meta-Llama-3.1-70B-Instruct-v8-k65536-256-woft")
    assert status == 0
    facts = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in out.splitlines() if "  " in line.strip())
    assert facts["spec"] == "v8-k65536-256"
    assert facts["index bits per weight"] == "3"
    assert facts["main codebook"] == "65,536 centroids"
    assert facts["residual codebook"] == "256 centroids"
    assert facts["size"].startswith("about 26.2 GB for 70B weights, 140 GB in 16 bits")
    # 4096^2 / 8 vectors of 24 bits, codebooks of 65792 x 8 float16; 16-bit perm, scale and bias of 4096 columns
    true_bits = (4096**2 // 8 * 24 + 65792 * 8 * 16 + 3 * 4096 * 16) / 4096**2
    assert facts["4096 x 4096"].endswith(f"{true_bits:.3f}")


def test_a_prompt_is_continued(run: Run, tiny_model_folder: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    status, out, _ = run("--model", tiny_model_folder, "--prompt", "ba de fi")
    assert status == 0
    words = out.split()
    assert words[:3] == ["ba", "de", "fi"]
    assert len(words) > 3
    assert set(words) <= set(tiny_tokenizer.get_vocab())


def test_the_module_runs_the_same_commands(tiny_model_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vptq", "info", "v8-k256"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "256 centroids" in done.stdout


def test_help_is_instant() -> None:
    """No torch, no transformers: seconds that a mistyped option should not cost."""
    code = (
        "import sys\n"
        "from vptq.cli import main\n"
        "try: main(['quantize', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
