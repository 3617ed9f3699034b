"""How a model's next token is chosen: the settings of an answer, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vptq.errors import ConfigError

# What each setting may be: how to read it from text, whether a value is allowed, and that in words.
_ALLOWED: dict[str, tuple[type[int] | type[float], Callable[[Any], bool], str]] = {
    "max_new_tokens": (int, lambda value: value >= 1, "an integer, at least 1"),
    "temperature": (float, lambda value: 0 <= value < 100, "a number, 0 (always the likeliest token) to below 100"),
    "top_p": (float, lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "top_k": (int, lambda value: value >= 0, "an integer, at least 0 (for no limit)"),
    "repetition_penalty": (float, lambda value: 0 < value < 100, "a number above 0 (1 for none)"),
    "seed": (int, lambda value: 0 <= value < 2**63, "an integer, at least 0"),
}


@dataclass(frozen=True)
class Sampling:
    """Settings of an answer; None leaves one to the model's own generation_config.json, or to chance (seed).

    Attributes:
        max_new_tokens: Most tokens of an answer.
        temperature: What logits are divided by; 0 always takes the likeliest token.
        top_p: Only the likeliest tokens that together have this probability.
        top_k: Only so many of the likeliest; 0 for all.
        repetition_penalty: What the logits of tokens seen before are made less likely by; 1 for not at all.
        seed: Of the choice; the same prompt with the same seed gets the same answer.

    Raises:
        ConfigError: A setting is out of range or of the wrong type.
    """

    max_new_tokens: int = 500
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None and name != "max_new_tokens":
                continue
            kind, is_allowed, in_words = _ALLOWED[name]
            is_number = not isinstance(value, bool) and isinstance(value, int if kind is int else int | float)
            if not (is_number and is_allowed(value)):
                raise ConfigError(f"{name} is {value!r}; it must be {in_words}")

    @classmethod
    def from_dict(cls, data: Any) -> Sampling:
        """Settings from plain data, such as JSON; what is not there has its default."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or not set(data) <= names:
            raise ConfigError(f"sampling must be an object with some of {', '.join(sorted(names))}")
        return cls(**data)

    def changed(self, setting: str) -> Sampling:
        """These settings with one changed, as in "top_p=0.9"; "top_p=" gives it back to the model."""
        name, _, text = (part.strip() for part in setting.partition("="))
        if name not in _ALLOWED or "=" not in setting:
            raise ConfigError(f"{setting!r} is no setting; give NAME=VALUE with one of {', '.join(_ALLOWED)}")
        if not text:
            value: Any = getattr(type(self)(), name)
        else:
            kind, _, in_words = _ALLOWED[name]
            try:
                value = kind(text)
            except ValueError:
                raise ConfigError(f"{name} is {text!r}; it must be {in_words}") from None
        change: dict[str, Any] = {name: value}
        return replace(self, **change)

    def generate_arguments(self) -> dict[str, Any]:
        """What transformers' generate() is told besides the number of tokens and the seed."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        given.pop("max_new_tokens")
        given.pop("seed", None)
        if given.get("temperature") == 0:
            # Greedy search warns about settings that only sampling has.
            penalty = {name: value for name, value in given.items() if name == "repetition_penalty"}
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **penalty}
        return {"do_sample": True, **given}
