"""How good a model is: perplexity on held-out text, and divergence from the original.

    import vptq

    result = vptq.evaluate("smol-3bit", reference="HuggingFaceTB/SmolLM2-135M-Instruct", text="wikitext2", windows=20)
    print(result.perplexity, result.kl_divergence)

Package and function share this name, as `vptq.quantize` does; see `_CallableModule`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    ModelLike = str | Path | PreTrainedModel

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    Attributes:
        model: The model measured.
        reference: The original it was compared with, if any.
        text: Where the text came from.
        windows: Token windows measured.
        seqlen: Tokens in each.
        perplexity: exp of the mean negative log likelihood per predicted token.
        reference_perplexity: The original's.
        kl_divergence: KL(original || model) per predicted token, in nats.
        same_top_token: Share of positions where both hold the same token likeliest.
        seconds: Time for the forward passes, of both models.
    """

    model: str
    reference: str | None
    text: str
    windows: int
    seqlen: int
    perplexity: float
    reference_perplexity: float | None
    kl_divergence: float | None
    same_top_token: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def evaluate(
    model: ModelLike,
    reference: ModelLike | None = None,
    text: str | Path = "wikitext2",
    seqlen: int = 2048,
    windows: int | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure a model's perplexity, and its divergence from the original when that is given.

    Args:
        model: Hub id, local folder, GGUF file, or a loaded model (which then stays as and where it is).
        reference: The original model, likewise.
        text: A local text file, `wikitext2`, `c4`, or a hub data set `NAME[:CONFIG][@SPLIT]`.
        seqlen: Tokens per window. A text that is shorter makes one shorter window.
        windows: How many windows at most; None for the whole text.
        tokenizer: The tokenizer to use; by default the model's, which needs a model given by name.
        device: Where to load models: "auto" (a GPU if there is one), or a torch device.
        dtype: Float dtype to load models in; "auto" is the one each is stored in.
        progress: Called with (windows done, windows in total).

    Raises:
        ConfigError: A model or text does not exist, the text is empty, or the models' vocabularies differ.
        CheckpointError: A model folder is damaged.
        VPTQError: The model's logits are not finite.
    """
    from vptq.errors import ConfigError
    from vptq.evaluate.perplexity import score_windows
    from vptq.source import load_tokenizer
    from vptq.text import token_windows

    if tokenizer is None:
        if not isinstance(model, str | Path):
            raise ConfigError("a model that is already loaded comes without its tokenizer; pass tokenizer=...")
        tokenizer = load_tokenizer(model)
    # Text before models: it is the quicker to find missing.
    tokens = token_windows(text, tokenizer, seqlen, windows)
    if tokens.shape[0] == 0:
        raise ConfigError(f"text {text} is empty; there is nothing to evaluate on")
    loaded = _load(model, device, dtype)
    loaded_reference = None if reference is None else _load(reference, device, dtype)
    start = time.perf_counter()
    scores = score_windows(loaded, tokens, loaded_reference, progress)
    return Evaluation(
        model=_name_of(model),
        reference=None if reference is None else _name_of(reference),
        text=str(text),
        windows=tokens.shape[0],
        seqlen=tokens.shape[1],
        seconds=time.perf_counter() - start,
        **asdict(scores),
    )


def _load(model: ModelLike, device: str, dtype: torch.dtype | str) -> PreTrainedModel:
    from vptq.source import load_model

    return load_model(model, dtype=dtype, device_map=device) if isinstance(model, str | Path) else model


def _name_of(model: ModelLike) -> str:
    return str(model) if isinstance(model, str | Path) else model.name_or_path or type(model).__name__


class _CallableModule(ModuleType):
    """Makes `vptq.evaluate(...)` work although importing this package binds the module to that name."""

    __call__ = staticmethod(evaluate)


sys.modules[__name__].__class__ = _CallableModule
