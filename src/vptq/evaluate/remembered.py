"""The original's predictions on windows of text, kept on disk for the next model that is compared with it.

Kept is what leaves the original's last block, as it is: logits would take 85 times the room with SmolLM2-135M, and the
head, which makes them again to the last bit, is a small part of the work. Where a model's head needs more than that,
which is tried with the first window, nothing is kept. One file for an original and a text, under
$XDG_CACHE_HOME (~/.cache); deleting it costs the time to run the original again and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from vptq.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cache_path(source: ModelSource, model: PreTrainedModel, windows: Tensor) -> Path:
    """Where the hidden states of a model on windows of token ids are kept: by what they depend on.

    Args:
        source: What the model was loaded from.
        model: The same, loaded.
        windows: Token ids [windows, seqlen].
    """
    import transformers

    depends_on = [
        *(source.weight_stamps(), model.config.to_json_string(), str(model.dtype), model.device.type),
        *(getattr(model.config, "_commit_hash", None), torch.__version__, transformers.__version__),
        *(list(windows.shape), hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()),
    ]
    name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return folder / "vptq" / f"original-{name}.safetensors"


class Original:
    """A model's logits on windows of text.

    Args:
        model: In eval mode.
        windows: Token ids [windows, seqlen].
        path: The file with its hidden states, read if it is there and made by `keep` if not; None to do neither.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, path: Path | None = None) -> None:
        self._model, self._windows, self._path = model, windows, path
        self._known = None if path is None else _read(path, len(windows))
        may_be_kept = path is not None and self._known is None and _headless(model) is not model
        self._seen: list[Tensor] | None = [] if may_be_kept else None

    def logits(self, number: int) -> Tensor:
        """Logits [seqlen - 1, vocabulary] that predict tokens 1.. of a window."""
        window = self._windows[number]
        if self._known is not None:
            return self._again(self._known[number].to(self._model.device), window)
        if self._seen is None:
            return logits_of(self._model, window)
        with _recorded(self._model) as states:
            found = logits_of(self._model, window)
        self._remember(states, window, found)
        return found

    def _again(self, states: Tensor, window: Tensor) -> Tensor:
        with _replaced(self._model, states):
            return logits_of(self._model, window)

    def _remember(self, states: list[Tensor], window: Tensor, found: Tensor) -> None:
        assert self._seen is not None
        if not self._seen and (len(states) != 1 or not torch.equal(self._again(states[0], window), found)):
            self._seen = None
            return
        self._seen.append(states[0].cpu())

    def keep(self) -> str:
        """Writes what was seen of all windows, unless it was read; why it could not, or an empty text."""
        if self._path is None or self._known is not None:
            return ""
        if self._seen is None:
            return "the original's predictions are not kept: its head needs more than the last hidden states"
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            save_file({str(number): states for number, states in enumerate(self._seen)}, partial)
            partial.replace(self._path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            return f"the original's predictions are not kept: {error}"
        return ""


@torch.inference_mode()
def logits_of(model: PreTrainedModel, window: Tensor) -> Tensor:
    """Logits [seqlen - 1, vocabulary] that predict tokens 1.. of a window [seqlen]."""
    # The last token predicts nothing inside the window, so it need not be run.
    logits: Tensor = model(input_ids=window[None, :-1].to(model.device), use_cache=False).logits
    return logits[0]


def _read(path: Path, count: int) -> list[Tensor] | None:
    """The states in a file; None where there is none, or one that was damaged: the original is run again."""
    try:
        with safe_open(path, "pt") as file:
            return [file.get_tensor(str(number)) for number in range(count)]
    except (OSError, SafetensorError):
        return None


@contextmanager
def _recorded(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What leaves the model without its head [1, tokens, width], at each of its calls."""
    states: list[Tensor] = []
    hook = _headless(model).register_forward_hook(lambda _module, _inputs, output: states.append(output[0]))
    try:
        yield states
    finally:
        hook.remove()


def _headless(model: PreTrainedModel) -> torch.nn.Module:
    """What a model's head is put on; `base_model` holds a little more of some (OPT)."""
    found: torch.nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]
    return found


class _Replayed(BaseModelOutputWithPast):
    """What a model without its head returns, of which only the last hidden states are known."""

    def __getattr__(self, _name: str) -> None:
        return None


@contextmanager
def _replaced(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """The model with these states in place of running all that comes before its head."""
    base: Any = _headless(model)
    own = vars(base).get("forward")  # accelerate puts one there, where a model is shared by devices
    base.forward = lambda *_args, **_kwargs: _Replayed(last_hidden_state=hidden)  # type: ignore[arg-type]
    try:
        yield
    finally:
        del base.forward
        if own is not None:
            base.forward = own
