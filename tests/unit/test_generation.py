"""Text comes in pieces that add up, stops where it should, and never shows part of a stop string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vptq.errors import ConfigError
from vptq.generation import Finish, chat_prompt, generate_text, text_prompt
from vptq.sampling import Sampling
from vptq.streaming import StopStrings, TextStream

LETTERS = st.text("ab", max_size=12)


def until_stop(text: str, stops: list[str]) -> str:
    """By definition: look at ever longer beginnings of the text until one ends in a stop string."""
    for end in range(1, len(text) + 1):
        endings = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if endings:
            return text[: end - max(map(len, endings))]
    return text


@given(pieces=st.lists(LETTERS, max_size=8), stops=st.lists(LETTERS, max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    filtered = StopStrings(stops)
    assert "".join([*map(filtered.take, pieces), filtered.rest()]) == until_stop("".join(pieces), stops)


@given(text=LETTERS, stops=st.lists(LETTERS.filter(bool), min_size=1, max_size=3))
def test_text_is_held_back_only_while_it_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    filtered = StopStrings(stops)
    shown = "".join(map(filtered.take, text))
    held = until_stop(text, stops)[len(shown) :]
    assert not held or any(stop.startswith(held) for stop in stops)


def stream(tokenizer: Any, ids: list[int]) -> list[str]:
    """The pieces of text that a streamer makes of these tokens."""
    pieces: list[str] = []
    streamer = TextStream(tokenizer, StopStrings(), pieces.append)
    for token in ids:
        streamer.take(token)
    streamer.end()
    return pieces


def bytes_tokenizer(marks_spaces_first: bool) -> Any:
    """Tokens that are single bytes or, with spaces marked at the beginning of words, characters of "_a\\n"."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    if marks_spaces_first:
        words = ["<unk>", "\N{LOWER ONE EIGHTH BLOCK}a", "a", "\N{LOWER ONE EIGHTH BLOCK}", "\n"]
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer = Tokenizer(models.BPE({f"<0x{byte:02X}>": byte for byte in range(256)}, []))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(text=st.text(max_size=10))
def test_pieces_are_whole_characters(text: str) -> None:
    pieces = stream(bytes_tokenizer(False), list(text.encode()))
    assert "".join(pieces) == text
    assert pieces == list(text) or "\N{REPLACEMENT CHARACTER}" in text


@given(ids=st.lists(st.integers(1, 4), max_size=12))
def test_pieces_add_up_to_the_decoded_text_spaces_and_all(ids: list[int]) -> None:
    tokenizer = bytes_tokenizer(True)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def answer(model: Any, tokenizer: Any, stops: tuple[str, ...] = (), **settings: Any) -> tuple[str, Finish]:
    pieces: list[str] = []
    sampling = Sampling(**{"max_new_tokens": 12, "temperature": 0.0} | settings)
    finish = generate_text(model, tokenizer, text_prompt(tokenizer, "ba de fi"), sampling, pieces.append, stops=stops)
    return "".join(pieces), finish


def test_an_answer_is_what_generate_gives(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = text_prompt(tiny_tokenizer, "ba de fi")
    generator: Any = tiny_model
    tokens = generator.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=2)[0, prompt.shape[1] :]
    text, finish = answer(tiny_model, tiny_tokenizer)
    assert text == tiny_tokenizer.decode(tokens, skip_special_tokens=True)
    assert finish.reason == ("length" if len(tokens) == 12 and int(tokens[-1]) != 2 else "stop")
    assert (finish.tokens, finish.prompt_tokens, finish.reused_tokens) == (len(tokens), prompt.shape[1], 0)


def test_a_stop_string_ends_the_answer_there(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    whole, finish = answer(tiny_model, tiny_tokenizer)
    words = whole.split()
    assert finish.reason == "length"
    stop = f" {words[4]}"
    text, finish = answer(tiny_model, tiny_tokenizer, stops=(stop, "never"))
    assert text == whole[: whole.index(stop)]
    assert finish.reason == "stop"
    assert finish.tokens < 12


def test_an_end_token_ends_the_answer(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    whole, _ = answer(tiny_model, tiny_tokenizer)
    config: Any = tiny_model.generation_config
    third = whole.split()[2]
    config.eos_token_id = [2, tiny_tokenizer.get_vocab()[third]]
    tokens = whole.split().index(third) + 1
    for allowed in (12, tokens):
        finish = answer(tiny_model, tiny_tokenizer, max_new_tokens=allowed)[1]
        assert (finish.reason, finish.tokens) == ("stop", tokens)


def test_a_seed_repeats_an_answer_and_leaves_everybody_elses_chance_alone(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    answers = [answer(tiny_model, tiny_tokenizer, temperature=1.5, seed=seed)[0] for seed in (3, 3, 4)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.rand(3), expected)


def test_an_answer_nobody_wants_ends_at_the_next_token(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    pieces: list[str] = []
    finish = generate_text(
        *(tiny_model, tiny_tokenizer, text_prompt(tiny_tokenizer, "ba"), Sampling(50, temperature=0.0)),
        on_text=pieces.append,
        is_stopped=lambda: len(pieces) >= 3,
    )
    assert finish.tokens == len(pieces) == 3


def test_a_template_without_a_system_role_gets_it_in_the_first_question(tiny_model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}"
        "{% endif %}{{ message['content'] }} </s> {% endfor %}"
    )
    system = {"role": "system", "content": "ku ku"}
    question = {"role": "user", "content": "ba de"}
    text = tokenizer.decode(chat_prompt(tokenizer, [system, question])[0])
    assert [word for word in text.split() if word != "<s>"] == ["ku", "ku", "ba", "de", "</s>"]
    with pytest.raises(ConfigError, match="no system role"):
        chat_prompt(tokenizer, [question, system])


def test_a_continuation_begins_with_the_space_that_belongs_before_it() -> None:
    tokenizer = bytes_tokenizer(True)
    pieces: list[str] = []
    stream = TextStream(tokenizer, StopStrings(), pieces.append, before=[1, 2])
    for token in (1, 2):
        stream.take(token)
    stream.end()
    assert "".join(pieces) == " aa", "what was there before is not repeated"


def test_a_prompt_that_fills_the_context_is_refused(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    context = tiny_model.config.max_position_embeddings
    prompt = torch.full((1, context), 5)
    with pytest.raises(ConfigError, match=f"is {context} tokens long .* context holds {context}"):
        generate_text(tiny_model, tiny_tokenizer, prompt, Sampling(), print)
    assert generate_text(tiny_model, tiny_tokenizer, prompt[:, 1:], Sampling(), len).tokens == 1
