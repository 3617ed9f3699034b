"""Quantizing the output head, the one large layer behind the decoder blocks, where it is asked for.

Its inputs are the last hidden states behind the final norm, of the model or models that `--hessian-inputs` names, as
for any other layer. A head that is the embedding under a second name is refused: the embedding would have to stay
as it is, and the quantized head would come on top.
"""

from __future__ import annotations

import itertools

import torch

from vptq.errors import CalibrationError, ConfigError
from vptq.quantize.activations import Activations
from vptq.quantize.hessian import HessianAccumulator, Moments, PairedAccumulator
from vptq.quantize.job import Job
from vptq.quantize.layers import SolvedLayer, solve_layer
from vptq.quantize.paired import PairedActivations
from vptq.quantize.skeleton import Skeleton, head_of
from vptq.spec import QuantSpec
from vptq.transformers_versions import tied_weights


def check_head(job: Job) -> None:
    """Refuses a head that cannot be quantized; no weight is read. The job takes note of the head's spec.

    Raises:
        ConfigError: the model has none, or shares it with the embedding.
    """
    if job.lm_head is None:
        return
    model = job.empty_model()
    path, head = head_of(model)
    tied = tied_weights(model)
    names = {f"{path}.weight"} & {*tied, *tied.values()}
    if names:
        planned = [candidate.config for candidate in job.candidates(head)]
        choices = [job.fit(job.lm_head, head)] if isinstance(job.lm_head, QuantSpec) else planned
        added, kept = min(config.stored_bits for config in choices) // 8, head.weight.numel() * job.dtype.itemsize
        raise ConfigError(
            f"--lm-head: {path} shares its weight with the embedding, {kept:,} bytes that stay; a quantized head would "
            f"add {added:,} bytes and save none; leave --lm-head out, or give --rotate, which takes the two apart"
        )
    if isinstance(job.lm_head, QuantSpec):
        job.planned = {path: job.lm_head}


def check_runs(skeleton: Skeleton, dtype: torch.dtype) -> None:
    """Raises ConfigError where the model does not say what its last hidden states are; takes two tokens."""
    states = list(skeleton.embed([torch.zeros(1, 2, dtype=torch.int64)], dtype))
    for _ in skeleton.last_states(states, dtype):
        pass


def solve_head(
    job: Job, skeleton: Skeleton, activations: Activations | None, pairs: PairedActivations | None
) -> dict[str, SolvedLayer]:
    """Quantizes the head.

    Args:
        job: the request.
        skeleton: the model.
        activations: the hidden states that leave the last block; not asked where there are pairs.
        pairs: those of both models, where both count.

    Returns:
        By module path.
    """
    path, head = head_of(skeleton.model)
    try:
        moments = _moments(job, skeleton, activations, pairs, head.in_features)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error
    # As the files have it, in 16 bits: in float32 on top of the solver's own it would be the largest tensor around.
    weight = skeleton.files.load(f"{path}.weight")
    bias = None if head.bias is None else skeleton.files.load(f"{path}.bias").to(job.device)
    return {path: solve_layer(job, path, weight, bias, moments, job.layer_config(path, head))}


def _moments(
    job: Job, skeleton: Skeleton, activations: Activations | None, pairs: PairedActivations | None, features: int
) -> Moments:
    dtype, damping = job.compute_dtype, job.solver.damping
    alone = activations if pairs is None else pairs.original
    assert alone is not None
    seen = HessianAccumulator(features, job.device)
    for states in skeleton.last_states(alone.batches, dtype):
        seen.add(states)
    if pairs is None:
        return seen.moments(damping)
    paired = PairedAccumulator(seen)
    last = skeleton.last_states(itertools.chain.from_iterable(pairs.states()), dtype)
    for x, y in zip(last, last, strict=True):  # one after the other from the same iterator
        paired.add(x, y)
    return paired.moments(damping)
