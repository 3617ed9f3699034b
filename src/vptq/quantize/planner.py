"""From a budget to a plan: check what is in reach, measure every layer or find that it was measured, choose.

plan = vptq.plan("HuggingFaceTB/SmolLM2-135M-Instruct", bits=2.25)
print(plan.summary, plan.divergence, plan.file_bytes)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from vptq.errors import ConfigError
from vptq.progress import ProgressCallback, ignore
from vptq.quantize.budget import Budget
from vptq.quantize.job import Job
from vptq.quantize.lm_head import check_head
from vptq.quantize.measurements import sensitivities
from vptq.quantize.plan import Choices, Plan
from vptq.quantize.setup import prepare
from vptq.quantize.skeleton import Skeleton


def plan(
    model: str | Path | nn.Module,
    *,
    bits: float | None = None,
    size: str | int | None = None,
    calibration: str | Path = "self",
    sequences: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    norm: bool | None = None,
    perm: bool | None = None,
    absorb_perm: bool = True,
    rotate: bool = False,
    lm_head: str | None = None,
    progress: ProgressCallback | None = None,
) -> Plan:
    """What `vptq.quantize` would do with the same arguments; nothing but the measurement is kept.

    Args:
        model: hub id, local folder, GGUF file, or a transformers model in memory.
        bits: stored bits per weight of the quantized layers, codebooks and scales included.
        size: instead of `bits`: bytes of all weight files, or text such as "1.2GiB".
        calibration: as for `vptq.quantize`; only a few sequences of it are used.
        sequences: as for `vptq.quantize`.
        seqlen: likewise.
        seed: likewise.
        device: likewise.
        dtype: likewise.
        norm: likewise.
        perm: likewise.
        absorb_perm: likewise.
        rotate: likewise; the rotated model is what is measured.
        lm_head: likewise; "auto" makes the output head one more layer to choose for.
        progress: told about every step.

    Returns:
        The plan, with the divergence to expect.

    Raises:
        VPTQError: one of its kinds; a budget out of reach is a ConfigError that says what is in reach.
    """
    budget = Budget.read(bits, size)
    if budget is None:
        raise ConfigError("a plan needs a budget: give --bits, such as 2.25, or --size, such as 1.2GiB")
    with tempfile.TemporaryDirectory(prefix="vptq-plan-") as folder:
        job = prepare(
            model, Path(folder, "model"), None, budget=budget, calibration=str(calibration), sequences=sequences,
            seqlen=seqlen, seed=seed, device=device, dtype=dtype, norm=norm, perm=perm, absorb_perm=absorb_perm,
            rotate=rotate, lm_head=lm_head,
        )  # fmt: skip
        check_head(job)
        check_budget(job)
        job.enter_workspace()
        tell = progress or ignore
        skeleton, _ = job.fold_rotations(job.open_skeleton(tell), tell)
        return _make(job, skeleton, tell)


def check_budget(job: Job) -> None:
    """Refuses a budget out of reach, before any weight is read or converted.

    Raises:
        ConfigError: With what is in reach.
    """
    if job.budget is not None:
        Choices.of(job, job.empty_model()).check(job.budget)


def follow_plan(job: Job, skeleton: Skeleton, progress: ProgressCallback) -> Plan | None:
    """Makes the plan of a job with a budget, or finds it in the work folder, and sets the job's specs by it."""
    if job.budget is None:
        return None
    made = Plan.from_dict(job.workspace.plan(lambda: _make(job, skeleton, progress).to_dict()))
    job.planned = made.specs(job.spec)
    return made


def _make(job: Job, skeleton: Skeleton, progress: ProgressCallback) -> Plan:
    assert job.budget is not None
    choices = Choices.of(job, skeleton.model)
    return choices.plan(job.budget, sensitivities(job, skeleton, progress), job.original.name)
