"""Where text comes from, for calibration and for evaluation, and how it becomes token windows.

One module for both, because a perplexity means something only if everybody cuts the text the same way: the whole text
is tokenized once without special tokens, then cut into consecutive windows that do not overlap, and a last piece that
is shorter than a window is dropped.

A source is a local text file, one of two names with settled meanings (`wikitext2`, `c4`), or any other hub data set as
`NAME[:CONFIG][@SPLIT]`. Hub data sets are streamed and read only as far as the windows asked for need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vptq.errors import ConfigError
from vptq.extras import needed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Purpose = Literal["calibration", "evaluation"]

# Enough characters to fill a token in any script seen so far; whole-text tokenization is slow for very long files, so
# only this much of them is looked at first. Should it not suffice, the reader doubles it.
CHARACTERS_PER_TOKEN = 12


@dataclass(frozen=True)
class HubText:
    """Text in a data set on the hub (or in a local folder that `datasets` can read).

    Attributes:
        path: Name of the data set.
        config: Its configuration; None for the only or default one.
        split: Its split.
        data_files: A single file of it, where the whole split is too large even to list; None for all.
        separator: What joins two rows.
    """

    path: str
    config: str | None
    split: str
    data_files: str | None = None
    separator: str = "\n\n"


# The customary texts: WikiText-2 rows joined by blank lines, and the first shard of C4.
NAMED: dict[tuple[str, Purpose], HubText] = {
    ("wikitext2", "evaluation"): HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ("wikitext2", "calibration"): HubText("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
    ("c4", "evaluation"): HubText("allenai/c4", None, "train", "en/c4-validation.00000-of-00008.json.gz", " "),
    ("c4", "calibration"): HubText("allenai/c4", None, "train", "en/c4-train.00000-of-01024.json.gz", "\n\n"),
}


def token_windows(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    seqlen: int,
    windows: int | None = None,
    purpose: Purpose = "evaluation",
) -> torch.Tensor:
    """Read a text, tokenize it, and cut it into consecutive windows.

    Args:
        source: A local text file (UTF-8), `wikitext2`, `c4`, or a hub data set `NAME[:CONFIG][@SPLIT]`.
        tokenizer: The model's tokenizer. No special tokens are added.
        seqlen: Tokens per window, at least 2.
        windows: How many windows at most; None for all of the text.
        purpose: Which split a data set's name stands for.

    Returns:
        Token ids [n, seqlen], int64, with n <= windows. A text shorter than one window comes back as one shorter window
        [1, tokens]; an empty text as [0, seqlen].

    Raises:
        ConfigError: There is no such text, or it cannot be read.
    """
    import torch

    if seqlen < 2:
        raise ConfigError(f"seqlen is {seqlen}; a window needs at least 2 tokens")
    if windows is not None and windows < 1:
        raise ConfigError(f"{windows} windows were asked for; at least 1 is needed")
    ids = _tokenize(source, tokenizer, None if windows is None else windows * seqlen, purpose)
    count = ids.numel() // seqlen
    if count == 0:
        return ids[None] if ids.numel() > 1 else torch.empty(0, seqlen, dtype=torch.int64)
    count = count if windows is None else min(count, windows)
    return ids[: count * seqlen].view(count, seqlen)


def read_text(source: str | Path, characters: int | None = None, purpose: Purpose = "evaluation") -> str:
    """Read a text, or its beginning.

    Args:
        source: As for `token_windows`.
        characters: About how many characters are enough; None for all.
        purpose: Which split a data set's name stands for.

    Raises:
        ConfigError: There is no such text, or it cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, characters)
    hub_text = NAMED.get((str(source), purpose)) or _parse_hub_name(str(source))
    pieces, total = [], 0
    for row in _read_rows(hub_text):
        pieces.append(row)
        total += len(row)
        if characters is not None and total >= characters:
            break
    return hub_text.separator.join(pieces)


def _tokenize(
    source: str | Path, tokenizer: PreTrainedTokenizerBase, wanted: int | None, purpose: Purpose
) -> torch.Tensor:
    import torch

    characters = None if wanted is None else wanted * CHARACTERS_PER_TOKEN
    while True:
        text = read_text(source, characters, purpose)
        # verbose=False: the warning about the model's context length is meant for people who feed all of it at once.
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor(encoded, dtype=torch.int64)
        if wanted is None or characters is None or ids.numel() >= wanted or len(text) < characters:
            return ids
        characters *= 2


def _read_file(path: Path, characters: int | None) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read() if characters is None else file.read(characters)
    except UnicodeDecodeError as error:
        raise ConfigError(f"text {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"text {path} cannot be read: {error.strerror}") from error


def _parse_hub_name(source: str) -> HubText:
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    # A data set in a local folder is opened by the same library, so only paths that lead nowhere are wrong.
    if not source or (looks_local and not Path(source).expanduser().is_dir()):
        raise ConfigError(f"there is no text at {source!r}; give a text file, wikitext2, c4, or a hub data set")
    name, _, split = source.partition("@")
    path, _, config = name.partition(":")
    return HubText(path, config or None, split or "train")


def _read_rows(hub_text: HubText) -> Iterator[str]:
    """The text column of every row, in order.

    `datasets` raises whatever its many back ends raise, from network to parser, hence the broad except.
    """
    with needed("data", f"text {hub_text.path!r} is no file here; reading a data set"):
        from datasets import load_dataset
    try:
        rows = load_dataset(
            hub_text.path, hub_text.config, split=hub_text.split, data_files=hub_text.data_files, streaming=True
        )
        yield from (_text_of(row, hub_text.path) for row in rows)
    except ConfigError:
        raise
    except Exception as error:
        reason = next(islice(str(error).splitlines(), 1), type(error).__name__)
        raise ConfigError(
            f"text {hub_text.path!r} is neither a file here nor a data set that could be read ({reason}); "
            "give a text file, wikitext2, c4, or a hub data set NAME[:CONFIG][@SPLIT]"
        ) from error


def _text_of(row: dict[str, Any], name: str) -> str:
    for column in ("text", *row):
        value = row.get(column)
        if isinstance(value, str):
            return value
    raise ConfigError(f"data set {name!r} has no text column; its columns are {', '.join(row)}")
