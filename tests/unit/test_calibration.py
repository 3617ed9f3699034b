"""Calibration sequences: real text, and text a model samples itself."""

import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from vptq.errors import CalibrationError, ConfigError
from vptq.kv_cache import RoomyLayer
from vptq.progress import ProgressEvent
from vptq.quantize.calibration import load_calibration
from vptq.quantize.sampling import sample_sequences
from vptq.quantize.setup import checked_calibration

BOS = 1


def no_model() -> NoReturn:
    pytest.fail("text of its own needs no model")


@torch.no_grad()
def sample_without_cache(model: PreTrainedModel, sequences: int, seqlen: int, seed: int) -> torch.Tensor:
    """The definition: every token from the softmax of the logits of everything before it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((sequences, 1), BOS)
    for _ in range(1, seqlen):
        probabilities = model(input_ids=tokens, use_cache=False).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return tokens


def test_sampling_with_the_cache_draws_what_sampling_without_it_draws(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    update = RoomyLayer.update
    monkeypatch.setattr(RoomyLayer, "update", lambda *args: (used.append(args[0]), update(*args))[1])
    sampled = sample_sequences(tiny_model, BOS, sequences=5, seqlen=24, seed=3)
    assert len(used) == 2 * 23, "the quick cache is not in use"
    assert torch.equal(sampled, sample_without_cache(tiny_model, sequences=5, seqlen=24, seed=3))


def test_models_with_a_cache_of_another_kind_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding windows here: the cache forgets what preallocated storage would keep."""
    monkeypatch.setattr(RoomyLayer, "update", lambda *_: pytest.fail("the cache was replaced"))
    config = MistralConfig(
        **{"vocab_size": 63, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "initializer_range": 0.3},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MistralForCausalLM(config).eval()
    sampled = sample_sequences(model, BOS, sequences=4, seqlen=20, seed=0)
    assert torch.equal(sampled, sample_without_cache(model, sequences=4, seqlen=20, seed=0))


def test_tokens_are_distributed_as_the_model_says(tiny_model: PreTrainedModel) -> None:
    count = 4000
    drawn = sample_sequences(tiny_model, BOS, sequences=count, seqlen=2, seed=0)[:, 1]
    with torch.no_grad():
        expected = tiny_model(input_ids=torch.tensor([[BOS]])).logits[0, -1].softmax(-1) * count
    observed = torch.bincount(drawn, minlength=expected.numel())
    chi_squared = float(((observed - expected) ** 2 / expected).sum())
    freedom = expected.numel() - 1
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom)


def test_the_seed_decides(tiny_model: PreTrainedModel) -> None:
    first = sample_sequences(tiny_model, BOS, 4, 16, seed=0)
    torch.manual_seed(99)  # global state must not matter
    assert torch.equal(sample_sequences(tiny_model, BOS, 4, 16, seed=0), first)
    assert not torch.equal(sample_sequences(tiny_model, BOS, 4, 16, seed=1), first)
    assert first.dtype == torch.int64
    assert first.shape == (4, 16)
    assert (first[:, 0] == BOS).all()
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_a_small_memory_budget_samples_in_several_batches(tiny_model: PreTrainedModel) -> None:
    events: list[ProgressEvent] = []
    bytes_each = 2 * 2 * 2 * 8 * 18 * 4  # keys and values, layers, heads, head size, tokens, float32
    tokens = sample_sequences(tiny_model, BOS, 5, 18, seed=0, cache_bytes=2 * bytes_each, progress=events.append)
    assert torch.equal(tokens[:2], sample_without_cache(tiny_model, 2, 18, seed=0))
    assert len({tuple(row) for row in tokens.tolist()}) == 5
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert events[-1].done == events[-1].total == 5 * 18
    assert sum(event.done % (2 * 18) == 0 or event.done == event.total for event in events) == 3
    assert sample_sequences(tiny_model, BOS, 2, 18, seed=0, cache_bytes=0).shape == (2, 18)


def test_self_calibration_starts_at_the_bos_token(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    made = load_calibration("self", tiny_tokenizer, 3, 10, seed=7, model_loader=lambda: tiny_model)
    assert torch.equal(made.tokens, sample_sequences(tiny_model, BOS, 3, 10, seed=7))
    assert made.warning is None
    assert "3 x 10" in made.description
    assert "seed 7" in made.description


def test_without_a_bos_token_text_starts_after_an_end_of_text(tiny_model: PreTrainedModel) -> None:
    class NoBos:
        bos_token_id = None
        eos_token_id: int | None = 2

    tokenizer: Any = NoBos()
    made = load_calibration("self", tokenizer, 1, 4, seed=0, model_loader=lambda: tiny_model)
    assert made.tokens[0, 0] == tiny_model.config.bos_token_id
    tiny_model.config.bos_token_id = None
    made = load_calibration("self", tokenizer, 1, 4, seed=0, model_loader=lambda: tiny_model)
    assert made.tokens[0, 0] == 2
    NoBos.eos_token_id = None
    with pytest.raises(ConfigError, match="needs a BOS token"):
        load_calibration("self", tokenizer, 1, 4, seed=0, model_loader=lambda: tiny_model)


def test_a_model_with_nan_logits_cannot_sample(tiny_model: PreTrainedModel) -> None:
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(CalibrationError, match="not finite"):
        sample_sequences(tiny_model, BOS, 2, 4, seed=0)


def test_text_is_cut_from_its_beginning(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(["ba de fi go ku"] * 20), encoding="utf-8")
    made = load_calibration(path, tiny_tokenizer, 3, 15, seed=0, model_loader=no_model)
    ids = tiny_tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
    assert made.tokens.shape == (3, 15)
    assert made.tokens.flatten().tolist() == ids[:45]
    assert made.warning is None
    assert made.description == "3 x 15 tokens of text.txt"


@pytest.mark.parametrize(
    ("sequences", "seqlen", "shape", "warning"),
    [(9, 15, (6, 15), "fills only 6 of 9 sequences of 15"), (2, 128, (1, 100), "only 100 tokens, less than one")],
)
def test_less_text_than_asked_for_is_used_with_a_warning(
    sequences: int,
    seqlen: int,
    shape: tuple[int, int],
    warning: str,
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(["ba de fi go ku"] * 20), encoding="utf-8")
    made = load_calibration(path, tiny_tokenizer, sequences, seqlen, seed=0, model_loader=no_model)
    assert made.tokens.shape == shape
    assert made.warning is not None
    assert warning in made.warning
    assert str(path) in made.warning


def test_impossible_calibrations_are_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"empty\.txt is empty"):
        load_calibration(empty, tiny_tokenizer, 1, 8, seed=0, model_loader=no_model)
    with pytest.raises(ConfigError, match="no text at"):
        load_calibration(tmp_path / "missing.txt", tiny_tokenizer, 1, 8, seed=0, model_loader=no_model)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        load_calibration(empty, None, 1, 8, seed=0, model_loader=no_model)
    for sequences, seqlen in ((0, 8), (1, 1)):
        with pytest.raises(ConfigError, match="at least"):
            load_calibration("self", tiny_tokenizer, sequences, seqlen, seed=0, model_loader=no_model)


def test_several_texts_take_turns(
    tmp_path: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.txt").write_text("ba " * 200)
    (tmp_path / "b.txt").write_text("de " * 200)
    sources = [str(tmp_path / "a.txt"), "self", str(tmp_path / "b.txt")]
    alone = [load_calibration(source, tiny_tokenizer, 3, 8, 1, lambda: tiny_model).tokens for source in sources]
    mixed = load_calibration(", ".join(sources), tiny_tokenizer, 8, 8, 1, lambda: tiny_model)
    assert mixed.tokens.shape == (8, 8)
    assert torch.equal(mixed.tokens[0::3], alone[0])
    assert torch.equal(mixed.tokens[1::3], alone[1])
    assert torch.equal(mixed.tokens[2::3], alone[2][:2])
    assert mixed.description == (
        "3 x 8 tokens of a.txt, 3 x 8 tokens sampled from the model itself (seed 1), 2 x 8 tokens of b.txt"
    )
    assert mixed.warning is None


def test_a_mix_with_a_short_text_has_fewer_of_it(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "long.txt").write_text("ba " * 200)
    (tmp_path / "short.txt").write_text("de " * 9)
    mixed = load_calibration(f"{tmp_path}/short.txt,{tmp_path}/long.txt", tiny_tokenizer, 6, 8, 0, no_model)
    assert len(mixed.tokens) == 4
    assert mixed.warning is not None
    assert "fills only 1 of 3" in mixed.warning
    with pytest.raises(CalibrationError, match=r"short\.txt has to fill one"):
        load_calibration(f"{tmp_path}/short.txt,{tmp_path}/long.txt", tiny_tokenizer, 6, 64, 0, no_model)


def test_a_file_with_a_comma_in_its_name_is_one_text(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a,b.txt").write_text("ba " * 200)
    assert load_calibration(tmp_path / "a,b.txt", tiny_tokenizer, 3, 8, 0, no_model).tokens.shape == (3, 8)


@pytest.mark.parametrize(
    ("text", "complaint"), [("self,,self", "empty text"), ("self,missing.txt", "no file missing.txt")]
)
def test_a_mix_is_checked_before_anything_is_done(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        checked_calibration(text)


def test_more_texts_than_sequences_are_refused(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="sequences is 1, less than the 2"):
        load_calibration("self,self", tiny_tokenizer, 1, 8, 0, no_model)
