"""One quantization run as it was asked for, and the things it works on: model files, tokens, layer configs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.progress import ProgressCallback, ProgressEvent, ignore
from vptq.quantize.budget import Budget
from vptq.quantize.calibration import Calibration, load_calibration
from vptq.quantize.candidates import Candidate, candidates_for
from vptq.quantize.finetune import held_out_for
from vptq.quantize.folding import FoldedFiles, check_layout, check_same_function, folds_of
from vptq.quantize.hessian import find_hessian
from vptq.quantize.original import Original
from vptq.quantize.skeleton import Skeleton, head_of
from vptq.quantize.solver import SolverConfig
from vptq.quantize.training import TrainingConfig
from vptq.quantize.workers import Workers
from vptq.quantize.workspace import Workspace
from vptq.spec import QuantSpec
from vptq.transformers_versions import tied_weights


@dataclass
class Job:
    """A checked request: every field may be trusted.

    Attributes:
        dtype: what is stored.
        rotate: whether rotations are folded into the weights first.
        compute_dtype: what blocks run in: float32 on a CPU, the stored dtype on a GPU.
        spec: for every layer; with a budget only its norm and perm count.
        budget: what a plan chooses each layer's spec for, or None.
        lm_head: the output head's spec; "auto" where a plan chooses it; None leaves the head as it is.
        planned: specs by module path of layers that do not get `spec`: a plan's, and the head's.
    """

    original: Original
    output: Path
    spec: QuantSpec
    calibration: str
    sequences: int
    seqlen: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    hessian_dir: Path | None
    hessian_inputs: str
    hessian: str
    overwrite: bool
    resume: bool
    absorb_perm: bool
    finetune: str
    move_indices: float
    rotate: bool
    solver: SolverConfig
    training: TrainingConfig
    workspace: Workspace
    workers: Workers
    budget: Budget | None = None
    lm_head: QuantSpec | str | None = None
    planned: Mapping[str, QuantSpec] = field(default_factory=dict)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the blocks run in."""
        return self.original.compute_dtype

    @property
    def trains_end_to_end(self) -> bool:
        """Whether the whole model is finetuned at the end."""
        return self.finetune in ("e2e", "both")

    @property
    def trains_blocks(self) -> bool:
        """Whether every block is finetuned when it has been quantized."""
        return self.finetune in ("block", "both")

    @property
    def held_out(self) -> int:
        """Calibration sequences that only judge finetuning, beyond those that are asked for."""
        return held_out_for(self.sequences) if self.trains_end_to_end else 0

    def settings(self) -> dict[str, Any]:
        """Everything the bytes of the result depend on; for a plan its budget: the plan itself stays in the work folder
        and is not made again."""
        spec = dataclasses.asdict(self.spec)
        if self.budget is not None:
            spec = {name: spec[name] for name in ("enable_norm", "enable_perm")}
        return {
            "model": str(self.original.source or self.original.name),
            "model_config": hashlib.sha256(self.original.config.to_json_string().encode()).hexdigest()[:16],
            "spec": spec,
            "budget": None if self.budget is None else dataclasses.asdict(self.budget),
            "calibration": "hessian-dir" if self.hessian_dir else self.calibration,
            "sequences": self.sequences,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "hessian_dir": str(self.hessian_dir) if self.hessian_dir else None,
            "hessian_inputs": self.hessian_inputs,
            "hessian": self.hessian,
            "absorb_perm": self.absorb_perm,
            "finetune": self.finetune,
            "move_indices": self.move_indices,
            "rotate": self.rotate,
            "lm_head": dataclasses.asdict(self.lm_head) if isinstance(self.lm_head, QuantSpec) else self.lm_head,
            "solver": dataclasses.asdict(self.solver),
            "training": dataclasses.asdict(self.training) if self.finetune != "none" else None,
        }

    def enter_workspace(self) -> None:
        """Makes or enters the work folder, if its settings are these."""
        self.workspace.open(self.settings(), overwrite=self.overwrite, resume=self.resume)

    def leave_workspace(self) -> None:
        """Removes the work folder of a run that failed, unless it is an earlier run's."""
        if not self.workspace.resumed:
            self.workspace.remove()

    def empty_model(self) -> nn.Module:
        """The modules of the model that is quantized; rotations untie the embeddings."""
        if not self.rotate:
            return self.original.empty_model()
        config = copy.deepcopy(self.original.config)
        config.tie_word_embeddings = False
        return self.original.empty_model(config)

    def open_skeleton(self, progress: ProgressCallback = ignore) -> Skeleton:
        """The original, one block in memory at a time; one that cannot be rotated is refused before it is fetched."""
        if self.rotate:
            check_layout(self.original.empty_model())
        return self.original.open_skeleton(progress)

    def fold_rotations(self, original: Skeleton, progress: ProgressCallback) -> tuple[Skeleton, list[str]]:
        """The model to quantize and what to warn of: with rotations folded into its weights, proved to compute the
        same, where they are wanted."""
        if not self.rotate:
            return original, []
        empty, tied = self.empty_model(), tied_weights(original.model)
        files = FoldedFiles(original.files, folds_of(empty, self.seed), tied)
        folded = Skeleton(empty, files, self.device)
        check_same_function(original, folded, self.seed, progress)
        sizes = {name: empty.get_parameter(name).numel() * self.dtype.itemsize for name in tied}
        return folded, [
            f"--rotate: {name} was tied to {tied[name]} and is now stored by itself, {size:,} bytes"
            for name, size in sizes.items()
        ]

    def calibration_tokens(self, progress: ProgressCallback) -> tuple[Tensor, dict[str, Any]]:
        """The sequences [n, seqlen] and what the report says about them."""

        def make() -> tuple[Tensor, dict[str, Any]]:
            made = self.sample(self.sequences + self.held_out, self.seqlen, progress)
            return made.tokens, {"description": made.description, "warning": made.warning}

        return self.workspace.tokens(make)

    def sample(self, sequences: int, seqlen: int, progress: ProgressCallback) -> Calibration:
        """As many tokens of the calibration text as asked for, from its beginning."""
        return load_calibration(
            self.calibration,
            self.original.tokenizer(),
            sequences,
            seqlen,
            self.seed,
            self.original.whole_model,
            progress,
        )

    def candidates(self, linear: nn.Linear) -> list[Candidate]:
        """What a plan may choose from for one layer."""
        return candidates_for(
            linear.in_features,
            linear.out_features,
            norm=self.spec.enable_norm,
            perm=self.spec.enable_perm,
            perm_is_stored=not self.absorb_perm,
        )

    def spec_of(self, name: str) -> QuantSpec:
        """The spec of the layer at path `name`."""
        return self.planned.get(name, self.spec)

    def seed_of(self, name: str) -> int:
        """What is random about the layer at path `name`, whichever layers come before it and wherever it is solved."""
        return zlib.crc32(f"{self.seed}/{name}".encode())

    def layer_config(self, name: str, linear: nn.Linear) -> LayerConfig:
        """What its spec makes of the layer at path `name`."""
        return self.fit(self.spec_of(name), linear)

    def fit(self, spec: QuantSpec, linear: nn.Linear) -> LayerConfig:
        """A spec applied to one layer; a codebook larger than the layer's vectors is clamped."""
        config = spec.for_layer(linear.in_features, linear.out_features, linear.bias is not None)
        vectors = config.num_vectors * config.group_size
        return dataclasses.replace(
            config,
            num_centroids=_at_most(config.num_centroids, vectors),
            num_residual_centroids=config.num_residual_centroids and _at_most(config.num_residual_centroids, vectors),
            outlier_num_centroids=config.outlier_num_centroids
            and _at_most(config.outlier_num_centroids, config.num_outlier_vectors * config.outlier_size),
        )

    def parts(self, skeleton: Skeleton) -> range:
        """Numbers of what is solved and stored one after the other: the blocks, then the head if it is quantized."""
        return range(len(skeleton.blocks) + (self.lm_head is not None))

    def check_weights(self, original: Skeleton, progress: ProgressCallback) -> None:
        """Reads every weight once, and raises ConfigError where one holds NaN or infinity."""
        parts = [
            [f"{original.blocks_name}.{i}.{path}" for path in original.linears(i)] for i in range(len(original.blocks))
        ]
        parts += [[head_of(original.model)[0]]] if self.lm_head is not None else []
        tied = tied_weights(original.model)
        for number, paths in enumerate(parts):
            progress(ProgressEvent("checking weights", number, len(parts)))
            for name in (f"{path}.weight" for path in paths):
                if not bool(torch.isfinite(original.files.load(tied.get(name, name))).all()):
                    raise ConfigError(f"{name} holds NaN or infinity: the model file is damaged")

    def check_specs(self, skeleton: Skeleton) -> list[str]:
        """Checks every layer's spec, and that no Hessian file is missing; no weight is read.

        Returns:
            A warning for each kind of layer whose codebook had to be clamped.

        Raises:
            ConfigError: the spec fits no layer.
            CalibrationError: a Hessian file is missing.
        """
        clamped: dict[tuple[str, str], str] = {}
        kept = 0
        for index in range(len(skeleton.blocks)):
            for path, linear in skeleton.linears(index).items():
                name = f"{skeleton.blocks_name}.{index}.{path}"
                config, lines = self._checked(name, path, linear)
                kept += config.num_centroids == self.spec_of(name).num_centroids
                clamped |= lines
                if self.hessian_dir is not None:
                    find_hessian(self.hessian_dir, index, [path.rpartition(".")[2]])
        if not kept:
            raise ConfigError(
                f"spec {self.spec.name} has {self.spec.num_centroids} centroids, more than any layer of this model has"
                " vectors; choose a smaller codebook or a shorter vector"
            )
        if self.lm_head is not None:
            path, head = head_of(skeleton.model)
            clamped |= self._checked(path, path, head)[1]
        return [f"{warning}, one for each vector at most" for warning in clamped.values()]

    def _checked(self, name: str, path: str, linear: nn.Linear) -> tuple[LayerConfig, dict[tuple[str, str], str]]:
        """What its spec makes of the layer, and a warning for each codebook that is clamped, by path and codebook."""
        try:
            config = self.layer_config(name, linear)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        return config, {(path, kind): line for kind, line in _clamped(path, self.spec_of(name), config).items()}


def _at_most(centroids: int, vectors: int) -> int:
    """The largest power of two that is neither above `centroids` nor above `vectors`, and at least 2."""
    return centroids if centroids <= vectors else max(2, 1 << (vectors.bit_length() - 1))


def _clamped(path: str, spec: QuantSpec, config: LayerConfig) -> dict[str, str]:
    """Codebook -> a warning, for those of a layer that are smaller than the spec's."""
    sizes = {
        "codebook": (spec.num_centroids, config.num_centroids),
        "residual codebook": (spec.num_residual_centroids, config.num_residual_centroids),
        "outlier codebook": (spec.outlier_num_centroids, config.outlier_num_centroids),
    }
    layer = f"{path} ({config.out_features} x {config.in_features})"
    return {
        kind: f"{layer}: {kind} clamped to {got} centroids" for kind, (wanted, got) in sizes.items() if 0 < got < wanted
    }
