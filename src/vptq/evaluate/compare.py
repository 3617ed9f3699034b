"""What several quantized folders are known to be and to do, brought together from the files beside their weights.

Nothing is measured here: report.json is from quantizing, and eval.json and bench.json are where `vptq eval DIR --json
DIR/eval.json` and `vptq bench DIR --json DIR/bench.json` have put their figures. Perplexities compare on the same
windows of the same text only, and speeds on the same device with the same tokens and threads; what was measured
otherwise than in the first folder is left out and named, as is what was not measured at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from vptq.errors import CheckpointError, ConfigError

EVALUATION, BENCHMARK = "eval.json", "bench.json"
# What must agree before figures are comparable.
SAME_TEXT = ("text", "windows", "seqlen")
SAME_RUN = ("device", "threads", "prompt_tokens", "new_tokens")


@dataclass(frozen=True)
class Folder:
    """What is known about one quantized folder; None where something is not.

    Attributes:
        name: What to call it.
        spec: Its codebooks, as its report names them.
        bits: Stored bits per weight of the quantized layers.
        perplexity: Its own.
        reference_perplexity: The original's on the same text.
        kl_divergence: KL(original || model) per token, in nats.
        tokens_per_second: Of decoding.
        reference_tokens_per_second: The original's in the same run.
        missing: What is not known, and what would tell.
        measured_on: The text and its windows, and the run, that the figures are of.
    """

    name: str
    spec: str | None
    bits: float
    perplexity: float | None = None
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    tokens_per_second: float | None = None
    reference_tokens_per_second: float | None = None
    missing: tuple[str, ...] = ()
    measured_on: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def compare(folders: Sequence[str | Path]) -> list[Folder]:
    """Read what is known about some folders; the fewest bits come first.

    Raises:
        ConfigError: A folder does not exist, or nothing comparable is known about any.
        CheckpointError: A folder is no quantized model, or a file of figures is damaged.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    names = [path.resolve().name for path in paths]
    read = [
        _read_folder(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names, strict=True)
    ]
    for file, figures in (
        (EVALUATION, ("perplexity", "reference_perplexity", "kl_divergence")),
        (BENCHMARK, ("tokens_per_second", "reference_tokens_per_second")),
    ):
        read = _as_in_the_first(read, file, figures)
    if not any(folder.measured_on for folder in read):
        raise ConfigError(
            f"none of these folders has an {EVALUATION} or a {BENCHMARK}; measure them with "
            f"vptq eval DIR --reference MODEL --json DIR/{EVALUATION} and vptq bench DIR --json DIR/{BENCHMARK}"
        )
    return sorted(read, key=lambda folder: folder.bits)


def original_of(folders: Sequence[Folder]) -> tuple[float | None, float | None]:
    """Perplexity and tokens/s of the original, where the folders have the same one; None where that is not known.

    A perplexity is always the same for the same model. Its speed is not, and the median stands for it.
    """
    perplexities = [folder.reference_perplexity for folder in folders if folder.reference_perplexity is not None]
    speeds = [
        folder.reference_tokens_per_second for folder in folders if folder.reference_tokens_per_second is not None
    ]
    if perplexities and max(perplexities) > 1.01 * min(perplexities):
        return None, None
    return perplexities[0] if perplexities else None, median(speeds) if speeds else None


def _read_folder(path: Path, name: str) -> Folder:
    from vptq.quantize.report import load_report

    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}; give quantized folders")
    report = load_report(path)
    if report is not None:
        folder = Folder(name, report.spec, report.bits_per_weight)
    else:
        from vptq.checkpoint import Checkpoint  # and torch with it, which reports can do without

        layers = Checkpoint.open(path).layers().values()
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        if not weights:
            raise CheckpointError(f"{path} has no quantized layers")
        folder = Folder(name, None, sum(layer.stored_bits for layer in layers) / weights)
    folder = _with_evaluation(folder, path)
    return _with_benchmark(folder, path)


def _with_evaluation(folder: Folder, path: Path) -> Folder:
    data = _read(path / EVALUATION)
    command = f"vptq eval {path} --reference MODEL --json {path / EVALUATION}"
    if data is None or data.get("perplexity") is None:
        return _lacking(folder, f"no perplexity ({command})")
    if data.get("kl_divergence") is None:
        folder = _lacking(folder, f"no divergence ({command})")
    figures: dict[str, Any] = {
        name: _figure(data, name, path / EVALUATION)
        for name in ("perplexity", "reference_perplexity", "kl_divergence")
        if data.get(name) is not None
    }
    on = tuple(data.get(key) for key in SAME_TEXT)
    return replace(folder, **figures, measured_on={**folder.measured_on, EVALUATION: on})


def _with_benchmark(folder: Folder, path: Path) -> Folder:
    data = _read(path / BENCHMARK)
    if data is None:
        return _lacking(folder, f"no speed (vptq bench {path} --json {path / BENCHMARK})")
    figures: dict[str, Any] = {
        "tokens_per_second": _figure(data.get("model"), "decode_tokens_per_second", path / BENCHMARK)
    }
    if data.get("reference") is not None:
        speed = _figure(data["reference"], "decode_tokens_per_second", path / BENCHMARK)
        figures["reference_tokens_per_second"] = speed
    on = tuple(data.get(key) for key in SAME_RUN)
    return replace(folder, **figures, measured_on={**folder.measured_on, BENCHMARK: on})


def _as_in_the_first(folders: list[Folder], file: str, figures: tuple[str, ...]) -> list[Folder]:
    """The folders without figures that were measured otherwise than those of the first that has them."""
    first = next((folder for folder in folders if file in folder.measured_on), None)
    if first is None:
        return folders
    wanted = first.measured_on[file]
    kept = []
    for folder in folders:
        on = folder.measured_on.get(file, wanted)
        if on != wanted:
            rest = {key: value for key, value in folder.measured_on.items() if key != file}
            unknown: dict[str, Any] = dict.fromkeys(figures)
            folder = _lacking(
                replace(folder, **unknown, measured_on=rest),
                f"its {file} is of {_words(on)}, that of {first.name} of {_words(wanted)}",
            )
        kept.append(folder)
    return kept


def _words(values: tuple[Any, ...]) -> str:
    return " ".join(str(value) for value in values)


def _lacking(folder: Folder, what: str) -> Folder:
    return replace(folder, missing=(*folder.missing, what))


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); measure again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no figures; measure again")
    return data


def _figure(data: Any, name: str, path: Path) -> float:
    value = data.get(name) if isinstance(data, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{path} has no number for {name}; measure again")
    return float(value)
