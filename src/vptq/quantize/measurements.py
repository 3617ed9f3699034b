"""Measured sensitivities on disk, so that `vptq plan` and a later `vptq quantize --bits` measure once.

One small JSON file a measurement, named after a hash of everything the figures depend on, in `vptq/` under
$XDG_CACHE_HOME (~/.cache). Deleting them costs the time to measure again and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vptq.checkpoint import write_json
from vptq.errors import CheckpointError
from vptq.progress import ProgressCallback, ProgressEvent
from vptq.quantize.calibration import split_sources
from vptq.quantize.candidates import GAUSSIAN_LOSS
from vptq.quantize.job import Job
from vptq.quantize.sensitivity import (
    JUDGED_TOKENS,
    QUICK,
    SEQLEN,
    TOKENS_PER_INPUT,
    Sensitivity,
    measure,
)
from vptq.quantize.skeleton import Skeleton
from vptq.source import stamp

VERSION = 3
"""To be raised with every change of what is measured or how."""


def sensitivities(job: Job, skeleton: Skeleton, progress: ProgressCallback) -> list[Sensitivity]:
    """What `sensitivity.measure` gives, taken from the cache where it is there; a model in memory is always measured.

    Raises:
        CalibrationError: As `measure`.
    """
    path = cache_path(job)
    if path is not None and (known := _read(path)) is not None:
        progress(ProgressEvent("measuring layers", 1, 1, f"sensitivities measured before: {path}"))
        return known
    measured = measure(job, skeleton, progress)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"layers": [asdict(sensitivity) for sensitivity in measured]})
        except (OSError, CheckpointError) as error:  # the figures are in hand; only the next run has to measure again
            progress(ProgressEvent("measuring layers", 1, 1, f"sensitivities are not kept: {error}"))
    return measured


def cache_path(job: Job) -> Path | None:
    """Where the sensitivities of a job are kept; None for a model in memory, which has no name to find it by."""
    if job.original.source is None:
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vptq"
    key = json.dumps(_identity(job), sort_keys=True)
    return folder / f"sensitivity-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _identity(job: Job) -> dict[str, Any]:
    assert job.original.source is not None
    settings = job.settings()
    kept = ("model", "model_config", "sequences", "seqlen", "seed", "device", "dtype", "rotate", "lm_head")
    return {
        **{name: settings[name] for name in kept},
        "version": VERSION,
        "solver": asdict(QUICK),
        "tokens": [SEQLEN, JUDGED_TOKENS, TOKENS_PER_INPUT],
        "candidates": list(GAUSSIAN_LOSS),  # one of them is what a layer is measured with
        "files": job.original.source.weight_stamps(),
        "commit": getattr(job.original.config, "_commit_hash", None),
        "calibration": [stamp(Path(s)) if Path(s).is_file() else s for s in split_sources(job.calibration)],
        "norm": job.spec.enable_norm,
        "perm": job.spec.enable_perm,
    }


def _read(path: Path) -> list[Sensitivity] | None:
    """The measurement in a file; None where there is none, or one that was damaged: it is measured again."""
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return [Sensitivity(tuple(layer["layers"]), layer["spec"], layer["divergence"]) for layer in layers]
    except (OSError, KeyError, TypeError, ValueError):
        return None
