"""What a quantization run is asked to do, checked as a whole before the hours are spent."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vptq.config import LayerConfig
from vptq.errors import ConfigError, VPTQError
from vptq.quantize.calibration import SELF, load_calibration
from vptq.quantize.report import ProgressCallback, ProgressEvent
from vptq.quantize.skeleton import Skeleton
from vptq.quantize.solver import SolverConfig
from vptq.quantize.weights import WeightFiles, covers, spill
from vptq.quantize.workspace import Workspace
from vptq.source import ModelSource, load_config, load_model, load_tokenizer, resolve_model
from vptq.spec import QuantSpec

STORED_DTYPES = (torch.float16, torch.bfloat16)
HESSIAN_INPUTS = ("quantized", "original")


@dataclass
class Job:
    """A checked request: every field may be trusted.

    Attributes:
        source: where the original is, or None for a model in memory.
        memory_model: the model in memory, or None.
        dtype: what is stored.
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
    overwrite: bool
    resume: bool
    absorb_perm: bool
    solver: SolverConfig
    workspace: Workspace

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else self.dtype

    @property
    def name(self) -> str:
        return self.source.name if self.source else type(self.memory_model).__name__

    @property
    def base_model(self) -> str | None:
        """The original's hub id, where it has one that a reader could follow."""
        return None if self.source is None or self.source.is_local else self.source.folder

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
            "absorb_perm": self.absorb_perm,
            "solver": dataclasses.asdict(self.solver),
        }

    def enter_workspace(self) -> None:
        """Makes or enters the work folder, if its settings are these."""
        self.workspace.open(self.settings(), overwrite=self.overwrite, resume=self.resume)

    def leave_workspace(self) -> None:
        """Removes the work folder of a run that failed, unless it is an earlier run's."""
        if not self.resume:
            self.workspace.remove()

    def open_skeleton(self) -> Skeleton:
        """The model's modules on the meta device and its weights as files, converted first where that is needed."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        with init_empty_weights(include_buffers=False):
            empty = AutoModelForCausalLM.from_config(self.model_config, dtype=self.compute_dtype)  # type: ignore[no-untyped-call]
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
        whole = self.memory_model if self.memory_model is not None else load_model(self._source, dtype="auto")
        return Skeleton(empty, spill(whole, spilled), self.device)

    def calibration_tokens(self, progress: ProgressCallback) -> tuple[Tensor, dict[str, Any]]:
        """The sequences [n, seqlen] and what the report says about them."""

        def make() -> tuple[Tensor, dict[str, Any]]:
            made = load_calibration(
                self.calibration, self.tokenizer(), self.sequences, self.seqlen, self.seed, self._whole_model, progress
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
        """Checks the spec against every layer and every weight for NaN.

        Returns:
            A warning for each kind of layer whose codebook had to be clamped.

        Raises:
            ConfigError: the spec fits no layer, or a weight holds NaN or infinity.
        """
        clamped: dict[str, str] = {}
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
                if config.num_centroids < self.spec.num_centroids:
                    shape = f"{linear.out_features} x {linear.in_features}"
                    clamped.setdefault(path, f"{path} ({shape}): codebook clamped to {config.num_centroids} centroids")
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


def prepare(
    model: str | Path | nn.Module,
    output: Path,
    spec: str | QuantSpec,
    *,
    calibration: str,
    sequences: int,
    seqlen: int,
    seed: int,
    device: str | torch.device,
    dtype: torch.dtype | None,
    hessian_dir: Path | None,
    hessian_inputs: str,
    norm: bool | None,
    perm: bool | None,
    overwrite: bool,
    resume: bool,
    absorb_perm: bool,
) -> Job:
    """Checks everything that can be checked without reading weights.

    Raises:
        ConfigError: which setting is wrong, what it was, and what is allowed.
    """
    chosen = QuantSpec.parse(spec) if isinstance(spec, str) else spec
    if norm is not None:
        chosen = dataclasses.replace(chosen, enable_norm=norm)
    if perm is not None:
        chosen = dataclasses.replace(chosen, enable_perm=perm)
    if hessian_inputs not in HESSIAN_INPUTS:
        raise ConfigError(f"--hessian-inputs is {hessian_inputs!r}; choose one of {', '.join(HESSIAN_INPUTS)}")
    if sequences < 1 or seqlen < 2:
        raise ConfigError(f"--sequences is {sequences} and --seqlen {seqlen}; at least 1 and 2 are needed")
    if dtype is not None and dtype not in STORED_DTYPES:
        raise ConfigError(f"--dtype is {dtype}; a checkpoint is stored in float16 or bfloat16")
    if hessian_dir is not None and not hessian_dir.is_dir():
        raise ConfigError(f"--hessian-dir: there is no folder {hessian_dir}")
    if output.exists() and not overwrite and not resume:
        raise ConfigError(f"{output} exists; choose another folder, or give --overwrite or --resume")
    if output.exists() and resume:
        raise ConfigError(f"{output} is finished; there is nothing to resume")
    memory_model = model if isinstance(model, nn.Module) else None
    source = None if isinstance(model, nn.Module) else resolve_model(model)
    config = memory_model.config if memory_model is not None else load_config(source)  # type: ignore[arg-type]
    if getattr(config, "quantization_config", None) and not (source and source.gguf_file):
        raise ConfigError(f"{source or 'the model'} is quantized already; start from the original weights")
    return Job(
        source=source,
        memory_model=memory_model,
        model_config=config,
        output=output,
        spec=chosen,
        calibration=_checked_calibration(calibration),
        sequences=sequences,
        seqlen=seqlen,
        seed=seed,
        device=_checked_device(device),
        dtype=dtype or _stored_dtype(config),
        hessian_dir=hessian_dir,
        hessian_inputs=hessian_inputs,
        overwrite=overwrite,
        resume=resume,
        absorb_perm=absorb_perm,
        solver=SolverConfig(),
        workspace=Workspace(output),
    )


def _checked_calibration(calibration: str) -> str:
    looks_like_file = calibration != SELF and (Path(calibration).suffix == ".txt" or calibration.startswith(("/", ".")))
    if looks_like_file and not Path(calibration).is_file():
        raise ConfigError(f"--calibration: there is no file {calibration}")
    return str(Path(calibration).resolve()) if Path(calibration).is_file() else calibration


def _checked_device(device: str | torch.device) -> torch.device:
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"--device is {device}, which this machine does not have ({str(error).splitlines()[0]})"
        ) from error
    return chosen


def _stored_dtype(config: Any) -> torch.dtype:
    """The original's dtype where it is a 16-bit one; float32 originals lose no range in bfloat16."""
    own = getattr(config, "dtype", None)
    return own if own in STORED_DTYPES else torch.bfloat16


def _at_most(centroids: int, vectors: int) -> int:
    """The largest power of two that is neither above `centroids` nor above `vectors`, and at least 2."""
    return centroids if centroids <= vectors else max(2, 1 << (vectors.bit_length() - 1))
