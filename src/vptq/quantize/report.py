"""What a quantization run says when it is done: the whole outcome as plain data.

It is saved as report.json (for programs, resume and model cards), as report.png (for eyes: a layer that went wrong
stands out of its kind's curve at once) and as report.html (the same with tables, in any browser).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vptq.errors import CheckpointError

if TYPE_CHECKING:
    from vptq.index_use import CodebookUse

JSON_NAME = "report.json"
PLOT_NAME = "report.png"
PAGE_NAME = "report.html"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    Attributes:
        name: Module path.
        entry: Its entry in `quantization_config` (SPEC section 1), in_features and out_features included.
        bits_per_weight: Every stored bit of it, bias excepted, over its weights.
        losses: Proxy loss tr(E H E^T) / tr(W H W^T) after each stage, in the order the stages ran.
        seconds: Time spent on it.
        damping: Share of the mean Hessian diagonal that was added to make it factor.
    """

    name: str
    entry: Mapping[str, Any]
    bits_per_weight: float
    losses: dict[str, float]
    seconds: float
    damping: float

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features] of its weight."""
        return int(self.entry["out_features"]), int(self.entry["in_features"])

    @property
    def loss(self) -> float:
        """Proxy loss after the last stage; NaN when none was recorded."""
        return next(reversed(self.losses.values()), math.nan)


def is_drawable(loss: float) -> bool:
    """Whether a loss has a place on a logarithmic scale."""
    return math.isfinite(loss) and loss > 0


@dataclass
class Report:
    """What became of a model.

    Attributes:
        model: Name of the original.
        spec: Name of the spec; of a plan such as "90 x v8-k256-256, 60 x v4-k64-64".
        bits_per_weight: Every stored bit of the quantized layers, codebooks and scales included, over their weights.
        layers: One report per quantized layer, in the model's order.
        seconds: Wall-clock time of the run.
        peak_memory_bytes: Most memory the process held.
        calibration: Phrase that describes the calibration sequences.
        seed: Of everything random.
        quantized_weights: Weights in quantized layers.
        total_weights: Parameters of the whole model, tied ones counted once.
        skipped: Parameters left as they were, or only rotated, path -> why.
        warnings: Lines worth reading.
        hessian_inputs: Whose activations the Hessians are of: "both", "quantized" or "original"; empty where they came
            from files, and in reports from before this was noted.
        hessian: How errors were weighed: "plain", "rows" or "fisher"; empty as above.
        block_finetuning: Relative error of every block's output on held-out text, before and after it was trained.
        finetuning: What end-to-end finetuning did (`finetune.FinetuneReport` as plain data); empty without it.
        rotated: Whether rotations were folded into the weights before.
        budget: What each layer's spec was chosen for, such as "2.25 bits"; empty where all have the same.
        lm_head: Name of the output head's spec; empty where the head stayed as it was.
        command: The command lines that repeat it; empty for a model in memory, and where this was not noted yet.
        stage_seconds: Time of each stage of the run, in their order; of a resumed run since it went on.
    """

    model: str
    spec: str
    bits_per_weight: float
    layers: list[LayerReport]
    seconds: float
    peak_memory_bytes: int
    calibration: str
    seed: int
    quantized_weights: int
    total_weights: int
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    hessian_inputs: str = ""
    hessian: str = ""
    block_finetuning: list[tuple[float, float]] = field(default_factory=list)
    finetuning: dict[str, Any] = field(default_factory=dict)
    rotated: bool = False
    budget: str = ""
    lm_head: str = ""
    command: str = ""
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def mean_loss(self) -> float:
        """Mean over the layers of the proxy loss after the last stage; NaN without layers."""
        return _mean([layer.loss for layer in self.layers])

    @property
    def mean_losses(self) -> dict[str, float]:
        """Mean proxy loss after each stage, over the layers that went through it; in the order they run."""
        stages: dict[str, list[float]] = {}
        # A layer without residual leaves stages out: only one with all of them knows where those belong.
        for layer in sorted(self.layers, key=lambda layer: -len(layer.losses)):
            for stage, loss in layer.losses.items():
                stages.setdefault(stage, []).append(loss)
        return {stage: _mean(losses) for stage, losses in stages.items()}

    def to_json(self) -> str:
        """This report as JSON text; `from_json` gives an equal one."""
        return json.dumps({"version": FORMAT_VERSION, "mean_loss": self.mean_loss, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read a report back.

        Raises:
            CheckpointError: The text is no report of this version.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
            if version != FORMAT_VERSION:
                raise CheckpointError(f"report version is {version}; this vptq reads {FORMAT_VERSION}")
            data.pop("mean_loss")  # derived; it is in the file for readers without this class
            layers = [LayerReport(**layer) for layer in data.pop("layers")]
            return cls(layers=layers, **data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a quantization report: {error}") from error


def save_report(report: Report, folder: Path, uses: Iterable[CodebookUse] = ()) -> None:
    """Write report.json, report.html and, where matplotlib is installed, report.png.

    Args:
        report: What to write.
        folder: An existing folder.
        uses: How often its centroids are used, for the page.

    Raises:
        CheckpointError: The folder cannot be written to.
    """
    from vptq.quantize.page import report_page

    try:
        _write_then_rename(folder / JSON_NAME, report.to_json().encode())
        _write_then_rename(folder / PAGE_NAME, report_page(report, uses).encode())
        plot = _plot(report)
        if plot is not None:
            _write_then_rename(folder / PLOT_NAME, plot)
    except OSError as error:
        raise CheckpointError(f"cannot write the report to {folder}: {error.strerror}") from error


def load_report(folder: Path) -> Report | None:
    """Read the report of a quantized folder; None when it has none.

    Raises:
        CheckpointError: It is there, but is no report of this version.
    """
    path = folder / JSON_NAME
    return Report.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def _plot(report: Report) -> bytes | None:
    try:
        from vptq.quantize.plot import draw_report
    except ImportError:
        return None
    return draw_report(report)


def _write_then_rename(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
