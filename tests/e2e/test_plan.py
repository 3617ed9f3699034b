"""Budgets from the command line to the files: kept to the byte, followed when resumed, never worse with more."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import vptq
from vptq.checkpoint import Checkpoint
from vptq.cli import main
from vptq.errors import ConfigError
from vptq.progress import ProgressEvent
from vptq.quantize import measurements
from vptq.quantize.report import load_report

QUICK: dict[str, Any] = {"sequences": 6, "seqlen": 32, "device": "cpu"}
OPTIONS = ("--sequences", "6", "--seqlen", "32", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """Large enough for a choice of codebooks."""
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def stored_bits(folder: Path) -> float:
    """Bits per weight of the quantized layers as the tensors in the files have them."""
    checkpoint = Checkpoint.open(folder)
    layers = checkpoint.layers()
    tensors = (
        t
        for name, t in checkpoint.headers.items()
        if name.rpartition(".")[0].removesuffix(".centroids").removesuffix(".res_centroids") in layers
    )
    bits = sum(8 * tensor.nbytes for tensor in tensors)
    return bits / sum(layer.in_features * layer.out_features for layer in layers.values())


def test_more_budget_never_expects_a_larger_loss(model: Path) -> None:
    plans = [vptq.plan(model, bits=bits, **QUICK) for bits in (1.8, 2.0, 2.3, 2.7, 3.1, 3.6, 4.2, 5.0)]
    losses = [plan.divergence for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2 * losses[0]
    assert all(plan.bits_per_weight <= float(plan.budget.split()[0]) for plan in plans)
    assert len({layer.spec for layer in plans[3].layers}) > 1


def test_a_folder_keeps_to_its_bits(model: Path, tmp_path: Path) -> None:
    plan = vptq.plan(model, bits=2.6, **QUICK)
    report = vptq.quantize(model, tmp_path / "out", bits=2.6, **QUICK)
    assert 2.3 < stored_bits(tmp_path / "out") <= 2.6
    assert stored_bits(tmp_path / "out") == pytest.approx(report.bits_per_weight) == pytest.approx(plan.bits_per_weight)
    assert (report.budget, report.spec) == ("2.6 bits", plan.summary)
    assert load_report(tmp_path / "out") == report
    entries = Checkpoint.open(tmp_path / "out").layers()
    assert {name: (layer.vector_len, layer.num_centroids) for name, layer in entries.items()} == {
        name: (spec.vector_len, spec.num_centroids) for name, spec in plan.specs(vptq.QuantSpec(8, 256)).items()
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "budget | 2.6 bits" in card
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(loaded(input_ids=torch.tensor([[1, 5, 9]])).logits).all()


def test_a_folder_keeps_to_its_size(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the smallest possible is") as caught:
        vptq.plan(model, size="20kB", **QUICK)
    least = re.search(r"possible is ([\d.]+ MB)", str(caught.value))
    assert least is not None
    for size in (least[1], "60kB"):
        plan = vptq.plan(model, size=size, **QUICK)
        vptq.quantize(model, tmp_path / size, size=size, **QUICK)
        written = sum(path.stat().st_size for path in (tmp_path / size).glob("*.safetensors"))
        number = float(re.sub("[^0-9.]", "", size)) * (1e6 if "MB" in size else 1e3)
        assert written <= plan.file_bytes <= number


def test_spec_and_budget_exclude_each_other(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of them"):
        vptq.quantize(model, tmp_path / "out", "v4-k16", bits=3.0, **QUICK)
    with pytest.raises(ConfigError, match="needs a budget"):
        vptq.plan(model, **QUICK)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_follows_its_plan(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(event: ProgressEvent) -> None:
        if event.layer is not None and ".1." in event.layer:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        vptq.quantize(model, out, bits=2.6, **QUICK, progress=interrupt)
    planned = json.loads((tmp_path / "out.work" / "plan.json").read_text())
    with pytest.raises(ConfigError, match=r"--resume: .*budget was .*2\.6.* and is now .*2\.7"):
        vptq.quantize(model, out, bits=2.7, **QUICK, resume=True)
    with pytest.raises(ConfigError, match=r"--resume: .*spec was .*budget was"):
        vptq.quantize(model, out, "v4-k16", **QUICK, resume=True)
    monkeypatch.setattr(measurements, "measure", pytest.fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    report = vptq.quantize(model, out, bits=2.6, **QUICK, resume=True)
    assert report.bits_per_weight == pytest.approx(planned["bits_per_weight"])


def test_a_model_in_memory_has_a_plan(tmp_path: Path) -> None:
    plans = [vptq.plan(tiny("llama", hidden_size=64, intermediate_size=128), bits=2.6, **QUICK) for _ in range(2)]
    assert plans[0] == plans[1]
    assert vptq.Plan.from_dict(json.loads(json.dumps(plans[0].to_dict()))) == plans[0]


def test_plan_and_quantize_from_the_command_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return (int(caught.value.code or 0), *capsys.readouterr())

    file = tmp_path / "plan.json"
    status, out, err = run("plan", model, "--bits", "2.6", *OPTIONS, "--json", file)
    assert status == 0, err
    plan = json.loads(file.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert f"{plan['bits_per_weight']:.4f}" in out
    assert re.search(r"^mlp\.down_proj +2 ", out, re.MULTILINE)
    for spec in {layer["spec"] for layer in plan["layers"]}:
        assert re.search(rf"^{spec} +\d", out, re.MULTILINE)

    monkeypatch.setattr(measurements, "measure", pytest.fail)  # the plan's measurement is found again
    status, out, err = run("quantize", model, "-o", tmp_path / "out", "--bits", "2.6", *OPTIONS)
    assert status == 0, err
    assert re.search(r"^budget +2\.6 bits *$", out, re.MULTILINE)
    assert stored_bits(tmp_path / "out") <= 2.6
    status, out, _ = run("info", tmp_path / "out")
    assert status == 0
    assert all(layer["spec"] in out for layer in plan["layers"])
