"""What the tests of peft share: a quantized model with an adapter on it, and a few steps of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

IDS = torch.arange(1, 49).reshape(4, 12)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def load(folder: Path, **kwargs: Any) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def adapted(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model with a new adapter, the same for the same options."""
    import peft  # optional: tests that use this have asked for it

    torch.manual_seed(0)
    config = peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, "task_type": "CAUSAL_LM"} | options)
    return peft.get_peft_model(load(folder, dtype=dtype), config)


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def train(model: Any, steps: int = 6, autocast: bool = False) -> list[float]:
    """The loss before each step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all that is not an adapter's."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
