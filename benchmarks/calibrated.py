"""What the benchmarks share: an original model on a text, block by block, through the quantizer's own parts.

`vptq quantize` makes its Hessians this way, so that what is timed and what is stored here is what it works with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vptq.quantize.activations import Activations, InputGroup
from vptq.quantize.hessian import HessianAccumulator
from vptq.quantize.job import Job
from vptq.quantize.setup import prepare
from vptq.quantize.skeleton import Skeleton

Moments = list[tuple[InputGroup, HessianAccumulator]]
"""The layers of one block that share an input, with the second moment of it."""


@dataclass
class Calibrated:
    """An original model and the hidden states of a text at the input of block `position`."""

    job: Job
    skeleton: Skeleton
    activations: Activations
    position: int = 0

    def moments(self, index: int) -> Moments:
        """Runs the text on to block `index` and through it; the block's weights, and no other's, stay loaded."""
        for skipped in range(self.position, index):
            self._load(skipped)
            self.activations.run_block(skipped, advance=True)
        self._load(index)
        self.position = index + 1
        groups = self.activations.input_groups(index)
        return list(zip(groups, self.activations.hessians(index, groups, advance=True), strict=True))

    def _load(self, index: int) -> None:
        if index:
            self.skeleton.unload_block(index - 1)
        self.skeleton.load_block(index, self.job.compute_dtype)


@contextmanager
def calibrated(model: str, text: Path, sequences: int, seqlen: int, spec: str = "v4-k256") -> Iterator[Calibrated]:
    """Opens a model and brings a text to its first block; what that takes on the disk is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="vptq-bench-") as scratch:
        job = prepare(
            model, Path(scratch, "output"), spec, calibration=str(text), sequences=sequences, seqlen=seqlen,
            device="cpu", hessian_inputs="original",
        )  # fmt: skip
        skeleton = job.open_skeleton()
        tokens, facts = job.calibration_tokens(lambda event: None)
        print(
            f"{job.original.name}: {facts['description']}" + (f" ({facts['warning']})" if facts["warning"] else ""),
            flush=True,
        )
        yield Calibrated(job, skeleton, Activations(skeleton, tokens, job.compute_dtype))
