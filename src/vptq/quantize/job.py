"""One quantization run as it was asked for, and the things it works on: model files, tokens, layer configs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vptq.config import LayerConfig
from vptq.errors import CheckpointError, ConfigError, VPTQError
from vptq.quantize.budget import Budget
from vptq.quantize.calibration import Calibration, load_calibration
from vptq.quantize.candidates import Candidate, candidates_for
from vptq.quantize.hessian import find_hessian
from vptq.quantize.report import ProgressCallback, ProgressEvent
from vptq.quantize.skeleton import Skeleton
from vptq.quantize.solver import SolverConfig
from vptq.quantize.weights import WeightFiles, covers, spill
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
        compute_dtype: what blocks run in: float32 on a CPU, the stored dtype on a GPU.
        spec: for every layer; with a budget only its norm and perm count.
        budget: what a plan chooses each layer's spec for, or None.
        planned: the plan's specs by module path, once it is made.
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
    overwrite: bool
    resume: bool
    absorb_perm: bool
    solver: SolverConfig
    workspace: Workspace
    budget: Budget | None = None
    planned: Mapping[str, QuantSpec] = field(default_factory=dict)

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

    def settings(self) -> dict[str, Any]:
        """Everything the bytes of the result depend on; for a plan its budget: the plan itself stays in the work folder
        and is not made again."""
        spec = dataclasses.asdict(self.spec)
        if self.budget is not None:
            spec = {name: spec[name] for name in ("enable_norm", "enable_perm")}
        return {
            "model": str(self.source) if self.source else self.name,
            "model_config": hashlib.sha256(self.model_config.to_json_string().encode()).hexdigest()[:16],
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
            "absorb_perm": self.absorb_perm,
            "solver": dataclasses.asdict(self.solver),
        }

    def enter_workspace(self) -> None:
        """Makes or enters the work folder, if its settings are these."""
        self.workspace.open(self.settings(), overwrite=self.overwrite, resume=self.resume)

    def leave_workspace(self) -> None:
        """Removes the work folder of a run that failed, unless it is an earlier run's."""
        if not self.workspace.resumed:
            self.workspace.remove()

    def empty_model(self) -> nn.Module:
        """The model's modules with parameters on the meta device."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        try:
            with init_empty_weights(include_buffers=False):
                empty: nn.Module = AutoModelForCausalLM.from_config(self.model_config, dtype=self.compute_dtype)  # type: ignore[no-untyped-call]
        except ValueError as error:  # its text lists every class that would do
            kind = type(self.model_config).__name__
            raise ConfigError(
                f"transformers has no causal language model for {kind}: it cannot be quantized"
            ) from error
        return empty

    def open_skeleton(self) -> Skeleton:
        """The model's modules on the meta device and its weights as files, converted first where that is needed."""
        empty = self.empty_model()
        for module in empty.modules():  # buffers the code computed, such as rotary frequencies, were made on the CPU
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device) if not buffer.is_meta else buffer
        spilled = self.workspace.folder / "original"
        if spilled.is_dir():
            return Skeleton(empty, WeightFiles(spilled), self.device)
        if self.source is not None and self.source.is_local and self.source.gguf_file is None:
            files = WeightFiles(Path(self.source.folder))
            if covers(files, empty):
                return Skeleton(empty, files, self.device)
        whole = self.memory_model if self.memory_model is not None else self._load_complete()
        return Skeleton(empty, spill(whole, spilled), self.device)

    def calibration_tokens(self, progress: ProgressCallback) -> tuple[Tensor, dict[str, Any]]:
        """The sequences [n, seqlen] and what the report says about them."""

        def make() -> tuple[Tensor, dict[str, Any]]:
            made = self.sample(self.sequences, self.seqlen, progress)
            return made.tokens, {"description": made.description, "warning": made.warning}

        return self.workspace.tokens(make)

    def sample(self, sequences: int, seqlen: int, progress: ProgressCallback) -> Calibration:
        """As many tokens of the calibration text as asked for, from its beginning."""
        return load_calibration(
            self.calibration, self.tokenizer(), sequences, seqlen, self.seed, self._whole_model, progress
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
                    config = self.layer_config(name, linear)
                except ConfigError as error:
                    raise ConfigError(f"{name}: {error}") from error
                spec = self.spec_of(name)
                kept += config.num_centroids == spec.num_centroids
                clamped |= {(path, kind): line for kind, line in _clamped(path, spec, config).items()}
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

    def _whole_model(self) -> Any:
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
