"""Zero-shot tasks (HellaSwag, PIQA, ARC, ...) as everybody else measures them: through EleutherAI's lm-eval.

Accuracies are comparable only if prompts, normalization and choice of examples agree to the letter, so none of that is
written again here. This module finds the tasks before any model is loaded, hands models that are loaded already to
lm-eval's own loop, and brings what comes back into plain data. The original answers the same requests as the model.

`lm_eval.evaluate` is called, not `simple_evaluate`: that one asks git, the hub and the system for facts nobody reads
here, and loads tasks only after the model. What it does besides (seeds, no examples in the prompt unless the task says
so) is done here in the same way. lm-eval prints, logs and draws bars; all of that is kept quiet, and progress is told
through the hook that lm-eval calls with every answer for its cache.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vptq.errors import ConfigError, VPTQError
from vptq.evaluate.results import Estimate, TaskScores
from vptq.extras import needed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lm-eval's defaults, so that examples in prompts, and choices in random order, are those of everybody else.
PYTHON_SEED, SEED = 0, 1234
# Of figures that are no plain mean; lm-eval's default of 100,000 takes minutes for two digits nobody needs.
BOOTSTRAP_DRAWS = 1000

TaskDict = dict[str, Any]  # lm_eval.tasks.manager.TaskDict


def load_tasks(names: Sequence[str], task_dir: str | Path | None = None) -> TaskDict:
    """Find tasks, and read or download their data.

    Args:
        names: Tasks, groups or tags of lm-eval, or tasks in `task_dir`.
        task_dir: A folder with task files (YAML) of your own. Functions that they name are code, and run.

    Returns:
        lm-eval's task and group objects by name.

    Raises:
        ConfigError: lm-eval is not installed, there is no such folder or task, or a task cannot be run here.
    """
    folder = None if task_dir is None else Path(task_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"there is no folder {folder} to read task files from; give one that holds *.yaml files")
    with needed("eval", "measuring zero-shot tasks"):
        import lm_eval.tasks  # noqa: F401
    tasks: TaskDict = {"tasks": {}, "groups": {}}
    with _quiet(), _seeded():
        manager = _manager_of(names, folder)
        for name in names:
            loaded = _load(manager, name)
            tasks["tasks"].update(loaded["tasks"])
            tasks["groups"].update(loaded.get("groups", {}))
    for name, task in tasks["tasks"].items():
        _check_task(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return tasks


def score_tasks(
    tasks: TaskDict,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    reference: PreTrainedModel | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TaskScores, ...]:
    """Let a model, and the original if there is one, answer the examples of some tasks.

    Args:
        tasks: From `load_tasks`.
        tokenizer: The model's, and the original's.
        model: A causal language model, in eval mode.
        reference: The original model.
        limit: The first so many examples of every task; None for all.
        batch_size: Requests in a forward pass. A multiple-choice example is one request a choice.
        progress: Called with (requests answered, requests in total), of both models together.

    Raises:
        ConfigError: A task cannot be run on this model.
        VPTQError: The model's logits are not finite.
    """
    models = [model] if reference is None else [model, reference]
    counter = _Counter(list(tasks["tasks"].values()), len(models), progress)
    results = [_run(tasks, tokenizer, each, limit, batch_size, counter) for each in models]
    measured = {name: (row, _estimates(row)) for name, row in results[0].items()}
    return tuple(
        TaskScores(
            task=name,
            examples=int(row["sample_len"]),
            metrics=metrics,
            reference_metrics=None if reference is None else _estimates(results[1][name]),
        )
        for name, (row, metrics) in measured.items()
        if metrics  # a group that only collects has none of its own
    )


def _manager_of(names: Sequence[str], folder: Path | None) -> Any:
    """An index that knows all the names: with lm-eval's own 14,000, which take seconds to list, only if needed."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        local = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(local.all_subtasks):
            return local
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, n=4)
            advice = f"near are {', '.join(near)}" if near else "see lm-eval ls tasks for all names"
            where = "lm-eval" if folder is None else f"lm-eval and {folder}"
            raise ConfigError(f"there is no task {name!r} in {where}; {advice}")
    return manager


def _load(manager: Any, name: str) -> TaskDict:
    """One task or group. lm-eval and `datasets` raise whatever their many parts raise, hence the broad except."""
    try:
        loaded: TaskDict = manager.load([name])
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"task {name!r} cannot be loaded: {reason}") from error
    return loaded


def _check_task(name: str, task: Any) -> None:
    """Refuse now what lm-eval would refuse once the model is loaded."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"task {name!r} runs code that the model has written, which vptq does not; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name!r} needs more than text, and only language models run here; leave it out")
    if len(task.eval_docs) == 0:
        raise ConfigError(f"task {name!r} has no examples; check the data that its file names")


def _run(
    tasks: TaskDict,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    limit: int | None,
    batch_size: int,
    counter: _Counter,
) -> dict[str, dict[str, Any]]:
    """lm-eval's figures of one model by task."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    # Or it forks a process for every core, beside the threads of torch, to draw from a list.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with _quiet(), _seeded():
        lm = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token; the caller's stays as it is
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        lm.set_cache_hook(counter)
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        try:
            found = evaluate(lm, tasks, limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS, log_samples=False)
        except (NotImplementedError, ValueError) as error:
            raise ConfigError(f"lm-eval cannot run these tasks on this model: {error}") from error
    results: dict[str, dict[str, Any]] = found["results"]
    return results


def _estimates(row: dict[str, Any]) -> dict[str, Estimate]:
    """The figures in a row such as {"alias": "piqa", "acc,none": 0.7, "acc_stderr,none": 0.01}."""
    estimates = {}
    for key, value in row.items():
        metric, comma, answer_filter = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = row.get(f"{metric}_stderr,{answer_filter}")
        name = metric if answer_filter == "none" else key
        estimates[name] = Estimate(float(value), float(stderr) if isinstance(stderr, int | float) else None)
    return estimates


class _Counter:
    """Counts answers: what lm-eval takes for a cache's hook, called with each as soon as it is there."""

    def __init__(self, tasks: Sequence[Any], models: int, progress: Callable[[int, int], None] | None) -> None:
        self._tasks = tasks
        self._models = models
        self._progress = progress
        self._done = self._total = 0

    def add_partial(self, _kind: str, _request: Any, answer: Any) -> None:
        """Take note of one answer: a log likelihood, with or without more, or a text."""
        likelihood = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(likelihood, float) and math.isnan(likelihood):
            raise VPTQError("the model's logits are not finite; try dtype bfloat16 or float32")
        if not self._total:
            # All requests are made before the first is answered, and both models get the same.
            requests = sum(request.repeats for task in self._tasks for request in task.instances)
            self._total = requests * self._models
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)


@contextmanager
def _seeded() -> Iterator[None]:
    """The random state that lm-eval would start from, and the caller's own again afterwards."""
    import numpy as np

    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(PYTHON_SEED)
    np.random.seed(SEED)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither lines nor bars of lm-eval and what it uses; where they belong, the caller has progress of its own."""
    from tqdm import tqdm

    draw = tqdm.__init__

    def draw_nothing(bar: Any, *arguments: Any, **options: Any) -> None:
        draw(bar, *arguments, **(options | {"disable": True}))

    with ExitStack() as stack:
        for name in ("lm_eval", "huggingface_hub", "datasets"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        # lm-eval says disable=False, which outweighs the environment's TQDM_DISABLE.
        stack.callback(setattr, tqdm, "__init__", draw)
        tqdm.__init__ = draw_nothing
        stack.enter_context(redirect_stdout(io.StringIO()))
        yield
