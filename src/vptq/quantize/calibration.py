"""The token sequences a model is calibrated on.

Either real text, or text of the model's own. "self" is the default because it needs nothing but the model: each
sequence starts at the BOS token and every next token is drawn from the model's own distribution at temperature 1, so
the inputs the linear layers see are distributed as they are when the model talks. Real text close to what the model
will be used for is better (docs/algorithm.md says by how much). Several texts, "wikitext2,self", take turns sequence by
sequence, so that any beginning of the calibration, which the plan and the gradients look at, has some of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vptq.errors import CalibrationError, ConfigError
from vptq.progress import ProgressCallback, ProgressEvent, ignore
from vptq.text import token_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF = "self"


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on.

    Attributes:
        tokens: Token ids [sequences, seqlen], int64, on the CPU.
        description: One phrase for reports and model cards.
        warning: What is wrong with it, if anything.
    """

    tokens: torch.Tensor
    description: str
    warning: str | None = None


def load_calibration(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    sequences: int,
    seqlen: int,
    seed: int,
    model_loader: Callable[[], PreTrainedModel],
    progress: ProgressCallback | None = None,
) -> Calibration:
    """Make the calibration sequences.

    Args:
        source: "self", a local text file, `wikitext2`, `c4`, or a hub data set `NAME[:CONFIG][@SPLIT]`; or several,
            separated by commas, each of which gives an equal share.
        tokenizer: The model's; may be None for "self" when the model's config names its BOS token.
        sequences: How many sequences to make; fewer, with a warning, when the text is short.
        seqlen: Tokens per sequence.
        seed: Of the sampling. Text is always read from its beginning.
        model_loader: Gives the original model; called for "self" only, which drops it when done.
        progress: Told what is loaded, and about every few steps of sampling.

    Raises:
        CalibrationError: The text is empty, or the model's distribution is not finite.
        ConfigError: There is no such text, a count is out of range or less than the texts, or the model has no token to
            start from.
    """
    if sequences < 1:
        raise ConfigError(f"sequences is {sequences}; at least 1 is needed")
    if seqlen < 2:
        raise ConfigError(f"seqlen is {seqlen}; at least 2 is needed")
    sources = split_sources(str(source))
    if len(sources) > sequences:
        raise ConfigError(
            f"sequences is {sequences}, less than the {len(sources)} calibration texts; one of each at least"
        )
    tell = progress or ignore

    def load(index: int) -> Calibration:
        share = len(range(index, sequences, len(sources)))
        if sources[index] == SELF:
            return _sample(tokenizer, share, seqlen, seed, model_loader, tell)
        return _read(sources[index], tokenizer, share, seqlen, tell)

    made = [load(index) for index in range(len(sources))]
    return made[0] if len(made) == 1 else _in_turn(sources, made, seqlen)


def split_sources(source: str) -> list[str]:
    """The texts that a calibration names, separated by commas; a file may have a comma in its name."""
    return [source] if Path(source).is_file() else [part.strip() for part in source.split(",")]


def source_name(source: str) -> str:
    """What a text is called to others: a file without the folder it is in."""
    return Path(source).name if Path(source).is_file() else source


def _sample(
    tokenizer: PreTrainedTokenizerBase | None,
    sequences: int,
    seqlen: int,
    seed: int,
    model_loader: Callable[[], PreTrainedModel],
    tell: ProgressCallback,
) -> Calibration:
    from vptq.quantize.sampling import sample_sequences

    tell(ProgressEvent("loading the original"))
    model = model_loader()
    start = _start_token(model, tokenizer)
    tokens = sample_sequences(model, start, sequences, seqlen, seed, progress=tell)
    return Calibration(tokens, f"{sequences} x {seqlen} tokens sampled from the model itself (seed {seed})")


def _read(
    source: str, tokenizer: PreTrainedTokenizerBase | None, sequences: int, seqlen: int, tell: ProgressCallback
) -> Calibration:
    if tokenizer is None:
        raise ConfigError(f"calibration text {source} needs a tokenizer, and the model has none; use calibration=self")
    tell(ProgressEvent("reading calibration text"))
    tokens = token_windows(source, tokenizer, seqlen, sequences, purpose="calibration")
    if tokens.shape[0] == 0:
        raise CalibrationError(f"calibration text {source} is empty; give a longer text, or use calibration=self")
    found, length = tokens.shape
    description = f"{found} x {length} tokens of {source_name(source)}"
    return Calibration(tokens, description, _shortage(source, tokens, sequences, seqlen))


def _in_turn(sources: list[str], made: list[Calibration], seqlen: int) -> Calibration:
    """The sequences of several texts, one of each in turn while there are some."""
    for source, each in zip(sources, made, strict=True):
        if each.tokens.shape[1] < seqlen:
            raise CalibrationError(f"{each.warning}; beside other texts, calibration text {source} has to fill one")
    most = max(len(each.tokens) for each in made)
    tokens = torch.stack([each.tokens[turn] for turn in range(most) for each in made if turn < len(each.tokens)])
    warnings = [each.warning for each in made if each.warning]
    return Calibration(tokens, ", ".join(each.description for each in made), "; ".join(warnings) or None)


def _shortage(source: str | Path, tokens: torch.Tensor, sequences: int, seqlen: int) -> str | None:
    found, length = tokens.shape
    if length < seqlen:
        return f"calibration text {source} has only {length} tokens, less than one sequence of {seqlen}; using those"
    if found < sequences:
        return f"calibration text {source} fills only {found} of {sequences} sequences of {seqlen} tokens; using those"
    return None


def _start_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    candidates = (
        getattr(tokenizer, "bos_token_id", None),
        getattr(model.config.get_text_config(), "bos_token_id", None),
        # Models without a BOS token were trained on documents that follow an end-of-text token.
        getattr(tokenizer, "eos_token_id", None),
    )
    for token in candidates:
        if isinstance(token, int):
            return token
    raise ConfigError("calibration=self needs a BOS token to start from, and the model has none; give a text file")
