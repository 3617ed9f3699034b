"""What is published is whole, described by what its tensors have, and sent to whom it should be: a hub of our own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fake_hub import FakeHub, running_hub
from safetensors.torch import load_file, save_file

import vptq
from vptq import publish
from vptq.cli import main
from vptq.errors import CheckpointError, ConfigError, VPTQError
from vptq.progress import ProgressEvent
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
    assert publication.warnings == ("not sent: eval.json, notes.txt",)
    assert publication.bits_per_weight == pytest.approx(report(folder)["bits_per_weight"])
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


def test_the_command_sends_what_its_options_say(
    folder: Path, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere.json").write_text(json.dumps(EVALUATION))
    options = ["--public", "--eval", str(tmp_path / "elsewhere.json"), "--base-model", "org/tiny", "--license", "mit"]
    hub.files["org/tiny"], hub.licenses["org/tiny"] = {}, "apache-2.0"
    with pytest.raises(SystemExit) as caught:
        main(["push", str(folder), "me/it", *options])
    assert not caught.value.code
    assert f"{hub.url}/me/it" in capsys.readouterr().out
    assert hub.private["me/it"] is False
    card = hub.files["me/it"]["README.md"].decode()
    assert "license: mit\n" in card
    assert "base_model: org/tiny\n" in card
    assert "12.346 (original 10.500)" in card


def test_a_repository_that_is_there_takes_a_new_commit(folder: Path, hub: FakeHub) -> None:
    hub.files["me/it"] = {"README.md": b"old"}
    upload(prepare(folder, "me/it", license="mit"))
    assert b"bits per weight" in hub.files["me/it"]["README.md"]


def test_the_original_is_whom_the_report_names_on_the_hub(folder: Path, hub: FakeHub) -> None:
    (folder / "report.json").write_text(json.dumps(report(folder) | {"model": "org/tiny"}))
    hub.files["org/tiny"], hub.licenses["org/tiny"] = {}, "apache-2.0"
    card = prepare(folder, "me/it").card
    assert "base_model: org/tiny\n" in card
    assert "license: apache-2.0\n" in card


def test_without_a_report_the_card_is_the_one_that_is_there(folder: Path, hub: FakeHub) -> None:
    (folder / "report.json").unlink()
    (folder / "README.md").write_text("mine")
    assert prepare(folder, "me/it").card == "mine"
    (folder / "README.md").unlink()
    with pytest.raises(ConfigError, match="neither a report"):
        prepare(folder, "me/it")


def test_a_missing_tokenizer_is_told_and_so_is_each_layer_read(folder: Path, hub: FakeHub) -> None:
    for path in folder.glob("token*.json"):
        path.unlink()
    events: list[ProgressEvent] = []
    assert any("no tokenizer" in warning for warning in prepare(folder, "me/it", tell=events.append).warnings)
    assert [(event.done, event.total) for event in events] == [(done, 14) for done in range(1, 15)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"repo": "me/it/too"}, "'me/it/too' is no name of a repository"),
        ({"base_model": "no name"}, "--base-model is 'no name'"),
        ({"license": "as is"}, "--license is 'as is'"),
    ],
)
def test_what_is_no_name_is_refused(names: dict[str, str], message: str, folder: Path, hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(folder, **({"repo": "me/it"} | names))


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def repeat_columns(folder: Path) -> None:
    """Shapes and types are right: it only shows when a layer is read whole."""
    shard, config = folder / "model-00001-of-00001.safetensors", json.loads((folder / "config.json").read_text())
    path, entry = next(iter(config["quantization_config"]["config_for_layers"].items()))
    entry["enable_perm"] = True
    save_file(load_file(shard) | {f"{path}.perm": torch.zeros(entry["in_features"], dtype=torch.int16)}, shard)
    (folder / "config.json").write_text(json.dumps(config))


def break_shard(folder: Path) -> None:
    shard = folder / "model-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def forget_quantization(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage",
    [
        repeat_columns,
        break_shard,
        forget_quantization,
        lambda folder: (folder / "model-00001-of-00001.safetensors").unlink(),
    ],
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
    monkeypatch.setattr(publish, "hub_is_out_of_reach", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", Mock(side_effect=OSError("cable")))
    with pytest.raises(VPTQError, match="me/it could not be sent: cable; nothing of it is published"):
        upload(publication)


@pytest.mark.parametrize("text", ["[]", "{", '{"texts": [{}], "tasks": []}'])
def test_what_is_no_evaluation_is_refused(text: str, folder: Path, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(ConfigError, match="is not what vptq eval --json writes"):
        prepare(folder, "me/it", tmp_path / "eval.json")
