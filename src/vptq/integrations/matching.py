"""Which linear layers of a model a VPTQ checkpoint replaces, and where their tensors are stored.

A `quantization_config` names layers by the module paths of the model that was saved. The model being loaded may call
them otherwise: a bare decoder has no "model." in front, a text model taken out of a composite one loses more, and
transformers renames modules between versions. It has a mapping for that, which it applies to tensor names; the paths of
the config and of the file headers go through the same mapping here, so that all three meet under the names of the model
at hand. Everything is decided from the module tree, the config and the headers; no tensor data is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vptq.config import LayerConfig, QuantConfig
from vptq.errors import CheckpointError, ConfigError
from vptq.transformers_versions import renaming, tied_weights
from vptq.weight import check_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Headers = Mapping[str, Tensor]


@dataclass(frozen=True)
class LayerMatch:
    """One linear layer to replace.

    Attributes:
        path: Its module path in the model.
        stored_path: Its path in the checkpoint, for the re-saved config and for messages.
        config: How it is quantized.
        headers: Its stored tensors without their data, by name in the layer; empty when there are no files to look at.
    """

    path: str
    stored_path: str
    config: LayerConfig
    headers: Headers


def match_layers(
    model: PreTrainedModel, config: QuantConfig, headers: Headers | None, is_excluded: Callable[[str], bool]
) -> list[LayerMatch]:
    """Find the linear layers that the checkpoint holds quantized, and check them against what it stores.

    A layer is quantized when it has an entry of its own, or one shared by its last name; where the checkpoint stores a
    dense weight instead, a shared entry does not mean it, and an entry of its own yields to `is_excluded`.

    Args:
        model: The dense model, its tensors on the meta device.
        config: The checkpoint's `quantization_config`.
        headers: Every stored tensor, on the meta device; None when the files cannot be looked at (a state dict).
        is_excluded: Whether `modules_to_not_convert` covers a module path.

    Raises:
        ConfigError: An entry contradicts the model.
        CheckpointError: A stored tensor contradicts its entry.
    """
    modules = dict(model.named_modules())
    names = _ModelNames(model)
    stored = _group_by_module(headers or {})
    entries = {names.of_module(path): path for path in config.layers}
    files = {names.of_module(path): path for path, group in stored.items() if _WEIGHTS & group.keys()}
    _check_entries_have_a_place(modules, entries)

    matches = []
    for path, module in modules.items():
        stored_path = entries.get(path) or files.get(path) or path
        group = stored.get(files.get(path, stored_path), {})
        entry = config.layer_for(stored_path) if isinstance(module, nn.Linear) else None
        if headers is None:
            stays_dense = is_excluded(path)
        else:
            stays_dense = "weight" in group and (path not in entries or is_excluded(path))
        if entry is None or stays_dense:
            _check_dense(module, group, stored_path, names)
            continue
        layer = _fit_to_module(entry, module, stored_path)
        if headers is not None:
            check_stored(layer, group, stored_path)
        matches.append(LayerMatch(path, stored_path, layer, group))
    _check_not_tied(model, matches)
    return matches


# One of these is stored for every linear layer, dense or quantized.
_WEIGHTS = frozenset({"weight", "indices"})


def _group_by_module(headers: Headers) -> dict[str, dict[str, Tensor]]:
    """Stored tensors by the path of the layer they might belong to; codebooks lie one level below it."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, header in headers.items():
        path, _, leaf = name.rpartition(".")
        groups.setdefault(path, {})[leaf] = header
        parent, _, holder = path.rpartition(".")
        if holder.endswith("centroids"):
            groups.setdefault(parent, {})[f"{holder}.{leaf}"] = header
    return groups


class _ModelNames:
    """transformers' own renaming of checkpoint keys to the names of one model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._rename = renaming(model)
        self._parameters = model.state_dict()

    def of_module(self, stored_path: str) -> str:
        """The model's path of the linear layer that the checkpoint calls `stored_path`."""
        key = f"{stored_path}.weight"
        if key in self._parameters:
            return stored_path
        renamed, _ = self._rename(key)
        return renamed.removesuffix(".weight") if renamed in self._parameters else stored_path

    def are_converted(self, key: str) -> bool:
        """Whether transformers computes something from this tensor, so that its shape is not that of a parameter."""
        return self._rename(key)[1]


def _check_entries_have_a_place(modules: Mapping[str, nn.Module], entries: Mapping[str, str]) -> None:
    """Refuse an entry that names no linear layer, unless the model was made smaller on purpose.

    A list that is shorter, or a head that is not there, is what loading fewer layers or a bare decoder looks like. A
    hole inside a block means that this model computes that layer in some other way, and would run on random weights.
    """
    for path, stored_path in entries.items():
        module = modules.get(path)
        if isinstance(module, nn.Linear):
            continue
        if module is None:
            ancestor = path
            while ancestor not in modules:
                ancestor = ancestor.rpartition(".")[0]
            module = modules[ancestor]
            if ancestor == "" or isinstance(module, nn.ModuleList):
                continue
            found = f"nothing under that name; {ancestor} is a {type(module).__name__}"
        else:
            found = f"a {type(module).__name__}"
        raise ConfigError(
            f"config_for_layers[{stored_path!r}] quantizes a linear layer, but the model has {found} there; this "
            "checkpoint needs the model class and transformers version that it was made with"
        )


def _check_dense(module: nn.Module, group: Headers, where: str, names: _ModelNames) -> None:
    """Check what is stored for a module that stays as it is.

    For a quantized model transformers compares no shapes, and of a tensor without a place it only warns.
    """
    if "centroids.weight" in group:
        raise CheckpointError(f"{where} is stored quantized, but quantization_config has no entry for it")
    for name, declared in module.named_parameters(recurse=False):
        header = group.get(name)
        if header is None or names.are_converted(f"{where}.{name}"):
            continue
        if header.shape != declared.shape:
            raise CheckpointError(
                f"{where}.{name} has shape {tuple(header.shape)}; the model's is {tuple(declared.shape)}"
            )
        if header.is_floating_point() != declared.is_floating_point():
            raise CheckpointError(f"{where}.{name} is {header.dtype}; the model's is {declared.dtype}")


def _fit_to_module(config: LayerConfig, module: nn.Linear, where: str) -> LayerConfig:
    stated, actual = (config.out_features, config.in_features), (module.out_features, module.in_features)
    if stated != actual:
        raise ConfigError(f"{where}: its entry describes a weight of shape {stated}, the model's is {actual}")
    # Old entries leave the bias out; transformers has always asked the module. Float16 carriers end with loading.
    return dataclasses.replace(config, bias=config.bias or module.bias is not None, indices_as_float=False)


def _check_not_tied(model: PreTrainedModel, matches: Iterable[LayerMatch]) -> None:
    tied = tied_weights(model)
    names = {*tied, *tied.values()}
    for match in matches:
        if f"{match.path}.weight" in names:
            raise ConfigError(
                f"{match.stored_path} is quantized, but the model shares its weight with another module; set "
                "tie_word_embeddings to false in config.json if they are stored apart"
            )
