"""A hub model comes into the cache with somebody watching, from a hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import running_hub

from vptq.download import wanted


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], ["model.safetensors"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["weights.safetensors", "pytorch_model.bin"], ["weights.safetensors"]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["original/model.safetensors"], []),
    ],
)
def test_weights_are_fetched_once_and_only_those_that_are_read(names: list[str], weights: list[str] | None) -> None:
    others = ["config.json", "tokenizer.model", "chat_template.jinja"]
    assert wanted([*others, "README.md", "picture.png", *names]) == others + (names if weights is None else weights)


def test_a_command_tells_how_much_has_come_and_fetches_nothing_twice(tiny_model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ba de fi go ku " * 8)
    with running_hub() as hub:
        hub.files["org/tiny"] = {path.name: path.read_bytes() for path in tiny_model_folder.iterdir()}
        weights = hub.files["org/tiny"]["model.safetensors"]
        hub.files["org/tiny"] |= {"pytorch_model.bin": bytes(10), "notes.md": b"notes"}
        command = [sys.executable, "-m", "vptq", "eval", "org/tiny", "--text", str(text), "--seqlen", "16"]
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        for attempt in range(2):
            options = ["--progress", "json"] if attempt == 0 else ["--quiet"]
            done = subprocess.run(
                [*command, *options], env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, done.stderr
            assert "perplexity" in done.stdout
            if attempt == 0:
                lines = [json.loads(line) for line in done.stderr.splitlines()]
            else:
                assert done.stderr == ""
        fetched = [path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    last = [line for line in lines if line["stage"] == "downloading org/tiny (MB)"][-1]
    assert last["done"] == last["total"] == sum(map(len, (weights,))) // 1_000_000
    assert fetched.count("model.safetensors") == 1
    assert not {"pytorch_model.bin", "notes.md"} & set(fetched)
