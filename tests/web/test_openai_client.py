"""The official client gets from `vptq serve` what it gets elsewhere, whole and streamed."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("openai", reason="the official client is not installed: pip install openai")
pytest.importorskip("uvicorn", reason="the extra is not installed: pip install 'vptq[serve]'")

import openai

from vptq.serve.protocol import Message

QUESTION: Any = [{"role": "user", "content": "ba de fi"}]


def test_models_are_listed_under_the_served_name(serve: Any) -> None:
    client = serve()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 256
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_a_chat_is_the_same_whole_and_streamed(serve: Any, served: Any) -> None:
    client = serve()
    arguments = {"model": "tiny", "messages": QUESTION, "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    text = whole.choices[0].message.content
    assert set(text.split()) <= set(served.tokenizer.get_vocab())
    chunks = list(client.chat.completions.create(**arguments, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 3, "it comes in pieces"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}


def test_a_completion_is_the_same_whole_and_streamed(serve: Any) -> None:
    client = serve()
    whole = client.completions.create(model="tiny", prompt="ba de fi", temperature=0)
    assert whole.usage.completion_tokens == 16, "the protocol's default"
    assert whole.usage.prompt_tokens == 4
    assert whole.usage.total_tokens == 20
    chunks = client.completions.create(model="tiny", prompt=["ba de fi"], temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_limit_a_chat(name: str, serve: Any) -> None:
    whole = serve().chat.completions.create(model="tiny", messages=QUESTION, **{name: 5}, temperature=0)
    assert whole.usage.completion_tokens == 5
    assert whole.choices[0].finish_reason == "length"


def test_without_a_limit_a_chat_ends_with_the_context(serve: Any, served: Any) -> None:
    whole = serve().chat.completions.create(model="tiny", messages=QUESTION, temperature=0)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == served.context


def test_usage_comes_last_in_a_stream_that_asks_for_it(serve: Any) -> None:
    client = serve()
    arguments = {"model": "tiny", "messages": QUESTION, "max_tokens": 5, "temperature": 0, "stream": True}
    *chunks, last = client.chat.completions.create(**arguments, stream_options={"include_usage": True})
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 5
    assert all(chunk.choices for chunk in client.chat.completions.create(**arguments))


def test_a_stream_ends_with_done(serve: Any) -> None:
    client = serve()
    with client.completions.with_streaming_response.create(
        model="tiny", prompt="ba", max_tokens=3, stream=True
    ) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_stop_strings_end_an_answer(serve: Any) -> None:
    client = serve()
    arguments = {"model": "tiny", "prompt": "ba de fi", "temperature": 0}
    whole = client.completions.create(**arguments).choices[0].text
    stop = f" {whole.split()[5]}"
    for value in (stop, [stop, "never"]):
        choice = client.completions.create(**arguments, stop=value).choices[0]
        assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_seed_repeats_an_answer(serve: Any) -> None:
    client = serve()
    texts = [
        client.completions.create(model="tiny", prompt="ba", temperature=1.5, top_p=0.9, seed=seed).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_top_p_near_zero_takes_the_likeliest_tokens(serve: Any) -> None:
    client = serve()
    answers = {
        client.completions.create(model="tiny", prompt="ba", **settings).choices[0].text
        for settings in ({"temperature": 0}, {"temperature": 2, "top_p": 1e-6}, {"temperature": 1e-6})
    }
    assert len(answers) == 1


def test_text_parts_and_developer_messages_reach_the_template(serve: Any) -> None:
    client = serve()
    arguments: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    parts = [{"type": "text", "text": "ba "}, {"type": "text", "text": "de fi"}]
    answers = [
        client.chat.completions.create(
            messages=[{"role": role, "content": "ku ku"}, {"role": "user", "content": content}], **arguments
        )
        for role, content in (("system", "ba de fi"), ("developer", parts))
    ]
    assert Message(role="developer", content=parts).for_template() == {"role": "system", "content": "ba de fi"}
    assert answers[0].choices == answers[1].choices
    assert answers[0].usage == answers[1].usage


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n is 2"),
    ({"logprobs": True}, "logprobs is True"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is"),
    ({"presence_penalty": 0.5}, "presence_penalty is 0.5"),
    ({"response_format": {"type": "json_object"}}, "response_format is"),
    ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    ({"top_p": 0}, "top_p: Input should be greater than 0"),
    ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    ({"stop": ["a"] * 5}, "stop: List should have at most 4"),
    ({"seed": "one"}, "seed: Input should be a valid integer"),
    ({"extra_body": {"no_such_field": 1}}, "no_such_field: Extra inputs are not permitted"),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": [{"role": "tool", "content": "ba", "tool_call_id": "1"}]}, "messages.0.role: Input should be"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": "ba " * 300}]}, "prompt and answer together may have 256"),
]


def test_what_cannot_be_done_is_refused_by_name(serve: Any) -> None:
    client = serve()
    for arguments, message in REFUSED:
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "stream": stream} | arguments)
            assert message in caught.value.message
            assert caught.value.type == "invalid_request_error"


def test_values_that_ask_for_nothing_special_are_accepted(serve: Any) -> None:
    answer = serve().chat.completions.create(
        model="tiny",
        messages=QUESTION,
        max_tokens=1,
        n=1,
        logprobs=False,
        presence_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        user="somebody",
        metadata={"a": "b"},
    )
    assert answer.usage.completion_tokens == 1
