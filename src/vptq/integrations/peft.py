"""LoRA adapters of peft on quantized layers.

peft takes a table of layer types it does not know (`LoraConfig._register_custom_module`), which a user would have to
fill in for every config. Here a subclass of its `LoraModel` does that, in the place where `get_peft_model`,
`PeftModel.from_pretrained` and transformers' `add_adapter` look the class up. A model without quantized layers goes the
usual way.

The adapter's layer is peft's own for linear layers, less what needs a dense weight to write to: an adapter cannot be
merged into indices, and initializations that move a part of the weight into the adapter have no weight to move it from.
DoRA only reads the weight, and gets it dequantized.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftType
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor, nn

from vptq.errors import ConfigError
from vptq.linear import VQuantLinear


class LoraModel(lora.LoraModel):
    """peft's `LoraModel`, knowing quantized layers. It keeps that name: it stands in for peft's on every model."""

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        paths = _quantized_paths(model)
        if not paths:
            return
        peft_config._register_custom_module({VQuantLinear: VQuantLoraLinear})
        if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == "all-linear":
            # peft fills in the dense ones, which are none of a model that is quantized throughout.
            dense = _maybe_include_all_linear_layers(peft_config, model).target_modules
            peft_config.target_modules = {*dense, *paths}

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(isinstance(module, VQuantLoraLinear) for module in self.model.modules()):
            _refuse_merge()  # before a dense layer has been merged


class VQuantLoraLinear(lora.Linear):
    """An adapter beside a quantized layer. (peft knows adapted linear layers by the "Linear" in a class's name.)"""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter.

        Raises:
            ConfigError: The adapter is of a kind that needs a dense weight.
        """
        _check_supported(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """What peft may make of a config, by the options that ask for it."""
        return {(): None, ("use_dora",): _DoraVariant, ("alora_invocation_tokens",): ALoraLinearVariant}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ConfigError: Always.
        """
        _refuse_merge()

    def _get_in_out_features(self, module: VQuantLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: VQuantLinear) -> tuple[torch.device, torch.dtype]:
        return base_layer.get_parameter("indices").device, base_layer.dtype


class _DoraVariant(DoraLinearVariant):
    @staticmethod
    def init(module: VQuantLoraLinear, adapter_name: str, **kwargs: Any) -> None:
        dora = _DoraLayer(fan_in_fan_out=False)
        dora.update_layer(
            base_layer=module.get_base_layer(),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = dora


class _DoraLayer(DoraLinearLayer):
    """peft's magnitudes of DoRA, with a dense layer made for it each time it wants to see the weight."""

    def update_layer(self, *, base_layer: VQuantLinear, **kwargs: Any) -> None:
        super().update_layer(base_layer=base_layer.to_dense(), **kwargs)

    def forward(self, x: Tensor, *, base_layer: VQuantLinear, **kwargs: Any) -> Tensor:
        scaled: Tensor = super().forward(x, base_layer=base_layer.to_dense(), **kwargs)
        return scaled


def _quantized_paths(model: nn.Module) -> list[str]:
    """Layers that "all-linear" means: adapted ones peft finds itself, and the output head it leaves out."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, VQuantLinear) and module is not head and not path.endswith(".base_layer")
    ]


def _check_supported(config: LoraConfig) -> None:
    asked = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
        if field.name not in ("use_dora", "alora_invocation_tokens")
    ]
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "eva"):
        asked.append(f"init_lora_weights={config.init_lora_weights!r}")
    if asked:
        raise ConfigError(
            f"{asked[0]} does not work on a quantized layer, which has no dense weight to take apart; use LoRA, "
            "rsLoRA, DoRA or aLoRA with init_lora_weights True, False, 'gaussian' or 'eva'"
        )


def _refuse_merge() -> None:
    raise ConfigError(
        "an adapter cannot be merged into quantized layers; load the adapter onto the dequantized model and merge it "
        "there: PeftModel.from_pretrained(base.dequantize(), adapter_folder).merge_and_unload()"
    )


PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModel
