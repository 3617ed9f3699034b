"""What MODEL may be, everywhere this package takes one, and how it is opened.

MODEL is a hub id, a local folder, or a GGUF file. Opening it is transformers' work; this module decides which of the
three was meant (so that a mistyped folder is not looked up on the hub), passes the arguments each kind needs, and turns
what goes wrong into one line. A quantized folder needs nothing special: the integration that `import vptq` leaves with
transformers loads it.

Code that comes with a model runs only when the caller says so (`trust_remote_code`); transformers is never left to ask
on standard input.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from vptq.errors import CheckpointError, ConfigError, VPTQError
from vptq.extras import missing
from vptq.transformers_versions import gguf_arguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelSource:
    """Where a model is.

    Attributes:
        folder: A local folder, or a hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct".
        gguf_file: Name of the GGUF file in that folder, if the model is one.
    """

    folder: str
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine's disk, as opposed to on the hub or in its cache."""
        return Path(self.folder).is_dir()

    @property
    def name(self) -> str:
        """A short name for reports and model cards."""
        if self.gguf_file is not None:
            return Path(self.gguf_file).stem
        return Path(self.folder).resolve().name if self.is_local else self.folder

    def weight_stamps(self) -> list[tuple[str, int, int]]:
        """Path, size and time of change of each weight file in a local folder, to tell its weights from later ones."""
        if not self.is_local:
            return []
        files = sorted((*Path(self.folder).glob("*.safetensors"), *Path(self.folder).glob("*.gguf")))
        return [stamp(path) for path in files]

    def __str__(self) -> str:
        return self.folder if self.gguf_file is None else str(Path(self.folder, self.gguf_file))


def stamp(path: Path) -> tuple[str, int, int]:
    """Path, size and time of change of a file."""
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def resolve_model(model: str | Path | ModelSource) -> ModelSource:
    """Decide what MODEL means.

    A path (absolute, or starting with ".", or with more than one separator, or ending in ".gguf", or simply there) is
    local; everything else is a hub id.

    Args:
        model: Hub id, local folder, or GGUF file.

    Returns:
        Where it is. A local folder or file exists; a hub id has not been looked up.

    Raises:
        ConfigError: The folder or file does not exist, or holds no model.
    """
    if isinstance(model, ModelSource):
        return model
    text = str(model)
    if not text:
        raise ConfigError("the model is empty; give a hub id, a local folder or a GGUF file")
    path = Path(text).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"{text} is a file; a model is a hub id, a local folder or a .gguf file")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        return _resolve_folder(path)
    if isinstance(model, Path) or _looks_local(text):
        raise ConfigError(f"there is no model at {text}; give a hub id, a local folder or a GGUF file that exists")
    return ModelSource(text)


def load_config(
    model: str | Path | ModelSource, *, trust_remote_code: bool = False, token: str | None = None
) -> PreTrainedConfig:
    """Read a model's configuration.

    Raises:
        ConfigError: There is no such model, or its configuration cannot be used.
    """
    from transformers import AutoConfig

    source = resolve_model(model)
    config: PreTrainedConfig = _open(AutoConfig, source, trust_remote_code=trust_remote_code, token=token)
    return config


def load_tokenizer(
    model: str | Path | ModelSource, *, trust_remote_code: bool = False, token: str | None = None
) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer; for a GGUF file, the one inside. A folder may hold a tokenizer and nothing else.

    Raises:
        ConfigError: There is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    alone = not isinstance(model, ModelSource) and Path(model, "tokenizer_config.json").is_file()
    source = ModelSource(str(model)) if alone else resolve_model(model)
    tokenizer: PreTrainedTokenizerBase = _open(AutoTokenizer, source, trust_remote_code=trust_remote_code, token=token)
    return tokenizer


def load_model(
    model: str | Path | ModelSource,
    *model_args: Any,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    token: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model, dense or quantized by this package, in eval mode.

    Args:
        model: Hub id, local folder, or GGUF file (dequantized while loading).
        *model_args: Passed to the model's constructor.
        dtype: Float dtype to hold it in; "auto" is the one it is stored in (float32 for a GGUF file).
        device_map: As for transformers: None, "cpu", "auto", or a mapping of module names to devices.
        trust_remote_code: Allow code that comes with the model to run.
        token: Hub access token; the environment's HF_TOKEN otherwise.
        **kwargs: Passed on to `transformers.AutoModelForCausalLM.from_pretrained`.

    Raises:
        ConfigError: There is no such model, or transformers cannot build it.
        CheckpointError: The folder holds no weights, or a damaged VPTQ checkpoint.
    """
    import torch
    from transformers import AutoModelForCausalLM

    source = resolve_model(model)
    if source.gguf_file is not None:
        kwargs = gguf_arguments() | kwargs
        dtype = torch.float32 if dtype == "auto" else dtype
    loaded: PreTrainedModel = _open(
        AutoModelForCausalLM,
        source,
        *model_args,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        token=token,
        **kwargs,
    )
    return loaded  # transformers has put it in eval mode


def _looks_local(text: str) -> bool:
    return len(PurePath(text).parts) > 2 or text.startswith((".", "/", "~")) or text.endswith(("/", "\\", ".gguf"))


def _resolve_folder(folder: Path) -> ModelSource:
    if (folder / "config.json").is_file():
        return ModelSource(str(folder))
    gguf_files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(gguf_files) == 1:
        return ModelSource(str(folder), gguf_files[0])
    if gguf_files:
        raise ConfigError(f"{folder} holds {len(gguf_files)} GGUF files ({', '.join(gguf_files)}); name one of them")
    raise ConfigError(f"{folder} is not a model folder: it has neither a config.json nor a GGUF file")


def _open(auto_class: Any, source: ModelSource, *args: Any, **kwargs: Any) -> Any:
    """`auto_class.from_pretrained`, with the arguments this source needs and one-line errors."""
    if source.gguf_file is not None:
        if find_spec("gguf") is None:
            raise ConfigError(missing(f"{source} is a GGUF file; reading it", "gguf", "gguf"))
        kwargs["gguf_file"] = source.gguf_file
    if not source.is_local and hub_is_out_of_reach():
        kwargs["local_files_only"] = True
    with _one_line_errors(source, auto_class.__name__):
        return auto_class.from_pretrained(source.folder, *args, **kwargs)


@contextmanager
def _one_line_errors(source: ModelSource, wanted: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except VPTQError:
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{source}: a safetensors file is damaged ({error}); copy it again") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, OSError) and source.is_local and wanted == "AutoModelForCausalLM":
            from vptq.checkpoint import find_shards

            find_shards(source.folder)  # says better which file is missing, if one is
        raise ConfigError(f"{source}: {_explain(source, wanted, error)}") from error


def _explain(source: ModelSource, wanted: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "the model comes with code of its own; read it, then allow it with trust_remote_code"
    if not source.is_local and isinstance(error, OSError):
        return (
            "not in the hub cache, and the hub did not deliver it; check the name, your access (HF_TOKEN) and the "
            "network, or give a local folder"
        )
    if wanted == "AutoTokenizer" and not isinstance(error, ImportError):
        return f"no usable tokenizer there ({text})"
    return f"transformers cannot load it ({text})"


def hub_is_out_of_reach() -> bool:
    """Whether the hub's name cannot even be resolved.

    huggingface_hub retries every file for half a minute; without a network that is minutes until the first message.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or host is None or getproxies():
        return False  # already decided, or not for us to tell
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False
