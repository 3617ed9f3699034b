"""A budget and rotations together: what is measured, planned and written is the model with the rotations folded in."""

from pathlib import Path
from typing import Any

import pytest
from model_zoo import like_trained, tiny

import vptq
from vptq.checkpoint import Checkpoint
from vptq.progress import ProgressEvent
from vptq.quantize import planner
from vptq.quantize.folding import FoldedFiles
from vptq.quantize.skeleton import Skeleton

QUICK: dict[str, Any] = {"sequences": 6, "seqlen": 32, "device": "cpu", "rotate": True}


def original(tied: bool) -> Any:
    return like_trained(tiny("llama", hidden_size=64, intermediate_size=128, tie_word_embeddings=tied))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".safetensors") and path.name != "report.json"
    }


def test_the_folded_model_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Skeleton] = []
    measure = planner.sensitivities

    def watch(job: Any, skeleton: Skeleton, progress: Any) -> Any:
        seen.append(skeleton)
        return measure(job, skeleton, progress)

    monkeypatch.setattr(planner, "sensitivities", watch)
    rotated = vptq.plan(original(tied=False), bits=2.6, **QUICK)
    plain = vptq.plan(original(tied=False), bits=2.6, **QUICK | {"rotate": False})
    assert [isinstance(skeleton.files, FoldedFiles) for skeleton in seen] == [True, False]
    assert rotated.divergence != plain.divergence


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_folder_keeps_to_its_size(tied: bool, tmp_path: Path) -> None:
    """Embeddings that come apart take twice the room, which the plan has to know."""
    plan = vptq.plan(original(tied), size="80kB", **QUICK)
    report = vptq.quantize(original(tied), tmp_path / "out", size="80kB", **QUICK)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 60e3 < written <= plan.file_bytes <= 80e3
    assert report.rotated
    assert report.spec == plan.summary
    assert report.bits_per_weight == pytest.approx(plan.bits_per_weight)
    assert "lm_head.weight" in Checkpoint.open(tmp_path / "out").headers
    vptq.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    def interrupt(event: ProgressEvent) -> None:
        if event.layer is not None and ".1." in event.layer:
            raise KeyboardInterrupt

    vptq.quantize(original(tied=True), tmp_path / "whole", bits=2.6, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        vptq.quantize(original(tied=True), tmp_path / "out", bits=2.6, **QUICK, progress=interrupt)
    vptq.quantize(original(tied=True), tmp_path / "out", bits=2.6, **QUICK, resume=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
