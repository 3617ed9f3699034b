"""The folder a run ends with: shards, config.json, tokenizer, generation config, report, picture and model card."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vptq.checkpoint import Checkpoint, save_tensors, staged_folder
from vptq.config import LayerConfig, QuantConfig
from vptq.index_use import codebook_uses
from vptq.quantize.card import save_card
from vptq.quantize.job import Job
from vptq.quantize.report import Report, save_report
from vptq.quantize.skeleton import Skeleton
from vptq.transformers_versions import tied_weights


def write_output(
    job: Job,
    output: Path,
    skeleton: Skeleton,
    layers: Mapping[str, LayerConfig],
    report: Report,
    trained: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes everything under a temporary name and renames it at the end; `trained` tensors replace others.

    Raises:
        CheckpointError: the folder exists, or the disk is full.
    """
    config: Any = copy.deepcopy(skeleton.model.config)  # a model in memory shares its own with the skeleton
    config.architectures = config.architectures or [type(skeleton.model).__name__]
    config.dtype = job.dtype
    left = tuple(name for name, m in skeleton.model.named_modules() if isinstance(m, nn.Linear) and name not in layers)
    config.quantization_config = QuantConfig(layers, modules_to_not_convert=left).to_dict()
    with staged_folder(output, job.overwrite) as staging:
        stored = _tensors(skeleton, job, layers)
        save_tensors(staging, ((name, (trained or {}).get(name, tensor)) for name, tensor in stored))
        config.save_pretrained(staging)
        for extra in (job.original.tokenizer(), job.original.generation_config()):
            if extra is not None:
                extra.save_pretrained(staging)
        save_report(report, staging, codebook_uses(Checkpoint.open(staging)))
        save_card(report, staging, job.original.base_model)


def unquantized(skeleton: Skeleton, layers: Mapping[str, LayerConfig]) -> dict[str, str]:
    """Every parameter left as it was, with the reason; tied ones are listed under the name they are stored by."""
    embeddings = {id(module) for module in skeleton.model.modules() if isinstance(module, nn.Embedding)}
    head = skeleton.model.get_output_embeddings()  # type: ignore[operator]
    tied = tied_weights(skeleton.model)
    reasons = {}
    for path, module in skeleton.model.named_modules():
        for leaf, _parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if path in layers or name in tied:
                continue
            if id(module) in embeddings:
                reasons[name] = "embedding"
            elif module is head:
                reasons[name] = "output head"
            elif isinstance(module, nn.Linear):
                reasons[name] = "linear layer outside the decoder blocks"
            else:
                reasons[name] = f"not a linear layer ({type(module).__name__})"
    return reasons


def _tensors(skeleton: Skeleton, job: Job, layers: Mapping[str, LayerConfig]) -> Iterator[tuple[str, Tensor]]:
    """Original tensors in the order of their files, then the quantized ones block by block, the head's at the end."""
    workspace, parts = job.workspace, job.parts(skeleton)
    known = set(skeleton.model.state_dict()) - tied_weights(skeleton.model).keys()
    replaced = {f"{name}.{leaf}" for name in layers for leaf in ("weight", "bias")}
    for index in parts:
        replaced |= workspace.block_others(index).keys()
    for name in skeleton.files:
        if name in known and name not in replaced:
            tensor = skeleton.files.load(name)
            yield name, tensor.to(job.dtype) if tensor.is_floating_point() else tensor
    for index in parts:
        yield from workspace.block_tensors(index)
