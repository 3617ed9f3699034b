"""What the original predicts is kept and used again: the same figures to the last bit, with its blocks left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import FAMILIES, random_tokens, tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import vptq
from vptq.errors import ConfigError
from vptq.evaluate.perplexity import Scores, score_windows
from vptq.evaluate.remembered import Original, cache_path
from vptq.source import resolve_model


def count_runs(model: PreTrainedModel) -> list[int]:
    """Grows by one with every run of the last block."""
    runs: list[int] = []
    *_, last = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    last[-1].register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_kept_predictions_are_the_originals_to_the_last_bit(family: str, tmp_path: Path) -> None:
    """Also with logits that are scaled, capped, or come with the choices of a router."""
    changes = {"num_key_value_heads": 2} if family == "mixtral" else {}
    original, model = tiny(family, **changes), tiny(family, seed=1, **changes)
    windows, path = random_tokens(3, 20), tmp_path / "kept.safetensors"
    expected = score_windows(model, windows, original)
    runs = count_runs(original)
    assert score_windows(model, windows, original, remembered=path) == expected
    assert len(runs) == 3
    assert path.is_file()
    assert score_windows(model, windows, original, remembered=path) == expected
    assert len(runs) == 3
    assert score_windows(original, windows).perplexity == expected.reference_perplexity, "it is itself again"
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.safetensors"]


class ByTheLogits(torch.nn.Linear):
    """A head whose answer depends on more than what it is given."""

    calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(hidden) + self.calls


def test_a_head_that_needs_more_is_never_replayed(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    original = copy.deepcopy(tiny_model)
    head = original.get_output_embeddings()
    strange = ByTheLogits(head.in_features, head.out_features, bias=False)
    strange.weight = head.weight
    original.set_output_embeddings(strange)
    windows, path = random_tokens(2, 20), tmp_path / "kept.safetensors"
    first = Original(original, windows, path)
    for number in range(2):
        first.logits(number)
    assert "its head needs more" in first.keep()
    assert not path.exists()


@pytest.mark.parametrize("damage", ["truncated", "other", "folder"])
def test_a_damaged_file_is_made_again_and_a_place_that_cannot_be_written_is_told(
    damage: str, tiny_model: PreTrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    windows, path = random_tokens(2, 20), tmp_path / "kept.safetensors"
    expected = score_windows(tiny_model, windows, tiny_model, remembered=path)
    whole = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(whole[:100] if damage == "truncated" else b"")
    assert score_windows(tiny_model, windows, tiny_model, remembered=path) == expected
    if damage == "folder":
        assert "predictions are not kept" in caplog.text
    else:
        assert path.read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept.safetensors"]


def test_another_text_model_or_dtype_has_a_file_of_its_own(tiny_model_folder: Path) -> None:
    source = resolve_model(tiny_model_folder)
    model = vptq.source.load_model(source)
    windows = random_tokens(2, 20)
    path = cache_path(source, model, windows)
    assert path == cache_path(source, vptq.source.load_model(source), windows.clone())
    changed = copy.deepcopy(model)
    changed.config.rms_norm_eps *= 2
    others = [
        cache_path(source, model, windows[:1]),
        cache_path(source, model, windows.view(4, 10)),
        cache_path(source, model, windows.flip(0)),
        cache_path(source, copy.deepcopy(model).to(torch.float64), windows),
        cache_path(source, changed, windows),
    ]
    weights = next(iter(tiny_model_folder.glob("*.safetensors")))
    before = weights.stat()
    weights.touch()
    others.append(cache_path(source, model, windows))
    import os

    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len({path, *others}) == 1 + len(others)


def test_evaluate_remembers_when_asked(
    tiny_model_folder: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    texts[0].write_text("ba de fi go ku " * 8)
    texts[1].write_text("lo ma ne pi ru " * 9)
    options: dict[str, Any] = {"seqlen": 20, "tokenizer": tiny_tokenizer, "device": "cpu"}

    def scores(**more: Any) -> list[Scores]:
        found = vptq.evaluate(tiny_model, tiny_model_folder, texts, **options, **more)
        return [(text.perplexity, text.reference_perplexity, text.kl_divergence) for text in found.texts]  # type: ignore[misc]

    expected = scores()
    assert not (tmp_path / "cache").exists()
    assert scores(remember=True) == expected
    kept = sorted((tmp_path / "cache" / "vptq").iterdir())
    assert len(kept) == 2
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert scores(remember=True) == expected
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    for wrong in ({"reference": None}, {"reference": tiny_model}):
        with pytest.raises(ConfigError, match="give reference by name"):
            vptq.evaluate(tiny_model, **wrong, text=texts, remember=True, **options)  # type: ignore[arg-type]
