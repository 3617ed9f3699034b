"""Indices that move while a tiny model is finetuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import job_for

import vptq
from vptq.checkpoint import Checkpoint
from vptq.errors import CalibrationError, ConfigError
from vptq.progress import ProgressEvent
from vptq.quantize import finetune_folder, index_moves, move_turns, setup
from vptq.quantize.finetune import FinetuneReport
from vptq.quantize.index_moves import differing, vectors_of
from vptq.quantize.move_turns import MoveTurns
from vptq.quantize.report import load_report
from vptq.quantize.student import Student
from vptq.quantize.training import TrainingConfig

TEXT: dict[str, Any] = {"sequences": 16, "seqlen": 48}
SHARE, SPEC = 0.2, "v4-k16"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def differences(folder: Path, other: Path) -> tuple[int, int]:
    """Vectors with other indices, and all vectors."""
    one, two = Checkpoint.open(folder), Checkpoint.open(other)
    changed = sum(differing(one.load_layer(path), two.load_layer(path)) for path in one.layers())
    return changed, sum(vectors_of(config) for config in one.layers().values())


@pytest.fixture(scope="module", autouse=True)
def train_as_a_tiny_model_needs_it() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (setup, finetune_folder):
            patch.setattr(module, "TrainingConfig", lambda: TrainingConfig(rate=1e-2))
        yield


@pytest.fixture(scope="module")
def quantized(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    vptq.quantize(tiny_model_folder, folder, SPEC, hessian_inputs="original", **TEXT)
    return folder


@pytest.fixture(scope="module")
def resting(
    quantized: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FinetuneReport]:
    folder = tmp_path_factory.mktemp("resting") / "out"
    return folder, vptq.finetune(quantized, tiny_model_folder, folder, **TEXT)


@pytest.fixture(scope="module")
def moving(
    quantized: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, FinetuneReport]:
    folder = tmp_path_factory.mktemp("moving") / "out"
    return folder, vptq.finetune(quantized, tiny_model_folder, folder, move_indices=SHARE, **TEXT)


def test_the_model_gets_nearer_than_with_fixed_indices(
    moving: tuple[Path, FinetuneReport], resting: tuple[Path, FinetuneReport]
) -> None:
    assert moving[1].before == resting[1].before
    assert moving[1].after < resting[1].after
    vptq.AutoModelForCausalLM.from_pretrained(moving[0])


def test_the_report_says_how_many_moved_and_they_are_no_more_than_may(
    moving: tuple[Path, FinetuneReport], resting: tuple[Path, FinetuneReport], quantized: Path
) -> None:
    changed, vectors = differences(quantized, moving[0])
    assert moving[1].moved == changed
    assert 0 < changed <= SHARE * vectors
    assert differences(quantized, resting[0])[0] == resting[1].moved == 0
    report = load_report(moving[0])
    assert report is not None
    assert report.finetuning["moved"] == changed
    assert f"{changed:,} vectors got other indices" in (moving[0] / "README.md").read_text()
    before, after = Checkpoint.open(quantized).headers, Checkpoint.open(moving[0]).headers
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}


def test_same_seed_same_bytes_also_after_an_interruption(
    moving: tuple[Path, FinetuneReport], quantized: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    def interrupt(event: ProgressEvent) -> None:
        if event.stage == "finetuning" and event.done == 11:  # within a turn
            raise KeyboardInterrupt

    options: dict[str, Any] = {"move_indices": SHARE, **TEXT}
    with pytest.raises(KeyboardInterrupt):
        vptq.finetune(quantized, tiny_model_folder, tmp_path / "out", progress=interrupt, **options)
    assert not (tmp_path / "out").exists()
    done = vptq.finetune(quantized, tiny_model_folder, tmp_path / "out", resume=True, **options)
    assert files_of(tmp_path / "out") == files_of(moving[0])
    assert done.moved == moving[1].moved


def test_moves_that_do_harm_leave_no_trace(
    resting: tuple[Path, FinetuneReport],
    quantized: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_moves, "STEP", 20.0)  # far beyond what a gradient speaks for
    monkeypatch.setattr(move_turns, "TRIES", (1,))
    lines: list[str] = []
    options: dict[str, Any] = {"move_indices": 1.0, "progress": lambda event: lines.append(event.message), **TEXT}
    done = vptq.finetune(quantized, tiny_model_folder, tmp_path / "out", **options)
    assert sum("no vector takes another centroid" in line for line in lines) == 8
    assert done.moved == 0
    assert files_of(tmp_path / "out") == files_of(resting[0])


def test_gradients_are_those_of_the_blocks_whose_turn_it_is(
    quantized: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """A column's bias gets the sum of its column's gradients: once, though blocks run twice."""
    original = job_for(tiny_model_folder, tmp_path / "out").open_skeleton()
    student, tokens = Student(quantized, torch.device("cpu"), original), torch.arange(3, 51).view(2, 24)
    turns = MoveTurns(student, SHARE, turns=8)
    student.trained()
    targets = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    for turn in range(3):
        turns.begin(turn)
        for _ in range(2):
            student.divergence(tokens, targets, gradients=True)
        assert turns.gradients.keys() == student.blocks[turn % 2].keys()
        for path, layer in student.blocks[turn % 2].items():
            bias = layer.get_parameter("weight_bias")
            torch.testing.assert_close(turns.gradients[path].sum(0), bias.grad, rtol=1e-4, atol=1e-6)
        for parameter in student.model.parameters():
            parameter.grad = None


def test_a_whole_run_can_move_indices(tiny_model_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"finetune": "e2e", "hessian_inputs": "original", "move_indices": SHARE, **TEXT}
    report = vptq.quantize(tiny_model_folder, tmp_path / "out", SPEC, **options)
    assert report.finetuning["moved"] > 0
    assert report.finetuning["after"] < report.finetuning["before"]
    vptq.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_cannot_be_is_refused_at_once(tiny_model_folder: Path, quantized: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", tmp_path / "short.txt"
    text.write_text("ba be bi bo " * 30)  # two sequences of 48
    with pytest.raises(ConfigError, match="--move-indices is 2, a share"):
        vptq.finetune(quantized, tiny_model_folder, out, move_indices=2.0, **TEXT)
    with pytest.raises(ConfigError, match=r"--move-indices is 0\.1, and indices move while the whole model is trained"):
        vptq.quantize(tiny_model_folder, out, SPEC, finetune="block", move_indices=0.1, **TEXT)
    options: dict[str, Any] = {"finetune": "e2e", "move_indices": 0.1, "calibration": text, **TEXT}
    with pytest.raises(CalibrationError, match="needs 3 sequences, but there are only 2"):
        vptq.quantize(tiny_model_folder, out, SPEC, **options)
    assert list(tmp_path.iterdir()) == [text]
