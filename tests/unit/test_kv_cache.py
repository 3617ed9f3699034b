"""Keys and values with room: what transformers' own cache would hold, at an address that stays."""

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel

from vptq.kv_cache import LEAST_ROOM, RoomyLayer, make_cache

IDS = torch.tensor([[1, 5, 9, 2, 7]])


def test_cache_storage_stays_where_it_is() -> None:
    layer = RoomyLayer(capacity=6)
    states = torch.randn(2, 1, 6, 4)
    shown = [layer.update(states[..., i : i + 2, :], -states[..., i : i + 2, :]) for i in (0, 2, 4)]
    assert len({keys.data_ptr() for keys, _ in shown}) == 1
    for end, (keys, values) in zip((2, 4, 6), shown, strict=True):
        assert torch.equal(keys, states[..., :end, :])
        assert torch.equal(values, -states[..., :end, :])
    assert layer.get_seq_length() == 6


def test_more_than_there_is_room_for_moves_once_and_stays() -> None:
    layer, states = RoomyLayer(), torch.randn(1, 2, 2 * LEAST_ROOM, 4)
    pointers = []
    for at in range(2 * LEAST_ROOM):
        keys, values = layer.update(states[..., at : at + 1, :], -states[..., at : at + 1, :])
        pointers.append(keys.data_ptr())
    assert torch.equal(keys, states)
    assert torch.equal(values, -states)
    assert len(set(pointers)) == 2


def test_cropped_tokens_are_written_over() -> None:
    layer, states = RoomyLayer(), torch.randn(1, 2, 6, 4)
    layer.update(states, states)
    layer.crop(-4)
    keys, _ = layer.update(states[..., :1, :], states[..., :1, :])
    assert torch.equal(keys, torch.cat([states[..., :2, :], states[..., :1, :]], dim=-2))


def test_chosen_sequences_go_on_alone() -> None:
    layer, states = RoomyLayer(), torch.randn(3, 2, 6, 4)
    layer.update(states, states)
    layer.batch_select_indices(torch.tensor([2, 0]))
    keys, _ = layer.update(states[:2, :, :1], states[:2, :, :1])
    assert torch.equal(keys, torch.cat([states[[2, 0]], states[:2, :, :1]], dim=-2))


def test_a_reset_layer_begins_anew() -> None:
    layer, states = RoomyLayer(), torch.randn(1, 2, 6, 4)
    layer.update(states, states)
    layer.reset()
    assert torch.equal(layer.update(-states, states)[0], -states)


def test_generate_gives_the_same_tokens_with_it(tiny_model: PreTrainedModel) -> None:
    cache = make_cache(tiny_model)
    assert cache is not None
    assert all(type(layer) is RoomyLayer for layer in cache.layers)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = tiny_model.generate(IDS, past_key_values=DynamicCache(), **settings)
    assert torch.equal(tiny_model.generate(IDS, past_key_values=cache, **settings), plain)
    assert cache.get_seq_length() == plain.shape[1] - 1


def test_a_model_with_a_sliding_window_keeps_its_own_cache() -> None:
    config = MistralConfig(
        **{"vocab_size": 63, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5},
    )
    assert make_cache(MistralForCausalLM(config)) is None


def test_a_cache_that_the_model_asks_for_is_left_to_it(
    tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model.generation_config, "cache_implementation", "static")
    assert make_cache(tiny_model) is None
