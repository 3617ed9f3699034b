"""The job `vptq quantize` does: original model in, folder in the published format out, one decoder block at a time.

All side effects live here and in the modules this one calls: files, hooks, progress, resume. The solver has none.

    check every setting -> calibration sequences -> for each block: Hessians, solve, store, run on -> finetune
    -> write the folder

The hidden states advance through the stored (rounded) weights, so that a resumed run sees what the first one saw.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vptq.config import LayerConfig
from vptq.errors import CalibrationError, ConfigError, VPTQError
from vptq.progress import ProgressCallback, ProgressEvent, StageTimes, ignore
from vptq.quantize.blocks import BlockSolver
from vptq.quantize.budget import Budget
from vptq.quantize.finetune import Finetuning
from vptq.quantize.fisher import LossWeights, loss_weights, row_tokens
from vptq.quantize.job import Job
from vptq.quantize.lm_head import check_head, check_runs, solve_head
from vptq.quantize.memory import keep_large_tensors_out_of_the_heap, peak_memory_bytes
from vptq.quantize.output import unquantized, write_output
from vptq.quantize.planner import check_budget, follow_plan
from vptq.quantize.recipe import quantize_command
from vptq.quantize.report import LayerReport, Report
from vptq.quantize.setup import prepare
from vptq.quantize.skeleton import Skeleton, head_of
from vptq.spec import QuantSpec
from vptq.transformers_versions import tied_weights


def quantize(
    model: str | Path | nn.Module,
    output_dir: str | Path,
    spec: str | QuantSpec | None = None,
    *,
    bits: float | None = None,
    size: str | int | None = None,
    calibration: str | Path = "self",
    sequences: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    hessian_dir: str | Path | None = None,
    hessian_inputs: str = "both",
    hessian: str = "plain",
    norm: bool | None = None,
    perm: bool | None = None,
    overwrite: bool = False,
    resume: bool = False,
    absorb_perm: bool = True,
    finetune: str = "none",
    move_indices: float = 0.0,
    rotate: bool = False,
    lm_head: str | QuantSpec | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: ProgressCallback | None = None,
) -> Report:
    """Quantizes a causal language model and writes it in the VPTQ checkpoint format.

    Args:
        model: hub id, local folder, GGUF file, or a transformers model in memory.
        output_dir: must not exist, unless `overwrite` or `resume`.
        spec: such as "v8-k65536-256", which it is where no budget is given.
        bits: instead of `spec`, a budget: stored bits per weight of the quantized layers, codebooks and scales
            included. Each layer gets the spec that measured sensitivities say (see `vptq.plan`).
        size: instead of `bits`, the same for the bytes of all weight files; or text such as "1.2GiB".
        calibration: "self" (the model writes its own text), a text file, "wikitext2", "c4" or a hub data set; or
            several in equal shares, such as "wikitext2,self".
        sequences: calibration sequences.
        seqlen: tokens a sequence.
        seed: of everything random; same seed and machine, same bytes.
        device: "auto" (CUDA when there is one), "cpu", "cuda:1", ...
        dtype: float16 or bfloat16 of what is stored; None takes the model's own, bfloat16 if that is wider.
        hessian_dir: read Hessians from QuIP#/VPTQ files instead of calibrating.
        hessian_inputs: "both", "quantized" or "original": whose activations the Hessians are made of. "both" gives the
            best model; "original" is the quickest: the quantized model never runs.
        hessian: "plain": all errors of a layer's outputs count alike; "rows": every output as much as the model's loss
            feels it, which takes a backward pass over some thousand tokens; "fisher": outputs and tokens, which takes
            one over all of the text.
        norm: column normalization; None is what the spec says.
        perm: column permutation; None is what the spec says.
        overwrite: replace an output folder that exists.
        resume: go on with an interrupted run.
        absorb_perm: fold the permutation into the indices where the format allows it.
        finetune: "none"; "block": train each block's codebooks, scales and norms when it has been quantized; "e2e":
            train those of the whole model at the end; or "both".
        move_indices: share of all vectors that may get other indices while the whole model is trained, such as 0.01; 0
            for none.
        rotate: fold random rotations into the weights first, which changes no output of the model and spreads its
            outliers; for Llama, Mistral, Qwen2, Qwen3 and models laid out like them.
        lm_head: spec of the output head, or "auto" with a budget; None leaves it as it is. One that is tied to the
            embedding is refused, unless `rotate` takes them apart.
        workers: processes that solve layers at once, 1 where nothing is said; on GPUs each takes one of its own, from
            `device` on. A script that gives more than 1 must run from under `if __name__ == "__main__":`, as the
            processes import it again.
        ray: solve layers on the nodes of a Ray cluster instead, `workers` of them at once: "auto" (RAY_ADDRESS, or the
            cluster that this machine is a node of), "HOST:PORT" of its head, or "local" to start one on this machine.
            Each layer gets a GPU, or with `device="cpu"` an equal part of the CPUs; without `workers` as many are
            solved at once as there are GPUs, or nodes.
        progress: told about every step.

    Returns:
        The report that is also stored as report.json.

    Raises:
        VPTQError: one of its kinds, with one line that says what to do. Nothing is written then, except that a run
        that fails
            after finishing a block keeps its work folder for `resume`.
    """
    started = time.monotonic()
    job = prepare(
        model, Path(output_dir), spec, calibration=str(calibration), sequences=sequences, seqlen=seqlen, seed=seed,
        device=device, dtype=dtype, hessian_dir=None if hessian_dir is None else Path(hessian_dir),
        hessian_inputs=hessian_inputs, hessian=hessian, norm=norm, perm=perm, overwrite=overwrite, resume=resume,
        absorb_perm=absorb_perm, finetune=finetune, move_indices=move_indices, rotate=rotate,
        budget=Budget.read(bits, size), lm_head=lm_head, workers=workers, ray=ray,
    )  # fmt: skip
    check_head(job)
    check_budget(job)
    keep_large_tensors_out_of_the_heap()
    with job.workers:  # first of all: a cluster that cannot be reached changes no folder
        report = _in_workspace(job, StageTimes(progress or ignore), started)
    job.workspace.remove()
    return report


def _in_workspace(job: Job, progress: StageTimes, started: float) -> Report:
    if job.workers.note:
        progress(ProgressEvent("starting", message=job.workers.note))
    job.enter_workspace()
    try:
        return _run(job, progress, started)
    except (CalibrationError, ConfigError):
        job.leave_workspace()  # the same input would fail again
        raise
    except VPTQError:
        if not job.workspace.has_block(0):
            job.leave_workspace()
        raise


def _run(job: Job, progress: StageTimes, started: float) -> Report:
    original = job.open_skeleton(progress)
    job.check_weights(original, progress)
    skeleton, warnings = job.fold_rotations(original, progress)
    plan = follow_plan(job, skeleton, progress)
    warnings += job.check_specs(skeleton)
    if job.lm_head is not None:
        check_runs(skeleton, job.compute_dtype)
    text = _calibration(job, progress, warnings)
    layers = _solve(job, skeleton, text, progress, warnings)
    configs = {layer.name: LayerConfig.from_entry(layer.entry, layer.name) for layer in layers}
    weights = sum(config.in_features * config.out_features for config in configs.values())
    tied = tied_weights(skeleton.model)
    report = Report(
        model=job.original.name,
        spec=job.spec.name if plan is None else plan.summary,
        bits_per_weight=sum(config.stored_bits for config in configs.values()) / weights,
        layers=layers,
        seconds=time.monotonic() - started,
        peak_memory_bytes=peak_memory_bytes(),
        calibration=text.description,
        seed=job.seed,
        quantized_weights=weights,
        total_weights=sum(p.numel() for name, p in skeleton.model.named_parameters() if name not in tied),
        skipped=unquantized(skeleton, configs),
        warnings=warnings,
        hessian_inputs=job.hessian_inputs if job.hessian_dir is None else "",
        hessian=job.hessian if job.hessian_dir is None else "",
        rotated=job.rotate,
        budget="" if plan is None else plan.budget,
        lm_head="" if job.lm_head is None else job.spec_of(head_of(skeleton.model)[0]).name,
        command=quantize_command(job),
    )
    errors = [job.workspace.block_errors(index) for index in range(len(skeleton.blocks))]
    report.block_finetuning = [pair for pair in errors if pair is not None]
    trained: dict[str, Tensor] | None = None
    if job.trains_end_to_end:
        untrained = job.workspace.folder / "quantized"
        if not untrained.is_dir():
            progress(ProgressEvent("writing the untrained model"))
            write_output(job, untrained, skeleton, configs, report)
        training = Finetuning(
            untrained, skeleton, text.tokens, text.held_out, job.workspace.folder, job.dtype, job.device, job.seed,
            job.training, progress, job.move_indices,
        )  # fmt: skip
        done, trained = training.run()
        report.finetuning = asdict(done)
    progress(ProgressEvent("writing the folder"))
    report.stage_seconds = dict(progress.seconds)
    report.seconds, report.peak_memory_bytes = time.monotonic() - started, peak_memory_bytes()
    write_output(job, job.output, skeleton, configs, report, trained)
    return report


@dataclass(frozen=True)
class _Text:
    """What a model is calibrated on: tokens [sequences, seqlen], of which the last `held_out` only judge."""

    tokens: Tensor
    held_out: int
    description: str


def _calibration(job: Job, progress: ProgressCallback, warnings: list[str]) -> _Text:
    """Raises CalibrationError where the text is too short to hold some of it out."""
    if job.hessian_dir is not None and not job.trains_end_to_end:
        return _Text(torch.empty(0, 0, dtype=torch.int64), 0, f"Hessian files of {job.hessian_dir.name}")
    tokens, facts = job.calibration_tokens(progress)
    warnings += [facts["warning"]] if facts["warning"] else []
    needed = 3 if job.move_indices else 2
    if job.trains_end_to_end and len(tokens) < needed:
        raise CalibrationError(
            f"--finetune {job.finetune} judges by text that it does not train on: it needs {needed} sequences, but "
            f"there are only {len(tokens)}; give a longer --calibration text, or a smaller --seqlen"
        )
    held_out = min(job.held_out, len(tokens) // 2)
    description = facts["description"] if job.hessian_dir is None else f"Hessian files of {job.hessian_dir.name}"
    return _Text(tokens, held_out, description)


def _solve(
    job: Job, skeleton: Skeleton, text: _Text, progress: ProgressCallback, warnings: list[str]
) -> list[LayerReport]:
    """Every block's layers, quantized and stored."""
    workspace, blocks, parts = job.workspace, range(len(skeleton.blocks)), job.parts(skeleton)
    if all(map(workspace.has_block, parts)):  # interrupted while finetuning: nothing to run the text through
        return [report for index in parts for report in workspace.block_reports(index)]
    tokens = None if job.hessian_dir is not None else text.tokens[: len(text.tokens) - text.held_out]
    weights = LossWeights()
    if tokens is not None and job.hessian != "plain":
        judged = tokens if job.hessian == "fisher" else row_tokens(tokens)
        weights = workspace.loss_weights(lambda: loss_weights(skeleton, judged, job.compute_dtype, progress))
    if job.hessian == "rows":
        weights.tokens.clear()  # of some of the text only
    solver = BlockSolver.start(job, skeleton, tokens, weights, progress, warnings)
    for index in blocks:
        solver.finish_block(index)
    if job.lm_head is not None:
        progress(ProgressEvent("quantizing the output head", 0, 1))
        for path, layer in solve_head(job, skeleton, solver.activations, solver.pairs).items():
            workspace.save_block(len(blocks), {path: (layer.report, layer.tensors)})
            warnings += layer.warnings
    return [report for index in parts for report in workspace.block_reports(index)]
