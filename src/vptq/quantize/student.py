"""A quantized model that is trained to answer as its original does, and what it is measured by.

The teacher is the original's last hidden states, made once, one block in memory at a time; both go through the same
output head, which is not trained. Where the head is quantized, the teacher goes through the original's and the student
through its own, made dense once: looking a large head up again for every slice of positions, and collecting gradients
for its codebooks there, would take longer than all blocks together. The student is the quantized model in float32, its
indices as stored: dense weights exist for one decoder block at a time, because every block is checkpointed and looks
its weights up again for its gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vptq.checkpoint import Checkpoint
from vptq.linear import VQuantLinear
from vptq.quantize.head import divergence_of, logits_of, loss_in_slices
from vptq.quantize.original import empty_model
from vptq.quantize.precision import quick_products
from vptq.quantize.skeleton import Skeleton, recompute
from vptq.quantize.training import trained_parameters
from vptq.quantize.weights import WeightFiles


class Student:
    """A quantized causal language model with gradients.

    Attributes:
        model: the transformers model, in eval mode, float32.
        blocks: the quantized layers of each decoder block, by their path in the model.
    """

    def __init__(self, folder: Path, device: torch.device, original: Skeleton) -> None:
        """Loads the model of `folder`, and where its head is quantized that of `original`.

        Raises:
            CheckpointError: the folder is no quantized model, or damaged.
            ConfigError: transformers stores this architecture under other names than it runs it.
        """
        from transformers import AutoConfig

        stored = Checkpoint.open(folder)
        config: Any = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        self.model: Any = empty_model(config, torch.float32, device)
        skeleton = Skeleton(self.model, WeightFiles(folder), device)
        self._teacher: Any = self.model
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        for path in stored.layers():
            layer = VQuantLinear.from_weight(stored.load_layer(path), torch.float32).to(device)
            if self.model.get_submodule(path) is head:
                head.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
                head.register_parameter("bias", layer.bias)
                self._teacher = original.load_head(torch.float32)
            else:
                self.model.set_submodule(path, layer)
        skeleton.load_everything(torch.float32)
        self.device = device
        self.blocks: list[dict[str, VQuantLinear]] = []
        for number, block in enumerate(skeleton.blocks):
            prefix = f"{skeleton.blocks_name}.{number}."
            quantized = {f"{prefix}{path}": m for path, m in block.named_modules() if isinstance(m, VQuantLinear)}
            self.blocks.append(quantized)
            recompute(block)

    def trained(self) -> dict[str, nn.Parameter]:
        """What training moves, by name, asked for gradients."""
        return trained_parameters(self.model)

    def hidden(self, tokens: Tensor) -> Tensor:
        """The last hidden states [batch, seqlen, width] of tokens [batch, seqlen], the final norm applied."""
        states: Tensor = self.model.get_decoder()(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        return states

    def divergence(self, tokens: Tensor, targets: Tensor, *, gradients: bool = False) -> float:
        """Mean KL(original || student) a token, in nats.

        Args:
            tokens: [batch, seqlen].
            targets: [batch, seqlen, width], the original's last hidden states.
            gradients: add those of the result to the trained parameters.
        """
        with torch.set_grad_enabled(gradients), quick_products(self.device):
            hidden = self.hidden(tokens)
        count = tokens.numel()
        return loss_in_slices(
            hidden.float(),
            lambda piece, part: self._divergence_at(piece, targets[:, part]) / count,
            gradients=gradients,
        )

    def _divergence_at(self, hidden: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            original = logits_of(self._teacher, target.to(hidden))
        return divergence_of(original, logits_of(self.model, hidden))
