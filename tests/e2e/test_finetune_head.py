"""Finetuning with a quantized output head: the teacher goes through the original's, and only what helps is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import job_for
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

import vptq
from vptq.errors import ConfigError
from vptq.quantize import finetune_folder, setup
from vptq.quantize.student import Student
from vptq.quantize.training import TrainingConfig

QUICK: dict[str, Any] = {"sequences": 32, "seqlen": 24}
TOKENS = torch.arange(3, 51).view(2, 24)
COARSE = "v4-k16"


def divergence(folder: Path, original: Path) -> float:
    """KL(original || folder) a token, from whole logits of whole models."""
    models = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (original, folder))
    with torch.no_grad():
        p, q = (functional.log_softmax(model(input_ids=TOKENS).logits, -1) for model in models)
    return float((p.exp() * (p - q)).sum(-1).mean())


def head_of(folder: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items() if name.startswith("lm_head.")}


@pytest.fixture(scope="module")
def quantized(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "folder"
    vptq.quantize(tiny_model_folder, folder, "v4-k16", lm_head=COARSE, **QUICK)
    return folder


def test_the_student_is_measured_against_the_true_original(
    quantized: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    student = Student(quantized, torch.device("cpu"), job_for(tiny_model_folder, tmp_path / "out").open_skeleton())
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with torch.no_grad():
        targets = teacher.model(input_ids=TOKENS).last_hidden_state
    expected = divergence(quantized, tiny_model_folder)
    assert student.divergence(TOKENS, targets) == pytest.approx(expected, rel=1e-3)
    assert not any(name.startswith("lm_head") for name in student.trained())


def test_a_folder_with_a_quantized_head_is_finetuned(
    quantized: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune_folder, "TrainingConfig", lambda: TrainingConfig(rate=1e-2, epochs=2))
    done = vptq.finetune(quantized, tiny_model_folder, tmp_path / "out", **QUICK)
    assert done.after < done.before
    assert divergence(tmp_path / "out", tiny_model_folder) < divergence(quantized, tiny_model_folder)
    before, after = head_of(quantized), head_of(tmp_path / "out")
    assert before.keys() == after.keys() >= {"lm_head.indices", "lm_head.centroids.weight"}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_does_harm_is_thrown_away(
    quantized: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "TrainingConfig", lambda: TrainingConfig(rate=5.0, epochs=1))
    report = vptq.quantize(tiny_model_folder, tmp_path / "out", "v4-k16", lm_head=COARSE, finetune="e2e", **QUICK)
    assert report.finetuning["after"] == report.finetuning["before"]


def test_another_models_quantized_head_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    vptq.quantize(tiny_model_folder, tmp_path / "folder", "v4-k16", lm_head=COARSE, rotate=True, sequences=4, seqlen=16)
    with pytest.raises(ConfigError, match=r"lm_head.weight of .* is not that of the original"):
        vptq.finetune(tmp_path / "folder", tiny_model_folder, tmp_path / "out", **QUICK)
