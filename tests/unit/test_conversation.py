"""A conversation: its turns reach the model, what is cached changes nothing, and the context is never exceeded."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_zoo import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vptq.conversation import Conversation
from vptq.errors import ConfigError
from vptq.generation import PrefixCache
from vptq.sampling import Sampling

GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
Make = Callable[..., Conversation]


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of every prompt from here on."""
    seen: list[list[int]] = []
    prompt = Conversation._fitting_prompt

    def spy(conversation: Conversation) -> torch.Tensor:
        ids = prompt(conversation)
        seen.append(ids[0].tolist())
        return ids

    monkeypatch.setattr(Conversation, "_fitting_prompt", spy)
    return seen


@pytest.fixture
def make(tiny_tokenizer: PreTrainedTokenizerBase) -> Make:
    def make(family: str = "llama", **changes: Any) -> Conversation:
        return Conversation(tiny(family, **changes), tiny_tokenizer, "ku ku", GREEDY)

    return make


def test_every_turn_is_in_the_next_prompt(make: Make, prompts: list[list[int]]) -> None:
    conversation = make()
    first = conversation.ask("ba de")
    conversation.ask("fi go")
    unknown_role = "<unk>"  # the tiny vocabulary has no words for the roles
    words = [conversation.tokenizer.decode(ids).split() for ids in prompts]
    assert words[0] == f"<s> {unknown_role} ku ku </s> <s> {unknown_role} ba de </s> <s>".split()
    answered = f"{unknown_role} {first.text} </s> <s> {unknown_role} fi go </s> <s>".split()
    assert words[1] == words[0] + answered
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_pieces_make_up_the_answer_and_are_counted(make: Make) -> None:
    pieces: list[str] = []
    answer = make().ask("ba de", pieces.append)
    assert "".join(pieces).strip() == answer.text != ""
    assert 1 <= answer.finish.tokens <= 6
    assert answer.finish.prompt_tokens == 11
    assert answer.finish.first_token_seconds > 0
    assert answer.finish.reason != "given up"


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gemma2"])
def test_the_cache_of_earlier_turns_changes_no_answer(family: str, make: Make) -> None:
    kept, fresh = make(family), make(family)
    for question in ("ba de fi", "go ku", "la mi nu", "ra se ti"):
        answer = kept.ask(question)
        fresh._cache = PrefixCache()
        assert fresh.ask(question).text == answer.text
        if len(kept.messages) > 2:
            # gemma2's sliding windows cannot be cut; the others run again only what is new.
            assert answer.finish.reused_tokens == 0 if family == "gemma2" else answer.finish.reused_tokens > 10


def test_the_cache_is_cut_where_the_conversation_changes(make: Make, prompts: list[list[int]]) -> None:
    conversation, other = make(), make()
    conversation.ask("ba de fi go")
    conversation.reset()
    conversation.ask("ba de lu mo")
    other.ask("ba de lu mo")
    assert conversation.messages == other.messages
    conversation.system_prompt = "ba"
    conversation.ask("ba de")
    assert conversation.ask("fi").finish.reused_tokens < len(prompts[-1])


def test_what_outgrows_the_context_loses_its_oldest_turns(make: Make, prompts: list[list[int]]) -> None:
    conversation = make(max_position_embeddings=48)
    forgotten = [conversation.ask(f"ba de fi {word}") for word in ("ka", "ke", "ki", "ko", "ku")]
    assert sum(answer.forgotten_turns for answer in forgotten) > 0
    assert forgotten[0].forgotten_turns == 0
    assert all(answer.finish.prompt_tokens + answer.finish.tokens <= 48 for answer in forgotten)
    last = conversation.tokenizer.decode(prompts[-1]).split()
    assert last[:5] == ["<s>", "<unk>", "ku", "ku", "</s>"], "the system prompt stays"
    assert last[-3] == "ku"
    assert "ka" not in last[5:]
    assert len(conversation.messages) == 10, "what the model forgets is still on record"


def test_a_question_longer_than_the_context_did_not_happen(make: Make) -> None:
    conversation = make(max_position_embeddings=48)
    conversation.ask("ba")
    before = conversation.to_dict()
    with pytest.raises(ConfigError, match="the model's context holds 48"):
        conversation.ask("ba " * 48)
    assert conversation.to_dict() == before
    assert conversation.ask("de").forgotten_turns == 0


def test_a_stopped_answer_is_kept_as_far_as_it_went(make: Make) -> None:
    conversation = make()
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) >= 2

    answer = conversation.ask("ba de", stop=stop)
    assert (answer.finish.tokens, answer.finish.reason) == (2, "given up")
    assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}
    assert conversation.ask("ba de").finish.reused_tokens > 0


def test_an_interrupted_answer_did_not_happen(make: Make) -> None:
    conversation = make()
    conversation.ask("ba de")
    before = conversation.to_dict()

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("fi go", interrupt)
    assert conversation.to_dict() == before
    other = make()
    other.ask("ba de")
    assert conversation.ask("lu mo").text == other.ask("lu mo").text


def test_without_a_template_each_text_is_continued_by_itself(make: Make, prompts: list[list[int]]) -> None:
    conversation = make()
    conversation.tokenizer = type(conversation.tokenizer)(tokenizer_object=conversation.tokenizer.backend_tokenizer)
    assert not conversation.has_template
    conversation.ask("ba de")
    conversation.ask("fi go")
    assert [conversation.tokenizer.decode(ids).split() for ids in prompts] == [
        ["<s>", *["ba", "de"]],
        ["<s>", *["fi", "go"]],
    ]


def test_a_stored_conversation_goes_on_as_if_it_had_not_ended(make: Make) -> None:
    conversation, other = make(), make()
    conversation.ask("ba de")
    other.sampling, other.system_prompt = Sampling(), "to be replaced"
    other.load_dict(json.loads(json.dumps(conversation.to_dict())))
    assert other.to_dict() == conversation.to_dict()
    assert other.ask("fi go").text == conversation.ask("fi go").text


USER, ASSISTANT = {"role": "user", "content": "ba"}, {"role": "assistant", "content": "de"}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"system_prompt": None},
        {"messages": {}},
        {"messages": ["ba", "de"]},
        {"messages": [ASSISTANT, USER]},
        {"messages": [USER]},
        {"messages": [USER, {**ASSISTANT, "content": 1}]},
        {"messages": [USER, {**ASSISTANT, "more": 1}]},
        {"sampling": {"top_p": 2}},
        {"sampling": None},
    ],
    ids=str,
)
def test_what_is_no_conversation_is_refused_and_changes_nothing(change: dict[str, Any], make: Make) -> None:
    conversation = make()
    conversation.messages = [dict(USER), dict(ASSISTANT)]
    before = conversation.to_dict()
    with pytest.raises(ConfigError, match=r"^[^\n]*$"):
        conversation.load_dict({**before, **change})
    assert conversation.to_dict() == before


def test_models_find_the_stored_model_name(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    stored = Conversation(tiny_model, tiny_tokenizer).to_dict()
    assert stored["model"] == tiny_model.name_or_path
