"""A quantized folder on its way to the Hugging Face hub: checked, described, sent in one commit.

Nothing is published that this package could not read back, and only files of kinds that belong to a model: a folder
somebody has worked in may hold texts that nobody else is to see.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vptq.checkpoint import Checkpoint
from vptq.config import LayerConfig
from vptq.errors import CheckpointError, ConfigError, VPTQError
from vptq.naming import contradictions
from vptq.progress import ProgressCallback, ProgressEvent, ignore
from vptq.quantize.card import NAME as CARD
from vptq.quantize.card import model_card
from vptq.quantize.report import load_report
from vptq.source import hub_is_out_of_reach

EVALUATION = "eval.json"
SENT = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "*processor_config.json"),
    *(
        "*token*.json",
        "*.jinja",
        "*.model",
        "*.tiktoken",
        "chat_template.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ),
    *("merges.txt", "report.json", "report.png", "report.html", "finetune.json", "LICENSE*", "NOTICE*"),
)
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
LICENSE = re.compile(r"[\w.-]*")


@dataclass(frozen=True)
class Publication:
    """What is to be published.

    Attributes:
        folder: Where it is.
        repo: Where it goes.
        card: Its model card.
        sizes: Bytes of each file, the card's included, by name.
        bits_per_weight: Every stored bit of the quantized layers over their weights, from the tensors.
        warnings: Lines worth reading before it is sent.
    """

    folder: Path
    repo: str
    card: str
    sizes: Mapping[str, int]
    bits_per_weight: float
    warnings: tuple[str, ...]


def prepare(
    folder: str | Path,
    repo: str,
    evaluation: str | Path | None = None,
    base_model: str = "",
    license: str = "",
    tell: ProgressCallback = ignore,
) -> Publication:
    """Check a folder and write its model card; nothing is sent, and the folder stays as it is.

    Args:
        folder: A quantized folder.
        repo: USER/NAME, or NAME.
        evaluation: What `vptq eval --json` wrote; None for eval.json in the folder, if it is there.
        base_model: Hub id of the original; empty for what the report names, where that is one.
        license: The original's; empty for what the hub says, where it can be asked.
        tell: Told about every layer that is read.

    Raises:
        ConfigError: There is no such folder, `repo` is no name, or there is nothing to make a card from.
        CheckpointError: The folder is incomplete or damaged.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; give a quantized folder")
    if not REPOSITORY.fullmatch(repo):
        raise ConfigError(f"{repo!r} is no name of a repository; give USER/NAME, or NAME for one of yours")
    if base_model and not REPOSITORY.fullmatch(base_model):
        raise ConfigError(f"--base-model is {base_model!r}; give the original's name on the hub, such as USER/NAME")
    if not LICENSE.fullmatch(license):
        raise ConfigError(f"--license is {license!r}; give its name on the hub, such as apache-2.0 or llama3.1")
    layers = _checked_layers(folder, tell)
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    bits = sum(layer.stored_bits for layer in layers.values()) / weights
    warnings = contradictions(repo.rpartition("/")[2], layers)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        warnings.append(f"{folder} has no tokenizer: whoever loads it needs one from elsewhere")
    card = _card(folder, evaluation, base_model, license, bits, warnings)
    sent = [path for path in sorted(folder.iterdir()) if path.is_file() and any(fnmatch(path.name, p) for p in SENT)]
    left = [path.name for path in sorted(folder.iterdir()) if path not in sent and path.name != CARD]
    if left:
        warnings.append(f"not sent: {', '.join(left)}")
    sizes = {path.name: path.stat().st_size for path in sent} | {CARD: len(card.encode())}
    return Publication(folder, repo, card, sizes, bits, tuple(warnings))


def upload(publication: Publication, public: bool = False, tell: ProgressCallback = ignore) -> str:
    """Send it, in one commit, to a repository that is made if it is not there.

    Args:
        publication: What `prepare` gave.
        public: Whether everybody may see a repository that is made; one that is there stays as it is.
        tell: Told what is going on.

    Returns:
        The repository's address.

    Raises:
        ConfigError: There is no token, or no network.
        VPTQError: The hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    token = get_token()
    if token is None:
        raise ConfigError("there is no token for the hub: set HF_TOKEN to one that may write, or run: hf auth login")
    if hub_is_out_of_reach():
        raise ConfigError("the hub cannot be reached: its name is not found; look at the network and try again")
    api, files = HfApi(token=token), [name for name in publication.sizes if name != CARD]
    megabytes = sum(publication.sizes.values()) // 1_000_000
    try:
        tell(ProgressEvent(f"making {publication.repo}"))
        made = api.create_repo(publication.repo, private=not public, exist_ok=True)
        tell(ProgressEvent(f"sending {len(publication.sizes)} files, {megabytes} MB"))
        operations = [CommitOperationAdd(name, str(publication.folder / name)) for name in files]
        operations.append(CommitOperationAdd(CARD, publication.card.encode()))
        message = f"{publication.bits_per_weight:.2f} bits per weight, by vptq"
        api.create_commit(made.repo_id, operations, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        advice = "; is the token one that may write there?" if status in (401, 403, 404) else ""
        reason = error.server_message or str(error).partition("\n")[0]
        raise VPTQError(f"the hub refuses {publication.repo}: {status} {reason}{advice}") from error
    except OSError as error:
        raise VPTQError(f"{publication.repo} could not be sent: {error}; nothing of it is published") from error
    return str(made)


def _card(
    folder: Path, evaluation: str | Path | None, base_model: str, license: str, bits: float, warnings: list[str]
) -> str:
    """The model card, from the report; of a folder without one its own."""
    report = load_report(folder)
    if report is None:
        if not (folder / CARD).is_file():
            raise ConfigError(f"{folder} has neither a report.json to make a model card from nor a {CARD}; write one")
        return (folder / CARD).read_text(encoding="utf-8")
    base_model = base_model or (report.model if "/" in report.model else "")
    license = license or _license(base_model)
    measured = _measured(folder, evaluation)
    if not license:
        warnings.append(f"the license of {base_model or report.model} is not known; state it with --license")
    if not measured:
        warnings.append(f"nothing was measured: vptq eval {folder} --reference MODEL --json {folder / EVALUATION}")
    return model_card(report, base_model or None, measured, license, bits)


def _checked_layers(folder: Path, tell: ProgressCallback) -> dict[str, LayerConfig]:
    """The quantized layers, at least one, once every one has been read and holds together."""
    checkpoint = Checkpoint.open(folder)
    layers = checkpoint.layers()
    if not layers:
        raise CheckpointError(f"{folder}: no layer of it is quantized")
    for number, path in enumerate(layers, start=1):
        checkpoint.load_layer(path)
        tell(ProgressEvent("reading layers", number, len(layers), layer=path))
    return layers


def _license(base_model: str) -> str:
    """What the hub says about the original; empty where it does not, or cannot be asked."""
    if not base_model or hub_is_out_of_reach():
        return ""
    from huggingface_hub import HfApi

    try:
        data = HfApi().model_info(base_model).card_data
    except (OSError, ValueError):
        return ""
    stated = data.get("license") if data is not None else None
    return stated if isinstance(stated, str) and LICENSE.fullmatch(stated) else ""


def _measured(folder: Path, evaluation: str | Path | None) -> dict[str, str]:
    """The figures of an evaluation in words: what, on what -> how much, beside the original."""
    path = folder / EVALUATION if evaluation is None else Path(evaluation).expanduser()
    if evaluation is None and not path.is_file():
        return {}
    try:
        return dict(_rows(json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise ConfigError(f"--eval {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"--eval {path} is not what vptq eval --json writes; measure again") from error


def _rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for scores in data["texts"]:
        on = f"{Path(scores['text']).name}, {scores['windows']} x {scores['seqlen']} tokens"
        reference = scores["reference_perplexity"]
        beside = "" if reference is None else f" (original {reference:.3f})"
        rows.append((f"perplexity ({on})", f"{scores['perplexity']:.3f}{beside}"))
        if scores["kl_divergence"] is not None:
            rows.append((f"KL to the original, nats per token ({on})", f"{scores['kl_divergence']:.4f}"))
            rows.append((f"same likeliest token as the original ({on})", f"{scores['same_top_token']:.2%}"))
    for task in data["tasks"]:
        for metric, estimate in task["metrics"].items():
            beside = ""
            if task["reference_metrics"] is not None:
                beside = f" (original {task['reference_metrics'][metric]['value']:.4f})"
            error = "" if estimate["stderr"] is None else f" ± {estimate['stderr']:.4f}"
            rows.append(
                (f"{metric} ({task['task']}, {task['examples']:,} examples)", f"{estimate['value']:.4f}{error}{beside}")
            )
    return rows
