"""vLLM's side of a VPTQ checkpoint: `vllm serve DIR` runs it from its config.json alone.

vLLM finds this module through the entry point `vllm.general_plugins` of this package (`register_with_vllm`). It asks
the config here for the method of every linear layer, by vLLM's names; has the method put parameters in place, through
whose `weight_loader` the checkpoint's tensors come; and has it multiply. What the layers do with all that is in
`vptq.integrations.fused_linear`, which knows nothing of vLLM.

The parameters are doors and nothing else: empty, one for each name a stored layer may have, so that a tensor that does
not belong is refused by us, with its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from vptq.config import LayerConfig, QuantConfig, tensor_specs
from vptq.errors import ConfigError
from vptq.integrations.fused_linear import DENSE, FusedLinear, Span, StoredLayer

# A layer that has everything: its tensors have all the names there are.
_EVERYTHING = LayerConfig(
    in_features=2,
    out_features=1,
    vector_len=1,
    num_centroids=2,
    num_residual_centroids=2,
    outlier_size=1,
    outlier_vector_len=2,
    outlier_num_centroids=1,
    enable_norm=True,
    enable_perm=True,
    is_packed=False,
)
_STACKED_IN_ORDER = ("qkv_proj", "gate_up_proj")
"""Layers that some checkpoints store stacked, and vLLM takes in that order. Others it reorders while loading."""


_PARTS = {"q": 0, "k": 1, "v": 2}


class VptqConfig(QuantizationConfig):
    """A checkpoint's `quantization_config`.

    Args:
        config: Which layers are quantized, and how; under the checkpoint's names.
    """

    def __init__(self, config: QuantConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def get_name(cls) -> str:
        """What config.json calls it."""
        return "vptq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Every dtype the operators have; stored floats are brought to the model's."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """NVIDIA GPUs for which Triton compiles."""
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VptqConfig:
        """Read and check `quantization_config`.

        Raises:
            ConfigError: An entry is invalid; the message names the layer.
        """
        return cls(QuantConfig.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Bring the entries under the names that vLLM has for the modules."""
        layers = hf_to_vllm_mapper.apply_dict(dict(self.config.layers))
        self.config = dataclasses.replace(self.config, layers=layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM is to run a layer; None leaves one that is not linear to vLLM.

        Raises:
            ConfigError: The checkpoint quantizes what cannot be run here.
        """
        if isinstance(layer, LinearBase):
            stored = [self._stored(path) for path in self._stored_paths(prefix)]
            if all(one.config is None for one in stored):
                return UnquantizedLinearMethod()
            return VptqLinearMethod(stored)
        if isinstance(layer, VocabParallelEmbedding):
            head = self._stored(prefix)
            if head.config is None:
                return None
            if isinstance(layer, ParallelLMHead):
                return VptqLinearMethod([head])
            raise ConfigError(f"{prefix} is a quantized embedding, which vLLM cannot run through vptq; use vptq serve")
        for path in self.config.layers:
            if prefix and path.startswith(prefix + "."):
                raise ConfigError(
                    f"{path} is a quantized part of a {type(layer).__name__}, and vLLM cannot run quantized experts "
                    "through vptq; use vptq serve"
                )
        return None

    def _stored_paths(self, prefix: str) -> list[str]:
        """The checkpoint's layers that a layer of vLLM stacks, in order."""
        for name, parts in self.packed_modules_mapping.items():
            if prefix == name or prefix.endswith(f".{name}"):
                return [prefix.removesuffix(name) + part for part in parts]
        return [prefix]

    def _stored(self, path: str) -> StoredLayer:
        return StoredLayer(path, self.config.layer_for(path))


class VptqLinearMethod(LinearMethodBase):
    """Runs one linear layer of vLLM, of which at least one stored layer is quantized.

    Args:
        stored: The checkpoint's layers that it stacks.
    """

    def __init__(self, stored: list[StoredLayer]) -> None:
        self.stored = stored

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Put the doors in place.

        Raises:
            ConfigError: The stored layers do not make up this layer.
        """
        path = self.stored[0].path
        if len(self.stored) < len(output_partition_sizes) and path.rpartition(".")[2] not in _STACKED_IN_ORDER:
            raise ConfigError(
                f"{path} is stored stacked and quantized; of such layers vLLM can run {', '.join(_STACKED_IN_ORDER)} "
                "through vptq, others it reorders while loading; use vptq serve"
            )
        columns = _columns(layer, input_size_per_partition, input_size)
        rows = _rows(layer, output_partition_sizes, output_size)
        stored = [_without_bias(one) for one in self.stored]
        layer.vptq = FusedLinear(stored, columns, rows, params_dtype)
        specs = {name: spec.dtype for name, spec in tensor_specs(_EVERYTHING, params_dtype).items()}
        if stored[0].config is not None:
            specs |= {name: spec.dtype for name, spec in tensor_specs(stored[0].config, params_dtype).items()}
        for name, dtype in {DENSE: params_dtype, **specs}.items():
            door = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            door.weight_loader = _loader(layer.vptq, name)  # type: ignore[attr-defined]
            holder, _, leaf = name.rpartition(".")
            if holder:
                layer.add_module(holder, nn.Module())
            layer.get_submodule(holder).register_parameter(leaf, door)
        engine = get_current_vllm_config_or_none()
        if engine is not None and engine.load_config.load_format == "dummy":
            layer.vptq.fill_missing(door.device)

    def process_weights_after_loading(self, layer: Any) -> None:
        """See that every tensor has come.

        Raises:
            CheckpointError: One has not.
            ConfigError: A bias is stored that vLLM's model has no place for.
        """
        for one in self.stored:
            if one.config is not None and one.config.bias and getattr(layer, "bias", None) is None:
                raise ConfigError(f"{one.path} has a bias, which vLLM's model has no place for; use vptq serve")
        layer.vptq.check_complete()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Outputs [..., sum of the parts] for x [..., columns of this rank]."""
        y: Tensor = layer.vptq(x, bias)
        return y

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """A head that is quantized cannot be the embedding.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{self.stored[0].path} is quantized, but config.json ties it to the embedding; set tie_word_embeddings to "
            "false there if they are stored apart"
        )


def _without_bias(stored: StoredLayer) -> StoredLayer:
    """vLLM loads and cuts biases itself."""
    config = stored.config
    return StoredLayer(stored.path, None if config is None else dataclasses.replace(config, bias=False))


def _columns(layer: Any, held: int, whole: int) -> Span:
    start = 0 if held == whole else layer.tp_rank * held
    return Span(start, start + held, whole)


def _rows(layer: Any, sizes: list[int], output_size: int) -> list[Span]:
    """What this rank holds of each part, by the rules of vLLM's own loaders."""
    if isinstance(layer, VocabParallelEmbedding):
        held = layer.shard_indices
        start, stop = held.org_vocab_start_index, held.org_vocab_end_index
        return [Span(start, stop, layer.org_vocab_size, sizes[0] - (stop - start))]
    ranks = output_size // sum(sizes)  # 1 where outputs are not cut: row-parallel and replicated layers
    spans = []
    for part, size in enumerate(sizes):
        # Fewer key and value heads than ranks: several ranks hold the same ones.
        copies = getattr(layer, "num_kv_head_replicas", 1) if part else 1
        start = layer.tp_rank // copies * size if ranks > 1 else 0
        spans.append(Span(start, start + size, ranks // copies * size))
    return spans


def _loader(linear: FusedLinear, name: str) -> Callable[..., None]:
    """What vLLM calls with a tensor that the checkpoint has under this name, and with the part that it is for."""

    def load(door: nn.Parameter, tensor: Tensor, part: Any = None) -> None:
        number = _PARTS.get(part, part)
        if len(linear.stored) == 1 and part is None:
            number = 0
        if number not in range(len(linear.stored)):
            stacked = ", ".join(one.path for one in linear.stored)
            raise ConfigError(f"vLLM stacks {stacked} in a way that vptq does not know: {part!r}; use vptq serve")
        linear.receive(number, name, tensor.to(door.device, copy=True))

    return load


register_quantization_config("vptq")(VptqConfig)
