"""Commands on a quantized folder: info, eval, and generating text."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from vptq.cli import main
from vptq.cli.info import _layer_table
from vptq.config import LayerConfig
from vptq.quantize.report import LayerReport, Report, save_report


@pytest.fixture(scope="module")
def stored(make_checkpoint: Callable[..., Any], tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    """A quantized Llama with every kind of layer, and the tokenizer beside it."""
    checkpoint = make_checkpoint()
    tiny_tokenizer.save_pretrained(checkpoint.folder)
    return checkpoint


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_info_shows_true_bits_sizes_and_every_layer(
    stored: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run(capsys, "info", stored.folder)
    assert status == 0
    configs = {name: weight.config for name, weight in stored.weights.items()}
    bits = 0
    for name, weight in stored.weights.items():
        tensors = weight.to_tensors(stored.tensors["model.norm.weight"].dtype)
        stored_bits = sum(tensor.numel() * tensor.itemsize * 8 for key, tensor in tensors.items() if key != "bias")
        bits += stored_bits
        row = next(line for line in out.splitlines() if line.startswith(name))
        config = configs[name]
        assert f"{config.out_features} x {config.in_features}" in row
        assert f"v{config.vector_len}-k{config.num_centroids}" in row
        assert row.split()[-1] == f"{stored_bits / (config.out_features * config.in_features):.3f}"
    weights = sum(config.out_features * config.in_features for config in configs.values())
    assert re.search(rf"bits per weight +{bits / weights:.3f}", out)
    assert f"{len(configs)} quantized, {weights:,} weights" in out


def test_layers_are_listed_by_number() -> None:
    config = LayerConfig(in_features=8, out_features=8, vector_len=4, num_centroids=4)
    names = ["layers.10.q", "layers.2.q", "layers.2.k", "norm", "layers.head"]
    cells = list(_layer_table(dict.fromkeys(names, config), report=None).columns[0].cells)
    assert cells == ["layers.head", "layers.2.k", "layers.2.q", "layers.10.q", "norm"]


def test_info_leaves_the_layers_out_when_told(stored: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "info", stored.folder, "--no-layers")
    assert status == 0
    assert "bits per weight" in out
    assert not any(name in out for name in stored.weights)


def test_info_adds_what_the_report_knows(
    stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = stored.write(tmp_path / "model")
    name, weight = next(iter(stored.weights.items()))
    layer = LayerReport(name, weight.config.to_entry(), 3.0, {"k-means": 0.2, "refit": 0.0321}, 1.0, 0.01)
    report = Report("original-name", "v4-k16", 3.0, [layer], 1.0, 1, "some text", 0, 1, 2)
    save_report(report, folder)
    status, out, _ = run(capsys, "info", folder)
    assert status == 0
    assert "original-name" in out
    assert next(line for line in out.splitlines() if line.startswith(name)).endswith("3.210%")


def test_info_of_a_damaged_folder_is_one_line(stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stored.write(tmp_path / "model")
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    status, out, err = run(capsys, "info", folder)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_eval_and_generate_take_a_quantized_folder(
    stored: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, figures = tmp_path / "text.txt", tmp_path / "figures.json"
    text.write_text("ba de fi go ku " * 20)
    arguments = ("--text", text, "--seqlen", "20", "--json", figures, "--dtype", "float32", "--device", "cpu")
    status, _, _ = run(capsys, "eval", stored.folder, "--reference", stored.folder, *arguments)
    assert status == 0
    measured = json.loads(figures.read_text())
    assert measured["windows"] == 5
    assert measured["perplexity"] > 1
    assert measured["kl_divergence"] == pytest.approx(0, abs=1e-9)
    status, out, _ = run(capsys, "--model", stored.folder, "--prompt", "ba de")
    assert status == 0
    assert out.startswith("ba de")


def test_quantize_writes_a_folder_that_every_command_takes(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "quantized"
    text.write_text("ba de fi go ku lo ma " * 200)
    arguments = ("--spec", "v4-k16", "--calibration", text, "--sequences", "4", "--seqlen", "32", "--device", "cpu")
    status, out, err = run(capsys, "quantize", tiny_model_folder, "-o", folder, *arguments)
    assert status == 0, err
    report = json.loads((folder / "report.json").read_text())
    assert f"{report['bits_per_weight']:.3f}" in out
    assert "14 layers" in out
    assert all(layer["name"] in err for layer in report["layers"]), "every layer's line stays on the screen"
    assert f"{report['quantized_weights']:,} weights" in out
    status, out, _ = run(capsys, "info", folder)
    assert status == 0
    assert f"{report['bits_per_weight']:.3f}" in out
    status, out, _ = run(
        *(capsys, "eval", folder, "--reference", tiny_model_folder),
        *("--text", text, "--seqlen", "32", "--windows", "2", "--device", "cpu"),
    )
    assert status == 0
    status, _, err = run(capsys, "quantize", tiny_model_folder, "-o", folder, *arguments)
    assert status == 1
    assert "--overwrite" in err


def test_without_spec_and_budget_three_bits_suit_the_layers(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--sequences", "2", "--seqlen", "16", "--device", "cpu")
    status, out, err = run(capsys, "quantize", tiny_model_folder, "-o", tmp_path / "quantized", *arguments)
    assert status == 0, err
    assert re.search(r"^spec +v4-k64-64 *$", out, re.MULTILINE), (
        "the smallest codebooks of 3 bits, for layers this small"
    )
    assert "sampled from the model itself (seed 0)" in out
