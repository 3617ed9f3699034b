"""What requests may say, and how errors are told: OpenAI's protocol, as far as this server speaks it.

Nothing is ignored that would change the answer: a field is used, or may only have the value that means "without", or
has no influence on a single local model. Everything else is an error that names the field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vptq.sampling import Sampling

MAX_STOPS = 4
# What a request gets without saying: OpenAI's figure for completions. A chat may go on to the end of the context.
COMPLETION_TOKENS = 16

# Values with which a feature that this server does not have is not asked for; None always is one of them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
}
_WITHOUT_INFLUENCE = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
)


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        body: What the client gets, in OpenAI's form.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    """What a stream is to contain."""

    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class GenerationRequest(BaseModel):
    """What chats and completions have in common."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, max_length=MAX_STOPS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_missing_here(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in _NEUTRAL.items():
            value = data.get(name)
            if value is not None and value not in neutral:
                allowed = "".join(f"give {each!r} or " for each in neutral)
                raise ValueError(f"{name} is {value!r:.60}, which this server cannot do; {allowed}leave it out")
        return {name: value for name, value in data.items() if name not in _NEUTRAL.keys() | _WITHOUT_INFLUENCE}

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of the answer, if the request says so."""
        return self.max_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to end with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, room: int) -> Sampling:
        """How to choose tokens, with at most `room` of them."""
        wanted = self.wanted_tokens
        return Sampling(
            max_new_tokens=room if wanted is None else min(wanted, room),
            temperature=self.temperature,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed % 2**63,
        )


class CompletionRequest(GenerationRequest):
    """A text to be continued."""

    prompt: str

    @field_validator("prompt", mode="before")
    @classmethod
    def _of_a_list_of_one(cls, prompt: Any) -> Any:
        return prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt

    @property
    def wanted_tokens(self) -> int:
        """OpenAI's default for completions is short."""
        return self.max_tokens or COMPLETION_TOKENS


class TextPart(BaseModel):
    """A piece of a message; images and sounds have other types."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(GenerationRequest):
    """A conversation to be continued."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """The new name and the old one mean the same; given both, the new one counts."""
        return self.max_completion_tokens or self.max_tokens


RequestType = TypeVar("RequestType", bound=GenerationRequest)


def parse(kind: type[RequestType], body: bytes) -> RequestType:
    """Read a request.

    Raises:
        ApiError: It is not JSON, or asks for what is impossible or not to be had here.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{place}: {reason}" if place else reason, param=place or None) from None
