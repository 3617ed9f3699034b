"""Which models the web chat offers, and those that are loaded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vptq.checkpoint import Checkpoint
from vptq.download import download
from vptq.errors import CheckpointError
from vptq.generation import PrefixCache
from vptq.model import AutoModelForCausalLM
from vptq.progress import ProgressCallback, ignore
from vptq.source import load_config, load_tokenizer, resolve_model
from vptq.spec import QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Published models of several sizes and bits, small to large.
KNOWN_MODELS = (
    "VPTQ-community/Qwen2.5-7B-Instruct-v16-k65536-65536-woft",
    "VPTQ-community/Qwen2.5-7B-Instruct-v8-k65536-256-woft",
    "VPTQ-community/Meta-Llama-3.1-8B-Instruct-v12-k65536-4096-woft",
    "VPTQ-community/Meta-Llama-3.1-8B-Instruct-v8-k65536-256-woft",
    "VPTQ-community/Meta-Llama-3.1-8B-Instruct-v8-k65536-65536-woft",
    "VPTQ-community/Qwen2.5-14B-Instruct-v8-k65536-0-woft",
    "VPTQ-community/Qwen2.5-32B-Instruct-v8-k65536-0-woft",
    "VPTQ-community/Meta-Llama-3.1-70B-Instruct-v16-k65536-65536-woft",
    "VPTQ-community/Qwen2.5-72B-Instruct-v8-k65536-0-woft",
)
# Side by side is two; one more would be memory that nobody looks at.
MOST_LOADED = 2


@dataclass(frozen=True)
class Choice:
    """A model to choose.

    Attributes:
        model: Hub id, folder or GGUF file.
        label: Its name and bits, for people.
    """

    model: str
    label: str


def local_choice(model: str | Path) -> Choice:
    """A folder, GGUF file or hub id that was asked for; what is here is looked at, so that damage is known early.

    Raises:
        ConfigError: There is no such model.
        CheckpointError: It is a damaged VPTQ checkpoint.
    """
    source = resolve_model(model)
    if not source.is_local:
        return known_choice(source.folder)
    if source.gguf_file is not None or getattr(load_config(source), "quantization_config", None) is None:
        return Choice(str(source), f"{source.name} (not quantized by vptq)")
    layers = Checkpoint.open(source.folder).layers().values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    if not weights:
        raise CheckpointError(f"{source}: no layer of it is quantized")
    return Choice(str(source), f"{source.name} ({sum(layer.stored_bits for layer in layers) / weights:.3g} bits)")


def known_choice(model: str) -> Choice:
    """A model on the hub, its bits as its name says."""
    name = model.rpartition("/")[2]
    try:
        return Choice(model, f"{name} ({QuantSpec.parse(name).index_bits_per_weight:.3g} bits)")
    except ValueError:
        return Choice(model, name)


def download_all(models: Iterable[str], tell: ProgressCallback, token: str | None) -> threading.Thread:
    """Fetch models into the hub's cache, one after the other, in a thread that ends with the program."""

    def fetch() -> None:
        for model in models:
            download(model, tell, token)

    thread = threading.Thread(target=fetch, daemon=True, name="vptq-download")
    thread.start()
    return thread


class LoadedModels:
    """The models used last, loaded when they are needed. For one thread.

    Args:
        token: For the hub.
        tell: Told what is downloaded.
    """

    def __init__(self, token: str | None = None, tell: ProgressCallback = ignore) -> None:
        self._token = token
        self._tell = tell
        self._loaded: OrderedDict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase, PrefixCache]] = OrderedDict()

    def __contains__(self, model: str) -> bool:
        return model in self._loaded

    def get(self, model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PrefixCache]:
        """A model, its tokenizer, and what it remembers of its last answer.

        Raises:
            VPTQError: It cannot be loaded.
        """
        if model not in self._loaded:
            while len(self._loaded) >= MOST_LOADED:
                self._loaded.popitem(last=False)
            download(model, self._tell, self._token)
            tokenizer = load_tokenizer(model, token=self._token)
            loaded = AutoModelForCausalLM.from_pretrained(model, device_map="auto", token=self._token)
            self._loaded[model] = loaded, tokenizer, PrefixCache()
        self._loaded.move_to_end(model)
        return self._loaded[model]
