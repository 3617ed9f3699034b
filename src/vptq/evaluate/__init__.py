"""How good a model is: perplexity on held-out text, divergence from the original, and accuracy on zero-shot tasks.

    import vptq

    result = vptq.evaluate("smol-3bit", reference="HuggingFaceTB/SmolLM2-135M-Instruct", text="wikitext2", windows=20)
    print(result.perplexity, result.kl_divergence)

    result = vptq.evaluate("smol-3bit", tasks=["piqa", "arc_easy"], limit=200)
    print(result.tasks[0].metrics["acc"].value)

Everything that can be found wrong (a setting, a text, a task) is found before the first model is loaded.

Package and function share this name, as `vptq.quantize` does; see `_CallableModule`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from vptq.errors import ConfigError
from vptq.evaluate.results import Estimate, Evaluation, TaskScores, TextScores
from vptq.progress import ProgressCallback, ProgressEvent, ignore

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    ModelLike = str | Path | PreTrainedModel

__all__ = ["Estimate", "Evaluation", "TaskScores", "TextScores", "evaluate"]

DEFAULT_TEXT = "wikitext2"


def evaluate(
    model: ModelLike,
    reference: ModelLike | None = None,
    text: str | Path | Sequence[str | Path] | None = None,
    seqlen: int = 2048,
    windows: int | None = None,
    *,
    tasks: str | Sequence[str] = (),
    task_dir: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    remember: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Measure a model's perplexity and zero-shot accuracy, beside the original's and its divergence from that if given.

    Args:
        model: Hub id, local folder, GGUF file, or a loaded model (which then stays as and where it is).
        reference: The original model, likewise.
        text: A local text file, `wikitext2`, `c4`, or a hub data set `NAME[:CONFIG][@SPLIT]`; or several, each measured
            by itself. By default wikitext2, or none where there are tasks.
        seqlen: Tokens per window. A text that is shorter makes one shorter window.
        windows: How many windows of each text at most; None for the whole text.
        tasks: Zero-shot tasks by their names in lm-eval, which the extra `eval` installs.
        task_dir: A folder with task files (YAML) of your own. Functions that they name are code, and run.
        limit: The first so many examples of each task; None for all.
        batch_size: Requests of tasks in one forward pass; less where memory is short.
        remember: Keep what the original predicts on the texts (a number a token and column of its hidden states) in
            `vptq` under $XDG_CACHE_HOME (~/.cache), and use what was kept: the same figures, the original's blocks not
            run again.
        tokenizer: The tokenizer to use; by default the model's, which needs a model given by name.
        device: Where to load models: "auto" (a GPU if there is one), or a torch device.
        dtype: Float dtype to load models in; "auto" is the one each is stored in.
        progress: Told what is loaded, and about every window of a text and every request of the tasks.

    Raises:
        ConfigError: A model, text or task does not exist, a text is empty, or the models' vocabularies differ.
        CheckpointError: A model folder is damaged.
        VPTQError: The model's logits are not finite.
    """
    task_names = [tasks] if isinstance(tasks, str) else list(tasks)
    if text is None:
        text = () if task_names else DEFAULT_TEXT
    texts = [text] if isinstance(text, str | Path) else list(text)
    _check_settings(texts, windows, task_names, task_dir, limit, batch_size)
    if remember and (not isinstance(reference, str | Path) or not texts):
        raise ConfigError("remember keeps an original's predictions on text; give reference by name, and a text")
    if tokenizer is None:
        if not isinstance(model, str | Path):
            raise ConfigError("a model that is already loaded comes without its tokenizer; pass tokenizer=...")
        from vptq.source import load_tokenizer

        tokenizer = load_tokenizer(model)
    tell = progress or ignore
    # Texts and tasks before models: they are the quicker to find missing.
    tokens = []
    for each in texts:
        tell(ProgressEvent(f"reading {each}"))
        tokens.append(_read_windows(each, tokenizer, seqlen, windows))
    if task_names:
        from vptq.evaluate.zero_shot import load_tasks, score_tasks

        tell(ProgressEvent("reading tasks"))
        loaded_tasks = load_tasks(task_names, task_dir)
    loaded = _load(model, device, dtype, tell)
    loaded_reference = None if reference is None else _load(reference, device, dtype, tell)
    start = time.perf_counter()
    text_scores = [
        _score_text(each, part, loaded, loaded_reference, tell, reference if remember else None)
        for each, part in zip(texts, tokens, strict=True)
    ]
    task_scores: tuple[TaskScores, ...] = ()
    if task_names:
        task_scores = score_tasks(
            *(loaded_tasks, tokenizer, loaded, loaded_reference, limit, batch_size),
            lambda done, total: tell(ProgressEvent("tasks", done, total)),
        )
    return Evaluation(
        model=_name_of(model),
        reference=None if reference is None else _name_of(reference),
        seconds=time.perf_counter() - start,
        **(asdict(text_scores[0]) if text_scores else {}),
        texts=tuple(text_scores),
        tasks=task_scores,
    )


def _check_settings(
    texts: Sequence[str | Path],
    windows: int | None,
    tasks: Sequence[str],
    task_dir: str | Path | None,
    limit: int | None,
    batch_size: int,
) -> None:
    if not texts and not tasks:
        raise ConfigError("there is nothing to evaluate on; give a text or a task")
    if windows is not None and not texts:
        raise ConfigError(f"windows is {windows}, but only tasks are measured; give a text too, or leave windows out")
    for name, value in (("limit", limit), ("task_dir", task_dir)):
        if value is not None and not tasks:
            raise ConfigError(f"{name} is {value}, but there are no tasks; give tasks, or leave {name} out")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; a task needs at least 1 example")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; a forward pass needs at least 1 request")


def _read_windows(
    text: str | Path, tokenizer: PreTrainedTokenizerBase, seqlen: int, windows: int | None
) -> torch.Tensor:
    from vptq.text import token_windows

    tokens = token_windows(text, tokenizer, seqlen, windows)
    if tokens.shape[0] == 0:
        raise ConfigError(f"text {text} is empty; there is nothing to evaluate on")
    return tokens


def _score_text(
    text: str | Path,
    tokens: torch.Tensor,
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tell: ProgressCallback,
    remembered: ModelLike | None,
) -> TextScores:
    from vptq.evaluate.perplexity import score_windows

    path = None
    if isinstance(remembered, str | Path) and reference is not None:
        from vptq.evaluate.remembered import cache_path
        from vptq.source import resolve_model

        path = cache_path(resolve_model(remembered), reference, tokens)
    scores = score_windows(
        model, tokens, reference, lambda done, total: tell(ProgressEvent(str(text), done, total)), path
    )
    return TextScores(text=str(text), windows=tokens.shape[0], seqlen=tokens.shape[1], **asdict(scores))


def _load(model: ModelLike, device: str, dtype: torch.dtype | str, tell: ProgressCallback) -> PreTrainedModel:
    from vptq.download import download
    from vptq.source import load_model

    if not isinstance(model, str | Path):
        return model
    download(model, tell)
    tell(ProgressEvent(f"loading {model}"))
    return load_model(model, dtype=dtype, device_map=device)


def _name_of(model: ModelLike) -> str:
    return str(model) if isinstance(model, str | Path) else model.name_or_path or type(model).__name__


class _CallableModule(ModuleType):
    """Makes `vptq.evaluate(...)` work although importing this package binds the module to that name."""

    __call__ = staticmethod(evaluate)


sys.modules[__name__].__class__ = _CallableModule
