"""Settings of sampling: what is refused, and what generate() is told."""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import PreTrainedModel

from vptq.errors import ConfigError
from vptq.sampling import Sampling


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("temperature=-1", "temperature is -1.0; it must be a number, 0"),
        ("temperature=nan", "temperature is nan"),
        ("temperature=warm", "temperature is 'warm'"),
        ("top_p=0", "top_p is 0.0"),
        ("top_p=1.5", "top_p is 1.5"),
        ("top_k=-1", "top_k is -1"),
        ("top_k=1.5", "top_k is '1.5'; it must be an integer"),
        ("max_new_tokens=0", "max_new_tokens is 0"),
        ("repetition_penalty=0", "repetition_penalty is 0.0"),
        ("seed=-1", "seed is -1"),
        ("topp=1", "one of max_new_tokens, temperature"),
        ("top_p", "NAME=VALUE"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        Sampling().changed(setting)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "data", [None, [], {"unknown": 1}, {"top_k": True}, {"top_k": 1.5}, {"seed": "1"}, {"max_new_tokens": None}]
)
def test_stored_settings_are_checked_for_names_and_types(data: object) -> None:
    with pytest.raises(ConfigError):
        Sampling.from_dict(data)


def test_settings_survive_json_and_an_empty_value_gives_one_back() -> None:
    changed = Sampling().changed("temperature=0.5").changed(" top_k = 7 ").changed("max_new_tokens=3")
    assert (changed.temperature, changed.top_k, changed.max_new_tokens) == (0.5, 7, 3)
    assert Sampling.from_dict(json.loads(json.dumps(asdict(changed)))) == changed
    assert changed.changed("temperature=").changed("top_k=").changed("max_new_tokens=") == Sampling()


def test_generate_follows_the_settings(tiny_model: PreTrainedModel) -> None:
    prompt = torch.arange(3, 9)[None]

    def tokens(sampling: Sampling) -> list[int]:
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        return tiny_model.generate(prompt, max_new_tokens=12, pad_token_id=0, **sampling.generate_arguments())[
            0
        ].tolist()

    greedy = tiny_model.generate(prompt, max_new_tokens=12, pad_token_id=0, do_sample=False)[0].tolist()
    assert tokens(Sampling(temperature=0.0, top_p=0.5)) == greedy
    assert tokens(Sampling(top_k=1)) == greedy
    assert tokens(Sampling(seed=1)) == tokens(Sampling(seed=1))
    assert len({tuple(tokens(Sampling(seed=seed))) for seed in range(4)}) > 1
