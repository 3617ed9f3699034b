"""What answers look like on the wire: whole, and as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from vptq.generation import Finish

STREAM_END = "data: [DONE]\n\n"


def usage(finish: Finish) -> dict[str, int]:
    """Token counts of a request."""
    return {
        "prompt_tokens": finish.prompt_tokens,
        "completion_tokens": finish.tokens,
        "total_tokens": finish.prompt_tokens + finish.tokens,
    }


def event(data: Mapping[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Reply:
    """The forms of one answer to a chat; `CompletionReply` has those of a completion.

    Args:
        model: The model's name.
        with_usage: Whether every event has a `usage`, which is null until the last.
    """

    prefix, whole_object, event_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, with_usage: bool = False) -> None:
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._with_usage = with_usage

    def whole(self, text: str, finish: Finish) -> dict[str, Any]:
        """The answer in one piece."""
        choice = {"index": 0, **self._whole_content(text), "logprobs": None, "finish_reason": finish.reason}
        return {"object": self.whole_object, **self._head, "choices": [choice], "usage": usage(finish)}

    def first_event(self) -> str:
        """What a stream begins with, before the model has said anything; may be nothing."""
        return self._event({"delta": {"role": "assistant", "content": ""}}, None)

    def text_event(self, text: str) -> str:
        """A piece of the answer."""
        return self._event(self._piece(text), None)

    def finish_event(self, finish: Finish) -> str:
        """How the answer ended."""
        return self._event(self._piece(""), finish.reason)

    def usage_event(self, finish: Finish) -> str:
        """Token counts, in an event without a choice."""
        return event({"object": self.event_object, **self._head, "choices": [], "usage": usage(finish)})

    def _event(self, content: Mapping[str, Any], reason: str | None) -> str:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        null_usage = {"usage": None} if self._with_usage else {}
        return event({"object": self.event_object, **self._head, "choices": [choice], **null_usage})

    def _whole_content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _piece(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


class CompletionReply(Reply):
    """The forms of one answer to a completion."""

    prefix, whole_object, event_object = "cmpl", "text_completion", "text_completion"

    def first_event(self) -> str:
        """Nothing: a completion has no role to tell."""
        return ""

    def _whole_content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _piece = _whole_content
