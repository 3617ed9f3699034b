"""What an interrupted run leaves behind, and how it goes on from there.

    DIR.work/settings.json        everything the result depends on; a resumed run must have the same
    DIR.work/plan.json            each layer's spec, where a budget chose them
    DIR.work/tokens/              the calibration sequences
    DIR.work/original/            the original weights, if they had to be converted
    DIR.work/blocks/0007/         a finished decoder block: its quantized tensors and layers.json; a quantized output
                                  head is one more

Every folder appears complete, by a rename, or not at all. Hidden states are not kept: they take minutes of disk for
seconds of computing, and the finished blocks give them back bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vptq.checkpoint import save_tensors, staged_folder, write_json
from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.quantize.block_tuning import TunedBlock
from vptq.quantize.fisher import LossWeights
from vptq.quantize.report import LayerReport
from vptq.quantize.weights import WeightFiles
from vptq.weight import QuantizedWeight


class Workspace:
    """The work folder of one run, beside its output folder.

    Attributes:
        folder: where it is.
        resumed: whether `open` entered a folder that an earlier run had made.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f"{output.name}.work")
        self.resumed = False

    def open(self, settings: Mapping[str, Any], *, overwrite: bool, resume: bool) -> None:
        """Makes the folder, or enters the one that is there.

        Raises:
            ConfigError: a work folder is there and neither `overwrite` nor `resume` is on, or its settings differ.
        """
        if overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not self.exists:
            shutil.rmtree(self.folder, ignore_errors=True)
            with staged_folder(self.folder) as staging:
                write_json(staging / "settings.json", settings)
            return
        if not resume:
            raise ConfigError(
                f"{self.folder} holds an interrupted run; go on with --resume or start over with --overwrite"
            )
        self.check(settings)
        self.resumed = True

    @property
    def exists(self) -> bool:
        """Whether there is an interrupted run."""
        return (self.folder / "settings.json").is_file()

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raises ConfigError with the difference when the interrupted run had other settings."""
        stored = json.loads((self.folder / "settings.json").read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(settings))
        names = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
        if names:
            changes = ", ".join(f"{name} was {stored.get(name)} and is now {wanted.get(name)}" for name in names)
            raise ConfigError(f"--resume: the interrupted run had other settings: {changes}")

    def plan(self, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The plan as plain data, made by `make` the first time: the blocks of an interrupted run follow it."""
        path = self.folder / "plan.json"
        if not path.is_file():
            write_json(path, make())
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored

    def tokens(self, make: Callable[[], tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, dict[str, Any]]:
        """The calibration sequences and what is known about them, made by `make` the first time."""
        folder = self.folder / "tokens"
        if not folder.is_dir():
            tokens, facts = make()
            with staged_folder(folder) as staging:
                save_tensors(staging, [("tokens", tokens)])
                write_json(staging / "facts.json", facts)
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        return WeightFiles(folder).load("tokens"), facts

    def loss_weights(self, make: Callable[[], LossWeights]) -> LossWeights:
        """What rows and tokens count to each layer, made by `make` the first time."""
        folder = self.folder / "loss_weights"
        if not folder.is_dir():
            made = make()
            with staged_folder(folder) as staging:
                kinds = (("rows", made.rows), ("tokens", made.tokens))
                save_tensors(staging, [(f"{kind}.{path}", tensor) for kind, by in kinds for path, tensor in by.items()])
        files, found = WeightFiles(folder), LossWeights()
        for name in files:
            kind, _, path = name.partition(".")
            (found.rows if kind == "rows" else found.tokens)[path] = files.load(name)
        return found

    def save_block(
        self,
        index: int,
        layers: Mapping[str, tuple[LayerReport, Mapping[str, Tensor]]],
        tuned: TunedBlock | None = None,
    ) -> None:
        """Stores a finished block: for each layer its report and its tensors by on-disk name, and what tuning did."""
        with staged_folder(self._block(index)) as staging:
            tensors = [
                (f"{name}.{key}", tensor) for name, (_, stored) in layers.items() for key, tensor in stored.items()
            ]
            save_tensors(staging, [*tensors, *(tuned.others.items() if tuned else ())])
            if tuned is not None:
                write_json(staging / "tuning.json", {"before": tuned.before, "after": tuned.after})
            write_json(staging / "layers.json", {name: asdict(report) for name, (report, _) in layers.items()})

    def has_block(self, index: int) -> bool:
        """Whether block `index` is finished."""
        return self._block(index).is_dir()

    def block_reports(self, index: int) -> list[LayerReport]:
        """The layer reports of a finished block."""
        stored = json.loads((self._block(index) / "layers.json").read_text(encoding="utf-8"))
        return [LayerReport(**report) for report in stored.values()]

    def block_tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Full names and tensors of a finished block."""
        files = WeightFiles(self._block(index))
        return ((name, files.load(name)) for name in files)

    def block_weights(self, index: int) -> Iterator[tuple[str, QuantizedWeight]]:
        """The quantized layers of a finished block by module path."""
        files = WeightFiles(self._block(index))
        for report in self.block_reports(index):
            prefix = f"{report.name}."
            config = LayerConfig.from_entry(report.entry, report.name)
            stored = {name.removeprefix(prefix): files.load(name) for name in files if name.startswith(prefix)}
            yield report.name, QuantizedWeight.from_tensors(config, stored, report.name)

    def block_errors(self, index: int) -> tuple[float, float] | None:
        """Error of a finished block's output before and after it was trained; None where it was not."""
        path = self._block(index) / "tuning.json"
        errors = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return None if errors is None else (errors["before"], errors["after"])

    def block_others(self, index: int) -> dict[str, Tensor]:
        """Trained tensors of a finished block outside its quantized layers, by full name."""
        files, layers = WeightFiles(self._block(index)), tuple(f"{r.name}." for r in self.block_reports(index))
        return {name: files.load(name) for name in files if not name.startswith(layers)}

    def remove(self) -> None:
        """Deletes the work folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _block(self, index: int) -> Path:
        return self.folder / "blocks" / f"{index:04}"
