"""Loading VPTQ checkpoints through plain transformers, on any device.

transformers refuses VPTQ without CUDA, its replacement loop fails on every nested model, it looks shared entries up
under the wrong name, rejects unpacked indices, casts legacy float16 index carriers by value, and installs tensors of
the wrong shape without a word. Importing this module puts the two classes below in their place, in the dictionaries
that `from_pretrained` consults. They hook into the usual loader and do not replace it: transformers still resolves the
files, streams each tensor to its device, offloads, ties weights and saves. What its versions do differently is in
`vptq.transformers_versions`.

    before the weights   match the config's entries with the model's linears, check the headers of all shards against
                         `tensor_specs`, put a `VQuantLinear` on the meta device in each place
    after the weights    bring legacy carriers into the current layout, check what only the data can tell, and write
                         down in the config what the model now holds, so that `save_pretrained` stores exactly that
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config as hf_config

from vptq.checkpoint import read_headers
from vptq.config import QuantConfig
from vptq.errors import CheckpointError, ConfigError
from vptq.integrations.matching import LayerMatch, match_layers
from vptq.integrations.offload import index_tensors, is_offloaded, keep_layers_whole
from vptq.integrations.precision import check_fits, dtype_for
from vptq.linear import VQuantLinear
from vptq.shared_input import fuse_shared_inputs
from vptq.transformers_versions import (
    casts_every_float,
    is_excluded,
    refuse_overlooked_configs,
    watch_checkpoint_files,
)
from vptq.transformers_versions import checkpoint_files as watched_files
from vptq.weight import check_indices, normalize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VptqConfig(hf_config.VptqConfig):
    """transformers' `VptqConfig`, reading every layout that was ever published.

    It keeps that name because transformers compares class names when a config is also passed by hand.

    Attributes:
        config_for_layers: On-disk entries by module path.
        shared_layer_config: On-disk entries by the last name of a path.
        modules_to_not_convert: Modules left dense; None leaves the choice to the checkpoint.
    """

    def post_init(self) -> None:
        """Check every entry.

        Raises:
            ConfigError: An entry is invalid.
        """
        self.parsed()

    def parsed(self) -> QuantConfig:
        """The same in this package's words."""
        return QuantConfig.from_dict(self.to_dict())

    def store(self, config: QuantConfig) -> None:
        """Take over `config` as what `save_pretrained` writes."""
        for key, value in config.to_dict().items():
            if key != "quant_method":  # an enum in transformers
                setattr(self, key, value)


class VptqHfQuantizer(HfQuantizer):
    """Builds and checks the quantized layers around transformers' own weight loading."""

    requires_calibration = True
    quantization_config: VptqConfig

    def __init__(self, quantization_config: hf_config.VptqConfig, **kwargs: Any) -> None:
        if not isinstance(quantization_config, VptqConfig):  # made by hand from the class that transformers exports
            quantization_config = VptqConfig(**quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)
        self._matches: list[LayerMatch] = []
        self._dtype = torch.get_default_dtype()
        self._device_map: Any = None
        self._narrowed = False
        watch_checkpoint_files()

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Remembers it for `update_dtype`."""
        self._device_map = device_map
        return device_map

    def update_dtype(self, dtype: Any) -> Any:
        """float16 instead of bfloat16 on a GPU that has only the former. None means "as stored" to 4.57 too."""
        if dtype is None:
            return "auto"
        found = dtype_for(dtype, self._device_map)
        self._narrowed = found != dtype
        return found

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        self._dtype = dtype or torch.get_default_dtype()
        checkpoint_files: Sequence[str] | None = kwargs.get("checkpoint_files", watched_files())
        excluded = self.get_modules_to_not_convert(
            model, self.quantization_config.modules_to_not_convert, list(model._keep_in_fp32_modules or ())
        )
        self._matches = match_layers(
            model,
            self.quantization_config.parsed(),
            None if checkpoint_files is None else read_headers(checkpoint_files),
            lambda path: is_excluded(path, excluded),
        )
        for match in self._matches:
            layer = VQuantLinear.from_config(match.config, device="meta", dtype=self._dtype)
            _declare_stored_carriers(layer, match, self._dtype)
            model.set_submodule(match.path, layer)
        # A device boundary inside a layer would separate its indices from its codebooks.
        model._no_split_modules = {*(model._no_split_modules or ()), VQuantLinear.__name__}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        keep_layers_whole(model)
        for match in self._matches:
            layer = model.get_submodule(match.path)
            _settle_dtypes(layer, match, self._dtype)
            check_indices(match.config, index_tensors(layer), match.stored_path)
            layer.requires_grad_(False)  # the loader makes every float a trainable parameter
        if self._narrowed:
            check_fits(model)
        fuse_shared_inputs(model)
        self.quantization_config.store(
            QuantConfig(
                layers={match.stored_path: match.config for match in self._matches},
                modules_to_not_convert=self.quantization_config.parsed().modules_to_not_convert,
            )
        )
        model.config.quantization_config = self.quantization_config  # 4.57 has given the model a copy of its own
        _drop_nested_config(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Put dense linear layers back, for `model.dequantize()`."""
        for path, module in list(model.named_modules()):
            if isinstance(module, VQuantLinear):
                model.set_submodule(path, module.to_dense(dtype).requires_grad_(False))
        return model

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained; `Trainer` refuses a quantized model without any, whatever this says."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the model: the layers' operators trace without a graph break."""
        return True

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """`save_pretrained` stores the quantized layers as they are."""
        return True


def _declare_stored_carriers(layer: nn.Module, match: LayerMatch, dtype: torch.dtype) -> None:
    """Give index tensors on the meta device the dtype that the file has.

    The loader casts a float tensor to the dtype declared for it; float16 that carries index bits would be lost.
    4.57 casts every float tensor to the model's dtype, whatever is declared.
    """
    for name, declared in layer.state_dict().items():
        header = match.headers.get(name)
        if header is None or declared.is_floating_point() or header.dtype == declared.dtype:
            continue
        if header.is_floating_point() and header.dtype != dtype and casts_every_float():
            raise ConfigError(
                f"{match.stored_path}.{name} holds indices as {header.dtype}, which this version of transformers would "
                f"cast to {dtype}; load with dtype={header.dtype} and save once, or use transformers 5"
            )
        _replace_tensor(layer, name, torch.empty_like(declared, dtype=header.dtype))


def _settle_dtypes(layer: nn.Module, match: LayerMatch, dtype: torch.dtype) -> None:
    """Bring each tensor of a loaded layer into the dtype of `tensor_specs`.

    That ends legacy carriers, and does for floats what the loader leaves undone when it has renamed a tensor.
    """
    tensors = layer.state_dict()
    for name, settled in normalize(match.config, tensors, dtype).items():
        found = tensors[name].dtype
        if found == settled.dtype:
            continue
        where = f"{match.stored_path}.{name}"
        if is_offloaded(layer, name):
            raise ConfigError(
                f"{where} is stored as {found} and has to become {settled.dtype}, which an offloaded tensor cannot; "
                "load the model without offload once and save it"
            )
        if not settled.is_floating_point() and name in match.headers and found != match.headers[name].dtype:
            raise CheckpointError(f"{where} became {found} while loading, which loses index bits")
        _replace_tensor(layer, name, settled)


def _replace_tensor(layer: nn.Module, name: str, value: Tensor) -> None:
    holder_name, _, leaf = name.rpartition(".")
    holder = layer.get_submodule(holder_name)
    if leaf in holder._parameters:
        setattr(holder, leaf, nn.Parameter(value, requires_grad=False))
    else:
        setattr(holder, leaf, value)


def _drop_nested_config(model: PreTrainedModel) -> None:
    """Remove the copy that a composite model's text part may carry: the one on top is current."""
    text_config = model.config.get_text_config(decoder=True)
    if text_config is not model.config and hasattr(text_config, "quantization_config"):
        del text_config.quantization_config


# As part of the import and not as a function to call: when this module is what imports transformers, the post-import
# hook comes back here before anything below that import exists.
auto.AUTO_QUANTIZER_MAPPING["vptq"] = VptqHfQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING["vptq"] = VptqConfig
refuse_overlooked_configs()
