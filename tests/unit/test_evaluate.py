"""Perplexity and divergence against their definitions."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import vptq
from vptq.errors import ConfigError, VPTQError
from vptq.evaluate import perplexity
from vptq.evaluate.perplexity import score_windows
from vptq.progress import ProgressEvent


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(3, 63, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def changed_model(tiny_model: PreTrainedModel) -> PreTrainedModel:
    changed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return changed


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, window: torch.Tensor) -> torch.Tensor:
    """Of every next token inside the window, float64 [seqlen - 1, vocabulary]."""
    return model(input_ids=window[None]).logits[0, :-1].double().log_softmax(-1)


def test_perplexity_is_exp_of_the_mean_over_windows_of_mean_nll(
    tiny_model: PreTrainedModel, windows: torch.Tensor
) -> None:
    with torch.no_grad():
        losses = [tiny_model(input_ids=window[None], labels=window[None]).loss.item() for window in windows]
    scores = score_windows(tiny_model, windows)
    assert scores.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (scores.reference_perplexity, scores.kl_divergence, scores.same_top_token) == (None, None, None)


def test_divergence_is_the_mean_kl_from_the_original_to_the_model(
    tiny_model: PreTrainedModel, changed_model: PreTrainedModel, windows: torch.Tensor
) -> None:
    p = torch.cat([log_probabilities(tiny_model, window) for window in windows])
    q = torch.cat([log_probabilities(changed_model, window) for window in windows])
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    reverse_kl = (q.exp() * (q - p)).sum(-1).mean().item()
    assert kl != pytest.approx(reverse_kl, rel=0.01), "this test could not tell the direction"
    scores = score_windows(changed_model, windows, reference=tiny_model)
    assert scores.kl_divergence == pytest.approx(kl, rel=1e-4)
    assert scores.same_top_token == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert scores.reference_perplexity == pytest.approx(score_windows(tiny_model, windows).perplexity)
    assert scores.perplexity == pytest.approx(score_windows(changed_model, windows).perplexity)


def test_a_model_does_not_diverge_from_itself(tiny_model: PreTrainedModel, windows: torch.Tensor) -> None:
    scores = score_windows(tiny_model, windows, reference=tiny_model)
    assert scores.kl_divergence == pytest.approx(0, abs=1e-9)
    assert scores.same_top_token == 1
    assert scores.perplexity == scores.reference_perplexity


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(
    tiny_model: PreTrainedModel, windows: torch.Tensor
) -> None:
    original = copy.deepcopy(tiny_model)
    torch.nn.init.zeros_(tiny_model.get_output_embeddings().weight)
    scores = score_windows(tiny_model, windows, reference=original)
    size = tiny_model.config.vocab_size
    assert scores.perplexity == pytest.approx(size, rel=1e-6)
    # KL(p || uniform) = log(size) - entropy(p)
    p = torch.cat([log_probabilities(original, window) for window in windows])
    entropy = -(p.exp() * p).sum(-1).mean().item()
    assert scores.kl_divergence == pytest.approx(math.log(size) - entropy, rel=1e-4)


def test_slicing_the_positions_changes_nothing(
    tiny_model: PreTrainedModel,
    changed_model: PreTrainedModel,
    windows: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = score_windows(changed_model, windows, tiny_model)
    monkeypatch.setattr(perplexity, "POSITIONS_AT_ONCE", 7)
    sliced = score_windows(changed_model, windows, tiny_model)
    assert vars(sliced) == pytest.approx(vars(whole), rel=1e-6)


def test_progress_counts_windows(tiny_model: PreTrainedModel, windows: torch.Tensor) -> None:
    seen: list[tuple[int, int]] = []
    score_windows(tiny_model, windows, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_what_cannot_be_measured_is_refused(tiny_model: PreTrainedModel, windows: torch.Tensor) -> None:
    for bad in (windows[:0], windows[:, :1], windows[0]):
        with pytest.raises(ConfigError, match="at least one window of 2 tokens"):
            score_windows(tiny_model, bad)
    with pytest.raises(ConfigError, match="token 63, but the model's vocabulary ends at 62"):
        score_windows(tiny_model, windows.clamp(min=63))
    other = copy.deepcopy(tiny_model)
    other.config.vocab_size += 1
    with pytest.raises(ConfigError, match="same vocabulary"):
        score_windows(tiny_model, windows, reference=other)
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(VPTQError, match="not finite in window 1 of 3"):
        score_windows(tiny_model, windows)


def test_evaluate_is_the_same_measurement_from_paths(
    tiny_model_folder: Path,
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    windows: torch.Tensor,
    tmp_path: Path,
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(tiny_tokenizer.convert_ids_to_tokens(windows.flatten().tolist())), encoding="utf-8")
    result = vptq.evaluate(tiny_model_folder, tiny_model_folder, text, seqlen=20, windows=2, device="cpu")
    assert result.perplexity == pytest.approx(score_windows(tiny_model, windows[:2]).perplexity)
    assert (result.windows, result.seqlen, result.text) == (2, 20, str(text))
    assert result.kl_divergence == pytest.approx(0, abs=1e-9)
    loaded = vptq.evaluate(tiny_model, text=text, seqlen=20, windows=2, tokenizer=tiny_tokenizer)
    assert loaded.perplexity == result.perplexity
    assert loaded.reference is None


def test_every_text_is_measured_as_if_alone_and_the_first_is_the_evaluations_own(
    tiny_model: PreTrainedModel, changed_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    texts[0].write_text("ba de fi go ku " * 8)
    texts[1].write_text("lo ma ne pi ru " * 9)
    seen: list[ProgressEvent] = []
    options: dict[str, Any] = {"seqlen": 20, "tokenizer": tiny_tokenizer}
    both = vptq.evaluate(*(tiny_model, changed_model, texts), **options, progress=seen.append).to_dict()
    alone = [vptq.evaluate(tiny_model, changed_model, text, **options).to_dict() for text in texts]
    assert list(both["texts"]) == [scores for each in alone for scores in each["texts"]]
    assert both["texts"][0]["perplexity"] != both["texts"][1]["perplexity"]
    assert both["tasks"] == ()
    same = set(alone[0]) - {"texts", "seconds"}
    assert {key: both[key] for key in same} == {key: alone[0][key] for key in same}
    stages = [f"reading {text}" for text in texts] + [str(text) for text in texts for _ in range(2)]
    assert [event.stage for event in seen] == stages, "nothing is loaded here"
    assert [(event.done, event.total) for event in seen[2:]] == [(1, 2), (2, 2)] * 2


def test_evaluate_refuses_before_it_loads_a_model(tmp_path: Path, tiny_model_folder: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    weightless = tmp_path / "weightless"  # would be an error of its own, had it come to loading
    weightless.mkdir()
    for path in tiny_model_folder.iterdir():
        if path.suffix != ".safetensors":
            (weightless / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="is empty"):
        vptq.evaluate(weightless, text=empty)
    with pytest.raises(ConfigError, match="no text at"):
        vptq.evaluate(weightless, text=tmp_path / "missing.txt")


def test_a_loaded_model_needs_a_tokenizer_beside_it(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass tokenizer"):
        vptq.evaluate(tiny_model, text=tmp_path)
