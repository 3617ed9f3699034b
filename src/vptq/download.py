"""A model of the hub brought into the hub's own cache before it is opened, so that somebody can watch it come.

transformers would fetch each file when it first needs it and draw bars of its own, which no program can read. Only the
files that it would fetch are fetched here; what is in the cache already costs a look. Whatever goes wrong is left to
whoever opens the model and finds it missing: they say it in one line, and have a cache to fall back on.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vptq.progress import ProgressCallback, ProgressEvent
from vptq.source import ModelSource, hub_is_out_of_reach, resolve_model

# Weights in order of preference: a repository often holds the same ones several times.
WEIGHTS = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin")
OTHERS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
MEGABYTE = 1_000_000


def download(model: str | Path | ModelSource, tell: ProgressCallback, token: str | None = None) -> None:
    """Fetch what is missing of a model on the hub; nothing to do for a folder or a file.

    Args:
        model: As `resolve_model` takes it.
        tell: Told how many megabytes are there.
        token: For the hub.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    source = resolve_model(model)
    if source.is_local or hub_is_out_of_reach():
        return
    stage = f"downloading {source.folder} (MB)"
    try:
        tell(ProgressEvent(f"looking for {source.folder}"))
        siblings = HfApi(token=token).model_info(source.folder, files_metadata=True).siblings or []
        sizes = {file.rfilename: file.size or 0 for file in siblings}
        done, total = 0, sum(sizes[name] for name in wanted(list(sizes)))
        for name in wanted(list(sizes)):

            def report(count: float, before: int = done) -> None:
                tell(ProgressEvent(stage, (before + int(count)) // MEGABYTE, total // MEGABYTE))

            hf_hub_download(source.folder, name, token=token, tqdm_class=_counter(report))
            done += sizes[name]
            report(0, done)
    except (OSError, ValueError, HfHubHTTPError):
        return


def wanted(names: Sequence[str]) -> list[str]:
    """Of a repository's files those that transformers reads; others are for other programs."""
    top = [name for name in names if "/" not in name]
    weights = next((found for pattern in WEIGHTS if (found := [n for n in top if fnmatch(n, pattern)])), [])
    return [name for name in top if any(fnmatch(name, pattern) for pattern in OTHERS)] + weights


def _counter(report: Any) -> Any:
    """A tqdm bar, as huggingface_hub wants one, that draws nothing and reports its count."""
    from tqdm import tqdm

    class Counter(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **(options | {"disable": True}))
            self.count = float(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> bool | None:
            self.count += n or 0
            report(self.count)
            return None

    return Counter
