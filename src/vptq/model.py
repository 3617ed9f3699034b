"""`vptq.AutoModelForCausalLM`: the published package's entry point, kept as a thin door to transformers.

There is one loader, `transformers.AutoModelForCausalLM.from_pretrained`, which `import vptq` teaches to read VPTQ
checkpoints. This class adds the keyword that only the published package knew (`gpu_utilization`) and one of our own
(`codebook_form`), and puts what can go wrong into one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vptq.errors import ConfigError
from vptq.linear import VQuantLinear
from vptq.ops.schemas import check_codebook_form
from vptq.source import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AutoModelForCausalLM:
    """Loads causal language models, quantized or not."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        gpu_utilization: float = 1.0,
        codebook_form: str = "",
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a model for inference.

        Args:
            pretrained_model_name_or_path: Hub id, local folder, or GGUF file.
            *model_args: Passed to the model's constructor.
            gpu_utilization: Share of each GPU's memory to fill, above 0 and at most 1; the rest of the model goes to
                the CPU. Ignored when `max_memory` is given.
            codebook_form: "int8" lets CPU kernels round codebooks to bytes for single tokens, which is faster and a
                little less accurate; "exact" does not; empty leaves it to the environment variable VPTQ_CPU_CODEBOOK.
            **kwargs: As for `transformers.AutoModelForCausalLM.from_pretrained`: device_map, max_memory, dtype, token,
                revision, trust_remote_code and so on. A memory limit without a device_map means device_map="auto".

        Returns:
            The model, in eval mode.

        Raises:
            ConfigError: There is no such model, or a setting is impossible.
            CheckpointError: The checkpoint is damaged or inconsistent.
        """
        check_codebook_form(codebook_form)
        if not 0 < gpu_utilization <= 1:
            raise ConfigError(f"gpu_utilization is {gpu_utilization}; it must be above 0 and at most 1")
        if gpu_utilization < 1 and kwargs.get("max_memory") is None:
            kwargs["max_memory"] = _memory_limits(gpu_utilization)
        if kwargs.get("max_memory") is not None and kwargs.get("device_map") is None:
            kwargs["device_map"] = "auto"
        if (dtype := kwargs.pop("torch_dtype", None)) is not None:
            kwargs.setdefault("dtype", dtype)
        model = load_model(pretrained_model_name_or_path, *model_args, **kwargs)
        for layer in model.modules():
            if isinstance(layer, VQuantLinear):
                layer.codebook_form = codebook_form
        return model


def _memory_limits(share: float) -> dict[int | str, int]:
    """What accelerate would use by itself, with the GPUs' part scaled."""
    from accelerate.utils import get_max_memory

    limits: dict[int | str, int] = get_max_memory()
    return {device: int(limit * share) if isinstance(device, int) else limit for device, limit in limits.items()}
