"""End-to-end finetuning on tiny models: what moves, what stays, and that it never does harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import FAMILIES, job_for, tiny
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

import vptq
from vptq.errors import CalibrationError, ConfigError
from vptq.progress import ProgressEvent
from vptq.quantize import activations, finetune, finetune_folder, setup
from vptq.quantize.report import Report, load_report
from vptq.quantize.student import Student
from vptq.quantize.training import Trainer, TrainingConfig
from vptq.quantize.weights import WeightFiles

QUICK: dict[str, Any] = {"sequences": 12, "seqlen": 24}
SPEC = "v4-k16"


def tensors(folder: Path) -> dict[str, Tensor]:
    files = WeightFiles(folder)
    return {name: files.load(name) for name in files}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def untrained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The same calibration text as with finetuning, whose held-out sequences are sampled together with the others.
    folder = tmp_path_factory.mktemp("untrained") / "out"
    rate = TrainingConfig(rate=100.0)  # thrown away
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "TrainingConfig", lambda: rate)
        vptq.quantize(tiny_model_folder, folder, SPEC, finetune="e2e", **QUICK)
    return folder


@pytest.fixture(scope="module")
def finetuned(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("finetuned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "TrainingConfig", lambda: TrainingConfig(rate=1e-2, epochs=4))
        return folder, vptq.quantize(tiny_model_folder, folder, SPEC, finetune="e2e", **QUICK)


def divergence(folder: Path, original: Path, tokens: Tensor) -> float:
    """KL(original || folder) a token, computed here from whole logits."""
    models = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (original, folder))
    with torch.no_grad():
        p, q = (functional.log_softmax(model(input_ids=tokens).logits, -1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_divergence_falls_on_text_that_was_not_trained_on(
    finetuned: tuple[Path, Report], untrained: Path, tiny_model_folder: Path
) -> None:
    folder, report = finetuned
    assert report.finetuning["after"] < 0.9 * report.finetuning["before"]
    original = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    torch.manual_seed(5)
    tokens = original.generate(torch.full((16, 1), 1), do_sample=True, max_new_tokens=23, min_new_tokens=23)
    assert divergence(folder, tiny_model_folder, tokens) < 0.9 * divergence(untrained, tiny_model_folder, tokens)


def test_indices_embeddings_and_head_stay_and_the_rest_moves(finetuned: tuple[Path, Report], untrained: Path) -> None:
    before, after = tensors(untrained), tensors(finetuned[0])
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for name in before:
        fixed = name.endswith("indices") or "embed" in name or "lm_head" in name
        assert (name in moved) is not fixed, name


def test_the_student_measures_what_whole_logits_give(untrained: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    tokens = torch.arange(3, 51).view(2, 24)
    original = job_for(tiny_model_folder, tmp_path / "out").open_skeleton()
    student = Student(untrained, torch.device("cpu"), original)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        targets = teacher.float().model(input_ids=tokens).last_hidden_state
    assert student.divergence(tokens, targets) == pytest.approx(
        divergence(untrained, tiny_model_folder, tokens), rel=1e-3
    )


def test_all_of_the_student_is_on_its_device(untrained: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    """Buffers that no file holds are made on the CPU. The meta device stands in for a GPU here."""
    original = job_for(tiny_model_folder, tmp_path / "out").open_skeleton()
    student = Student(untrained, torch.device("meta"), original)
    tensors = [*student.model.named_parameters(), *student.model.named_buffers()]
    assert any("inv_freq" in name for name, _ in tensors)
    assert not [name for name, tensor in tensors if not tensor.is_meta]


def test_training_that_does_harm_is_thrown_away(untrained: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    vptq.quantize(tiny_model_folder, tmp_path / "out", SPEC, **QUICK | {"sequences": 14})
    plain = tensors(tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in tensors(untrained).values() if tensor.is_floating_point())
    assert plain.keys() == tensors(untrained).keys()
    report = load_report(untrained)
    assert report.finetuning["after"] == report.finetuning["before"]


def test_same_seed_same_bytes_also_after_an_interruption(
    finetuned: tuple[Path, Report], tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "TrainingConfig", lambda: TrainingConfig(rate=1e-2, epochs=4))

    def interrupt(event: ProgressEvent) -> None:
        if event.stage == "finetuning" and event.done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vptq.quantize(tiny_model_folder, tmp_path / "out", SPEC, finetune="e2e", progress=interrupt, **QUICK)
    assert not (tmp_path / "out").exists()
    vptq.quantize(tiny_model_folder, tmp_path / "out", SPEC, finetune="e2e", resume=True, **QUICK)
    assert files_of(tmp_path / "out") == files_of(finetuned[0])
    assert not (tmp_path / "out.work").exists()


def test_blocks_are_trained_and_norms_with_them(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "TrainingConfig", lambda: TrainingConfig(rate=3e-3, epochs=4))
    monkeypatch.setattr(activations, "TOKENS_PER_BATCH", 48)
    lines: list[str] = []
    out = tmp_path / "out"
    options: dict[str, Any] = QUICK | {"sequences": 64}
    vptq.quantize(tiny_model_folder, tmp_path / "plain", SPEC, **options)
    options["progress"] = lambda event: lines.append(event.message)
    report = vptq.quantize(tiny_model_folder, out, SPEC, finetune="block", **options)
    assert len(report.block_finetuning) == 2
    assert all(after < before for before, after in report.block_finetuning), lines
    assert sum("error of its output" in line for line in lines) == 2
    original, stored = tensors(tiny_model_folder), tensors(out)
    norms = [name for name in original if name.endswith("layernorm.weight")]
    assert len(norms) == 4
    assert all(not torch.equal(original[name].to(stored[name].dtype), stored[name]) for name in norms)
    plain, first = tensors(tmp_path / "plain"), "model.layers.0.self_attn.q_proj."
    assert torch.equal(plain[f"{first}indices"], stored[f"{first}indices"])
    for leaf in ("centroids.weight", "weight_scale", "weight_bias"):
        assert not torch.equal(plain[first + leaf], stored[first + leaf]), leaf
    vptq.AutoModelForCausalLM.from_pretrained(out)


def test_a_run_that_trains_blocks_goes_on_to_the_same_bytes(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "TrainingConfig", lambda: TrainingConfig(rate=1e-2, epochs=4))
    monkeypatch.setattr(activations, "TOKENS_PER_BATCH", 48)

    def interrupt(event: ProgressEvent) -> None:
        if event.stage == "training block 1":
            raise KeyboardInterrupt

    vptq.quantize(tiny_model_folder, tmp_path / "whole", SPEC, finetune="both", **QUICK)
    with pytest.raises(KeyboardInterrupt):
        vptq.quantize(tiny_model_folder, tmp_path / "out", SPEC, finetune="both", progress=interrupt, **QUICK)
    vptq.quantize(tiny_model_folder, tmp_path / "out", SPEC, finetune="both", resume=True, **QUICK)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("source", [{"hessian_inputs": "original"}, {"hessian_dir": "."}])
def test_training_blocks_needs_what_the_quantized_model_computes(
    source: dict[str, str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--finetune block trains on what the quantized model computes"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", SPEC, finetune="block", **QUICK, **source)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_can_be_finetuned(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "TrainingConfig", lambda: TrainingConfig(rate=1e-2, epochs=4))
    model = tiny(family)
    report = vptq.quantize(model, tmp_path / "out", SPEC, finetune="e2e", hessian_inputs="original", **QUICK)
    assert report.finetuning["after"] < report.finetuning["before"]
    vptq.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_text_of_one_sequence_is_refused_before_anything_is_quantized(tiny_model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("ba be bi bo " * 8)
    with pytest.raises(CalibrationError, match="needs 2 sequences, but there are only 1"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", SPEC, calibration=text, finetune="e2e", **QUICK)
    assert list(tmp_path.iterdir()) == [text]


def test_an_unknown_kind_of_finetuning_is_named(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--finetune is 'all'; choose one of none, block, e2e, both"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", SPEC, finetune="all", **QUICK)


def test_a_folder_that_is_there_is_finetuned(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_folder, "TrainingConfig", lambda: TrainingConfig(rate=1e-2, epochs=4))
    folder, out = tmp_path / "folder", tmp_path / "out"
    vptq.quantize(tiny_model_folder, folder, SPEC, **QUICK)
    done = vptq.finetune(folder, tiny_model_folder, out, **QUICK)
    assert done.after < 0.9 * done.before
    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("indices"))
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    report = load_report(out)
    assert report is not None
    assert report.finetuning["after"] == done.after
    assert "finetuning" in (out / "README.md").read_text()
    assert {path.name for path in folder.iterdir()} < {path.name for path in out.iterdir()}
    assert not (tmp_path / "out.work").exists()
    vptq.AutoModelForCausalLM.from_pretrained(out)


def test_steps_shrink_with_the_root_of_what_there_is_to_win(
    tiny_model_folder: Path, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    advance = Trainer.advance
    monkeypatch.setattr(Trainer, "advance", lambda self: (rates.append(self.config.rate), advance(self)))
    before = vptq.finetune(untrained, tiny_model_folder, tmp_path / "out", **QUICK).before
    for full, share in ((4 * before, 0.5), (before / 4, 1.0)):
        rates.clear()
        monkeypatch.setattr(finetune, "FULL_RATE_DIVERGENCE", full)
        vptq.finetune(untrained, tiny_model_folder, tmp_path / "out", overwrite=True, **QUICK)
        assert len(rates) > 3
        assert rates == pytest.approx([share * TrainingConfig().rate] * len(rates))


def test_another_models_folder_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    vptq.quantize(tiny_model_folder, folder, SPEC, rotate=True, **QUICK)
    with pytest.raises(ConfigError, match=r"lm_head.weight of .* is not that of the original"):
        vptq.finetune(folder, tiny_model_folder, tmp_path / "out", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
    with pytest.raises(ConfigError, match="is quantized itself"):
        vptq.finetune(folder, folder, tmp_path / "out", **QUICK)
