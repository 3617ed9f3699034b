"""A model brought up for talking to it, with something to look at meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vptq.cli.console import quiet_transformers
from vptq.cli.progress import waiting
from vptq.progress import ProgressEvent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(
    model: str | Path, tokenizer: str = "", device: str = "auto", dtype: str = "auto", codebook_form: str = ""
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        model: Hub id, local folder, or GGUF file.
        tokenizer: Where the tokenizer is; empty for with the model.
        device: Where to compute.
        dtype: Name of a float type, or "auto" for the one it is stored in.
        codebook_form: As for `vptq.AutoModelForCausalLM.from_pretrained`.

    Raises:
        VPTQError: One cannot be loaded.
    """
    token = os.environ.get("HF_TOKEN") or None
    with waiting(f"loading {model}") as shown:
        quiet_transformers()
        from vptq.download import download
        from vptq.model import AutoModelForCausalLM
        from vptq.source import load_tokenizer

        loaded_tokenizer = load_tokenizer(tokenizer or model, token=token)
        download(model, shown, token)
        shown(ProgressEvent(f"loading {model}"))
        loaded = AutoModelForCausalLM.from_pretrained(
            *(model,), device_map=device, dtype=dtype, token=token, codebook_form=codebook_form
        )
    return loaded, loaded_tokenizer
