"""What an evaluation found, as plain data: every figure with what it was measured on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TextScores:
    """Figures on one text.

    Attributes:
        text: Where it came from.
        windows: Token windows measured.
        seqlen: Tokens in each.
        perplexity: exp of the mean negative log likelihood per predicted token.
        reference_perplexity: The original's; None without one, as the next two.
        kl_divergence: KL(original || model) per predicted token, in nats.
        same_top_token: Share of positions where both hold the same token likeliest.
    """

    text: str
    windows: int
    seqlen: int
    perplexity: float
    reference_perplexity: float | None
    kl_divergence: float | None
    same_top_token: float | None


@dataclass(frozen=True)
class Estimate:
    """A figure from some of all possible examples, and its standard error; None where lm-eval knows none for it."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScores:
    """Figures on one task, or on a group of them.

    Attributes:
        task: Its name in lm-eval.
        examples: How many were asked.
        metrics: lm-eval's figures by name, such as acc and acc_norm; NAME,FILTER where answers were filtered first.
        reference_metrics: The original's on the same examples; None without one.
    """

    task: str
    examples: int
    metrics: dict[str, Estimate]
    reference_metrics: dict[str, Estimate] | None


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and on what.

    Most runs measure one text, so the first text's figures are also the evaluation's own; they are None where only
    tasks were measured.

    Attributes:
        model: The model measured.
        reference: The original it was compared with, if any.
        seconds: Time for the forward passes, of both models.
        text: The first text; for it and its figures see `TextScores`.
        windows: Its windows.
        seqlen: Tokens in each.
        perplexity: The model's.
        reference_perplexity: The original's.
        kl_divergence: From the original.
        same_top_token: As the original.
        texts: Every text's figures, in the order asked for.
        tasks: Every task's figures.
    """

    model: str
    reference: str | None
    seconds: float
    text: str | None = None
    windows: int | None = None
    seqlen: int | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    same_top_token: float | None = None
    texts: tuple[TextScores, ...] = ()
    tasks: tuple[TaskScores, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; the keys are always the same."""
        return asdict(self)
