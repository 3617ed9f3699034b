"""Keys and values with room to grow, in place of transformers' dynamic cache.

transformers' dynamic layers concatenate: every token copies all keys and values so far into blocks a little larger than
those it frees, which no later token can use. On a CPU that costs more than time: from about 500 tokens on the process
grew by 12 MB a token (SmolLM2-135M, glibc's allocator). Its static layers attend to the whole allocated length. Storage
that is allocated ahead, of which the filled part is shown, costs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vptq.transformers_versions import start_cache_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAST_ROOM = 256


def make_cache(model: PreTrainedModel, capacity: int = 0) -> DynamicCache | None:
    """An empty cache with room for a model; None where the model keeps something else than all tokens.

    Args:
        model: A causal language model.
        capacity: Tokens to have room for at once, where that is known.
    """
    takes_dynamic: Any = getattr(model, "_supports_default_dynamic_cache", lambda: False)
    if not takes_dynamic() or getattr(model.generation_config, "cache_implementation", None):
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if not cache.layers or not is_plain(cache):
        return None
    cache.layers = [RoomyLayer(capacity) for _ in cache.layers]
    return cache


def is_plain(cache: Any) -> bool:
    """Whether a cache keeps all keys and values, and nothing else: no sliding window, no running state."""
    return type(cache) is DynamicCache and all(type(layer) in (DynamicLayer, RoomyLayer) for layer in cache.layers)


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A dynamic cache layer that appends in place.

    `keys` and `values` [batch, heads, tokens, head_dim] are the filled beginning of its storage, so what transformers
    does to them (cropping, choosing sequences) needs nothing else: anything that is not that beginning is copied by the
    next update.

    Args:
        capacity: Tokens there is room for at first; it grows as it must.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self._storage: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, heads, tokens, head_dim]; return all there are so far."""
        if not self.is_initialized:
            start_cache_layer(self, key_states, value_states)
        key_storage, value_storage = self._storage or (None, None)
        self.keys, key_storage = self._append(self.keys, key_storage, key_states)
        self.values, value_storage = self._append(self.values, value_storage, value_states)
        self._storage = key_storage, value_storage
        return self.keys, self.values

    def _append(self, stored: Tensor | None, storage: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored then, and the storage that it is the beginning of."""
        held = new[..., :0, :] if stored is None or not stored.numel() else stored
        length, end = held.shape[-2], held.shape[-2] + new.shape[-2]
        is_beginning = storage is not None and (not length or held.data_ptr() == storage.data_ptr())
        if storage is None or not is_beginning or storage.shape[0] != new.shape[0] or end > storage.shape[-2]:
            room = max(self.capacity, end + max(LEAST_ROOM, end // 4))
            storage = new.new_empty(*new.shape[:-2], room, new.shape[-1])
            storage[..., :length, :] = held
        storage[..., length:end, :] = new
        return storage[..., :end, :], storage
