"""The command lines that repeat a run: what a model card gives to readers who want the same model, or one like it.

Files are named without the folders they were in, which are nobody else's.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from vptq.quantize.calibration import source_name, split_sources
from vptq.quantize.job import Job
from vptq.source import ModelSource

# What the commands do without being told; only what differs is said.
DEFAULTS = {
    "--calibration": "self",
    "--sequences": "128",
    "--seqlen": "2048",
    "--seed": "0",
    "--hessian": "plain",
    "--hessian-inputs": "both",
    "--finetune": "none",
    "--move-indices": "0",
}


def quantize_command(job: Job) -> str:
    """`vptq quantize` with the options of a job; empty for a model in memory, which has no name to give."""
    if job.original.source is None:
        return ""
    options = {
        **_target(job),
        **text_options(job.calibration, job.sequences, job.seqlen, job.seed),
        "--dtype": str(job.dtype).removeprefix("torch."),
        "--hessian": job.hessian,
        "--hessian-inputs": job.hessian_inputs,
        "--finetune": job.finetune,
        "--move-indices": f"{job.move_indices:g}",
        **({} if job.lm_head is None else {"--lm-head": getattr(job.lm_head, "name", job.lm_head)}),
        **({} if job.hessian_dir is None else {"--hessian-dir": job.hessian_dir.name}),
    }
    switches = {
        "--rotate": job.rotate,
        "--no-norm": not job.spec.enable_norm,
        "--no-perm": not job.spec.enable_perm,
        "--no-absorb-perm": not job.absorb_perm,
    }
    line = _line(["quantize", job.original.source.name, "-o", "DIR"], options)
    return " ".join([line, *(switch for switch, on in switches.items() if on)])


def finetune_command(source: ModelSource, text: Mapping[str, str], move_indices: float) -> str:
    """`vptq finetune` of the folder that `quantize_command` makes; `text` is what `text_options` gave."""
    return _line(["finetune", "DIR", source.name, "-o", "OUT"], {**text, "--move-indices": f"{move_indices:g}"})


def text_options(calibration: str, sequences: int, seqlen: int, seed: int) -> dict[str, str]:
    """Options that say which calibration text it was."""
    return {
        "--calibration": ",".join(source_name(source) for source in split_sources(calibration)),
        "--sequences": str(sequences),
        "--seqlen": str(seqlen),
        "--seed": str(seed),
    }


def _target(job: Job) -> dict[str, str]:
    if job.budget is None:
        return {"--spec": job.spec.name}
    return {"--bits": f"{job.budget.bits:g}"} if job.budget.bits is not None else {"--size": f"{job.budget.size}B"}


def _line(words: list[str], options: Mapping[str, str]) -> str:
    given = [word for option, value in options.items() if DEFAULTS.get(option) != value for word in (option, value)]
    return shlex.join(["vptq", *words, *given])
