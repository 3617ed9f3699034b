"""What is published is whole, described by what its tensors have, and sent to whom it should be: a hub of our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, running_hub

import vptq
from vptq import publish
from vptq.cli import main
from vptq.errors import CheckpointError, ConfigError, VPTQError
from vptq.publish import prepare, upload

EVALUATION: dict[str, Any] = {
    "texts": [
        {"text": "/home/me/news.txt", "windows": 3, "seqlen": 64, "perplexity": 12.3456, "reference_perplexity": 10.5,
         "kl_divergence": 0.2501, "same_top_token": 0.8}
    ],
    "tasks": [
        {"task": "piqa", "examples": 1000, "metrics": {"acc": {"value": 0.7, "stderr": 0.01}},
         "reference_metrics": {"acc": {"value": 0.75, "stderr": 0.01}}}
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    vptq.quantize(tiny_model_folder, folder, "v4-k16", sequences=2, seqlen=16, seed=7)
    return folder


@pytest.fixture
def folder(quantized: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(quantized, tmp_path / "tiny"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that this process takes for the real one, and a token for it."""
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def test_what_arrives_is_the_folder_with_a_new_card(folder: Path, hub: FakeHub, tmp_path: Path) -> None:
    (folder / "eval.json").write_text(json.dumps(EVALUATION))
    (folder / "notes.txt").write_text("not for others")
    hub.files["org/tiny"], hub.licenses["org/tiny"] = {}, "apache-2.0"
    publication = prepare(folder, "me/it", base_model="org/tiny")
    url = upload(publication)
    assert url == f"{hub.url}/me/it"
    arrived = hub.files["me/it"]
    assert {name: len(data) for name, data in arrived.items()} == publication.sizes
    card = arrived.pop("README.md").decode()
    assert all((folder / name).read_bytes() == data for name, data in arrived.items())
    assert {"config.json", "model-00001-of-00001.safetensors", "tokenizer.json", "report.html"} < set(arrived)
    assert not {"notes.txt", "eval.json"} & set(arrived)
    assert any("notes.txt" in warning for warning in publication.warnings)
    for fact in (
        *("license: apache-2.0\n", "base_model: org/tiny\n", f"**{publication.bits_per_weight:.3f} bits per weight**"),
        "| perplexity (news.txt, 3 x 64 tokens) | 12.346 (original 10.500) |",
        "| KL to the original, nats per token (news.txt, 3 x 64 tokens) | 0.2501 |",
        "| acc (piqa, 1,000 examples) | 0.7000 ± 0.0100 (original 0.7500) |",
        "vptq quantize tiny-llama -o DIR --spec v4-k16 --sequences 2 --seqlen 16 --seed 7 --dtype bfloat16",
    ):
        assert fact in card
    assert str(tmp_path) not in card
    for name, data in arrived.items():
        assert str(tmp_path).encode() not in data, f"{name} says where the folder was"


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_is_private_unless_it_should_not_be(public: bool, folder: Path, hub: FakeHub) -> None:
    upload(prepare(folder, "me/it", license="mit"), public=public)
    assert hub.private["me/it"] is not public


def break_shard(folder: Path) -> None:
    shard = folder / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def forget_quantization(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage",
    [break_shard, forget_quantization, lambda folder: (folder / "model-00001-of-00001.safetensors").unlink()],
)
def test_a_folder_that_cannot_be_read_is_not_sent(damage: Callable[[Path], None], folder: Path, hub: FakeHub) -> None:
    damage(folder)
    with pytest.raises(CheckpointError):
        prepare(folder, "me/it")
    assert hub.requests == []


def test_a_dry_run_lists_and_sends_nothing(folder: Path, hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["push", str(folder), "me/it-v8-k65536", "--dry-run"])
    assert not caught.value.code
    captured = capsys.readouterr()
    for name in ("config.json", "README.md", "model-00001-of-00001.safetensors"):
        assert name in captured.out
    assert "says v8-k65536, but 100% of the weights have other codebooks" in " ".join(captured.err.split())
    assert hub.files == {}


def test_a_token_that_is_missing_or_wrong_is_one_line(folder: Path, hub: FakeHub, monkeypatch: Any) -> None:
    publication = prepare(folder, "me/it")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(VPTQError, match=r"^the hub refuses me/it: 401 [^\n]*may write there"):
        upload(publication)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="no token for the hub: set HF_TOKEN"):
        upload(publication)


def test_without_a_network_it_is_one_line(folder: Path, hub: FakeHub, monkeypatch: Any) -> None:
    publication = prepare(folder, "me/it")
    monkeypatch.setattr(publish, "hub_is_out_of_reach", lambda: True)
    with pytest.raises(ConfigError, match="the hub cannot be reached"):
        upload(publication)


@pytest.mark.parametrize("text", ["[]", "{", '{"texts": [{}], "tasks": []}'])
def test_what_is_no_evaluation_is_refused(text: str, folder: Path, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ConfigError, match="is not what vptq eval --json writes"):
        prepare(folder, "me/it", tmp_path / "eval.json")
