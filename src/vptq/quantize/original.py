"""The model to be quantized: its config, its weights as files, its tokenizer, and all of it where that is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vptq.download import download
from vptq.errors import CheckpointError, ConfigError, VPTQError
from vptq.progress import ProgressCallback, ProgressEvent, ignore
from vptq.quantize.memory import device_memory_bytes
from vptq.quantize.skeleton import Skeleton
from vptq.quantize.weights import WeightFiles, covers, spill
from vptq.source import ModelSource, load_model, load_tokenizer

WHOLE_MODEL_SHARE = 0.7
"""Of a GPU's memory, for the weights of a whole model; keys, values and activations need the rest."""


def compute_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """What blocks run in: float32 on a CPU, the stored dtype on a GPU."""
    return torch.float32 if device.type == "cpu" else stored


def empty_model(config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The modules of a causal language model: parameters on meta, buffers that its code computes on `device`.

    Raises:
        ConfigError: transformers has no such model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False):
            empty: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except ValueError as error:  # its text lists every class that would do
        kind = type(config).__name__
        raise ConfigError(f"transformers has no causal language model for {kind}: it cannot be quantized") from error
    for module in empty.modules():  # buffers such as rotary frequencies were made on the CPU
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device) if not buffer.is_meta else buffer
    return empty


@dataclass(frozen=True)
class Original:
    """Where the original is and how it runs.

    Attributes:
        source: where it is, or None for a model in memory.
        memory_model: the model in memory, or None.
        config: the model's own.
        device: where blocks run.
        compute_dtype: what they run in.
        spilled: the folder for its weights where they have to be converted first.
    """

    source: ModelSource | None
    memory_model: nn.Module | None
    config: Any
    device: torch.device
    compute_dtype: torch.dtype
    spilled: Path

    @property
    def name(self) -> str:
        """A short name for the report."""
        return self.source.name if self.source else type(self.memory_model).__name__

    @property
    def base_model(self) -> str | None:
        """The original's hub id, where it has one that a reader could follow."""
        return None if self.source is None or self.source.is_local else self.source.folder

    def empty_model(self, config: Any = None) -> nn.Module:
        """The modules of the model, or of one with this config; see the function of this name."""
        return empty_model(self.config if config is None else config, self.compute_dtype, self.device)

    def open_skeleton(self, progress: ProgressCallback = ignore) -> Skeleton:
        """The model's modules on the meta device and its weights as files, fetched and converted where need be."""
        if self.source is not None:
            download(self.source, progress)
        progress(ProgressEvent("opening the original"))
        empty = self.empty_model()
        if self.spilled.is_dir():
            return Skeleton(empty, WeightFiles(self.spilled), self.device)
        if self.source is not None and self.source.is_local and self.source.gguf_file is None:
            files = WeightFiles(Path(self.source.folder))
            if covers(files, empty):
                return Skeleton(empty, files, self.device)
        whole = self.memory_model if self.memory_model is not None else self._load_complete()
        return Skeleton(empty, spill(whole, self.spilled), self.device)

    def tokenizer(self) -> Any | None:
        """The original's tokenizer, or None where there is none."""
        if self.source is None:
            return None
        try:
            return load_tokenizer(self.source)
        except VPTQError:
            return None

    def generation_config(self) -> Any | None:
        """The original's generation config, or None where there is none."""
        if self.memory_model is not None:
            return getattr(self.memory_model, "generation_config", None)
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self._source.folder)
        except OSError:
            return GenerationConfig.from_model_config(self.config)

    def whole_model(self) -> Any:
        """The original in memory, all of it: on the GPU that is asked for if there is room, otherwise on the CPU.

        Where it runs decides what it samples, so the GPU's size counts and not what happens to be free of it.
        """
        if self.memory_model is not None:
            return self.memory_model
        spilled = self.spilled.is_dir()
        model: Any = self._from_spill(self.spilled) if spilled else load_model(self._source, dtype=self.compute_dtype)
        size = sum(parameter.nbytes for parameter in model.parameters())
        return model.to(self.device) if size <= WHOLE_MODEL_SHARE * device_memory_bytes(self.device) else model

    def _load_complete(self) -> Any:
        """The original through transformers, which would fill in a missing tensor with random numbers."""
        loaded: Any = load_model(self._source, dtype="auto", output_loading_info=True)
        model, loading = loaded
        if loading["missing_keys"]:
            raise CheckpointError(f"{self.source}: no file of it holds {', '.join(sorted(loading['missing_keys']))}")
        return model

    def _from_spill(self, folder: Path) -> Any:
        """The whole model from the converted files: quicker than converting it again."""
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.config, dtype=self.compute_dtype)  # type: ignore[no-untyped-call]
        for path in sorted(folder.glob("*.safetensors")):
            model.load_state_dict(load_file(path), strict=False)
        model.tie_weights()
        return model.eval()

    @property
    def _source(self) -> ModelSource:
        assert self.source is not None
        return self.source
