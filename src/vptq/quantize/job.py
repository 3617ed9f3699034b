"""One quantization run as it was asked for, and the things it works on: model files, tokens, layer configs."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vptq.config import LayerConfig
from vptq.errors import CheckpointError, ConfigError, VPTQError
from vptq.quantize.calibration import load_calibration
from vptq.quantize.folding import FoldedFiles, check_layout, check_same_function, folds_of
from vptq.quantize.hessian import find_hessian
from vptq.quantize.report import ProgressCallback, ProgressEvent
from vptq.quantize.skeleton import Skeleton
from vptq.quantize.solver import SolverConfig
from vptq.quantize.training import TrainingConfig
from vptq.quantize.weights import WeightFiles, covers, spill, tied_weights
from vptq.quantize.workspace import Workspace
from vptq.source import ModelSource, load_model, load_tokenizer
from vptq.spec import QuantSpec


@dataclass
class Job:
    """A checked request: every field may be trusted.

    Attributes:
        source: where the original is, or None for a model in memory.
        memory_model: the model in memory, or None.
        dtype: what is stored.
        rotate: whether rotations are folded into the weights first.
        compute_dtype: what blocks run in: float32 on a CPU, the stored dtype on a GPU.
    """

    source: ModelSource | None
    memory_model: nn.Module | None
    model_config: Any
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
    rotate: bool
    solver: SolverConfig
    training: TrainingConfig
    workspace: Workspace

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the blocks run in."""
        return torch.float32 if self.device.type == "cpu" else self.dtype

    @property
    def name(self) -> str:
        """A short name for the report."""
        return self.source.name if self.source else type(self.memory_model).__name__

    @property
    def base_model(self) -> str | None:
        """The original's hub id, where it has one that a reader could follow."""
        return None if self.source is None or self.source.is_local else self.source.folder

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
        return max(2, self.sequences // 16) if self.trains_end_to_end else 0

    def settings(self) -> dict[str, Any]:
        """Everything the bytes of the result depend on."""
        return {
            "model": str(self.source) if self.source else self.name,
            "model_config": hashlib.sha256(self.model_config.to_json_string().encode()).hexdigest()[:16],
            "spec": dataclasses.asdict(self.spec),
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
            "rotate": self.rotate,
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

    def open_skeleton(self) -> Skeleton:
        """The model's modules on the meta device and its weights as files, converted first where that is needed."""
        empty = self._empty_model(self.model_config)
        if self.rotate:
            check_layout(empty)  # before anything is fetched or converted
        spilled = self.workspace.folder / "original"
        if spilled.is_dir():
            return Skeleton(empty, WeightFiles(spilled), self.device)
        if self.source is not None and self.source.is_local and self.source.gguf_file is None:
            files = WeightFiles(Path(self.source.folder))
            if covers(files, empty):
                return Skeleton(empty, files, self.device)
        whole = self.memory_model if self.memory_model is not None else self._load_complete()
        return Skeleton(empty, spill(whole, spilled), self.device)

    def fold_rotations(self, original: Skeleton, progress: ProgressCallback) -> tuple[Skeleton, list[str]]:
        """The same model with rotations folded into its weights, proved to compute the same, and what to warn of."""
        config, tied = copy.deepcopy(self.model_config), tied_weights(original.model)
        config.tie_word_embeddings = False
        empty = self._empty_model(config)
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
            wanted = self.sequences + self.held_out
            made = load_calibration(
                self.calibration, self.tokenizer(), wanted, self.seqlen, self.seed, self.whole_model, progress
            )
            return made.tokens, {"description": made.description, "warning": made.warning}

        return self.workspace.tokens(make)

    def layer_config(self, linear: nn.Linear) -> LayerConfig:
        """The spec applied to one layer; a codebook larger than the layer's vectors is clamped."""
        config = self.spec.for_layer(linear.in_features, linear.out_features, linear.bias is not None)
        vectors = config.num_vectors * config.group_size
        return dataclasses.replace(
            config,
            num_centroids=_at_most(config.num_centroids, vectors),
            num_residual_centroids=config.num_residual_centroids and _at_most(config.num_residual_centroids, vectors),
            outlier_num_centroids=config.outlier_num_centroids
            and _at_most(config.outlier_num_centroids, config.num_outlier_vectors * config.outlier_size),
        )

    def check_layers(self, skeleton: Skeleton, progress: ProgressCallback) -> list[str]:
        """Checks the spec against every layer, every weight for NaN, and that no Hessian file is missing.

        Returns:
            A warning for each kind of layer whose codebook had to be clamped.

        Raises:
            ConfigError: the spec fits no layer, or a weight holds NaN or infinity.
            CalibrationError: a Hessian file is missing.
        """
        clamped: dict[tuple[str, str], str] = {}
        kept = 0
        for index in range(len(skeleton.blocks)):
            progress(ProgressEvent("checking weights", index, len(skeleton.blocks)))
            for path, linear in skeleton.linears(index).items():
                name = f"{skeleton.blocks_name}.{index}.{path}"
                try:
                    config = self.layer_config(linear)
                except ConfigError as error:
                    raise ConfigError(f"{name}: {error}") from error
                kept += config.num_centroids == self.spec.num_centroids
                clamped |= {(path, kind): line for kind, line in self._clamped(path, config).items()}
                if self.hessian_dir is not None:
                    find_hessian(self.hessian_dir, index, [path.rpartition(".")[2]])
                if not bool(torch.isfinite(skeleton.files.load(f"{name}.weight")).all()):
                    raise ConfigError(f"{name}.weight holds NaN or infinity: the model file is damaged")
        if not kept:
            raise ConfigError(
                f"spec {self.spec.name} has {self.spec.num_centroids} centroids, more than any layer of this model has"
                " vectors; choose a smaller codebook or a shorter vector"
            )
        return [f"{warning}, one for each vector at most" for warning in clamped.values()]

    def _clamped(self, path: str, config: LayerConfig) -> dict[str, str]:
        """Codebook -> a warning, for those of a layer that are smaller than the spec's."""
        sizes = {
            "codebook": (self.spec.num_centroids, config.num_centroids),
            "residual codebook": (self.spec.num_residual_centroids, config.num_residual_centroids),
            "outlier codebook": (self.spec.outlier_num_centroids, config.outlier_num_centroids),
        }
        layer = f"{path} ({config.out_features} x {config.in_features})"
        return {
            kind: f"{layer}: {kind} clamped to {got} centroids"
            for kind, (wanted, got) in sizes.items()
            if 0 < got < wanted
        }

    def tokenizer(self) -> Any | None:
        """The original's tokenizer, or None where there is none."""
        if self.source is None:
            return None
        try:
            return load_tokenizer(self.source)
        except VPTQError:
            return None

    def generation_config(self) -> Any | None:
        """The original's generation config, or None where there is none."""
        if self.memory_model is not None:
            return getattr(self.memory_model, "generation_config", None)
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self._source.folder)
        except OSError:
            return GenerationConfig.from_model_config(self.model_config)

    def _empty_model(self, config: Any) -> nn.Module:
        """The modules of a model with this config: parameters on the meta device, computed buffers on the job's."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        try:
            with init_empty_weights(include_buffers=False):
                empty: nn.Module = AutoModelForCausalLM.from_config(config, dtype=self.compute_dtype)  # type: ignore[no-untyped-call]
        except ValueError as error:  # its text lists every class that would do
            kind = type(config).__name__
            raise ConfigError(
                f"transformers has no causal language model for {kind}: it cannot be quantized"
            ) from error
        for module in empty.modules():  # buffers the code computed, such as rotary frequencies, were made on the CPU
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device) if not buffer.is_meta else buffer
        return empty

    @property
    def _source(self) -> ModelSource:
        assert self.source is not None
        return self.source

    def _load_complete(self) -> Any:
        """The original through transformers, which would fill in a missing tensor with random numbers."""
        loaded: Any = load_model(self._source, dtype="auto", output_loading_info=True)
        model, loading = loaded
        if loading["missing_keys"]:
            raise CheckpointError(f"{self.source}: no file of it holds {', '.join(sorted(loading['missing_keys']))}")
        return model

    def whole_model(self) -> Any:
        """The original in memory, all of it."""
        if self.memory_model is not None:
            return self.memory_model
        spilled = self.workspace.folder / "original"
        return load_model(self._source, dtype=self.compute_dtype) if not spilled.is_dir() else self._from_spill(spilled)

    def _from_spill(self, folder: Path) -> Any:
        """The whole model from the converted files: quicker than converting it again."""
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.model_config, dtype=self.compute_dtype)  # type: ignore[no-untyped-call]
        for path in sorted(folder.glob("*.safetensors")):
            model.load_state_dict(load_file(path), strict=False)
        model.tie_weights()
        return model.eval()


def _at_most(centroids: int, vectors: int) -> int:
    """The largest power of two that is neither above `centroids` nor above `vectors`, and at least 2."""
    return centroids if centroids <= vectors else max(2, 1 << (vectors.bit_length() - 1))
