"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class FloatType(str, Enum):
    """The float dtypes a model can be held in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class StoredType(str, Enum):
    """The float dtypes a quantized checkpoint can be stored in."""

    float16 = "float16"
    bfloat16 = "bfloat16"


DeviceOption = Annotated[
    str, typer.Option("--device", help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
]
DtypeOption = Annotated[
    FloatType | None,
    typer.Option("--dtype", help="Float type to hold the model in.  [default: the one it is stored in]"),
]
SeqlenOption = Annotated[int, typer.Option("--seqlen", min=2, help="Tokens per sequence.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A quantized folder, or any hub id, local folder or GGUF file.")
]
TokenizerOption = Annotated[
    str, typer.Option("--tokenizer", help="Where the tokenizer is.  [default: with the model]", show_default=False)
]
CodebookFormOption = Annotated[
    str, typer.Option("--codebook-form", help="int8 or exact, as without a command.", show_default=False)
]
FiguresOption = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")]
OriginalArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a local folder, or a GGUF file.")]
BitsOption = Annotated[
    float | None,
    typer.Option(
        "--bits",
        help="Budget: stored bits per weight of the linear layers, codebooks and scales included, such as 2.25. "
        "Each layer gets the spec that its measured sensitivity earns.",
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option("--size", help="Budget instead of --bits: all weight files together, such as 1.2GiB or 900MB."),
]
CalibrationOption = Annotated[
    str,
    typer.Option(
        "--calibration",
        help="self (the model samples its own text), a text file, wikitext2, c4, or NAME[:CONFIG][@SPLIT]; or several, "
        "such as wikitext2,self, in equal shares.",
    ),
]
SequencesOption = Annotated[int, typer.Option("--sequences", min=1, help="Calibration sequences.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of everything random: same seed, same bytes.")]
StoredDtypeOption = Annotated[
    StoredType | None,
    typer.Option("--dtype", help="Float type of the codebooks and unquantized weights.  [default: the model's]"),
]
MoveIndicesOption = Annotated[
    float,
    typer.Option(
        "--move-indices",
        min=0.0,
        max=1.0,
        help="While the whole model is trained, let this share of all vectors take other centroids, such as 0.01.",
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that exists.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run, from the last state it has stored.")
]
NormOption = Annotated[
    bool | None, typer.Option("--norm/--no-norm", help="Normalize input columns.  [default: what the spec says]")
]
PermOption = Annotated[
    bool | None,
    typer.Option("--perm/--no-perm", help="Quantize the most sensitive columns first.  [default: what the spec says]"),
]
AbsorbPermOption = Annotated[
    bool,
    typer.Option(
        "--absorb-perm/--no-absorb-perm", help="Fold the column order into the indices where the format allows it."
    ),
]
HeadOption = Annotated[
    str | None,
    typer.Option(
        "--lm-head",
        help="Quantize the output head too: a spec, such as v4-k64-64, or auto with a budget. Refused where it is tied "
        "to the embedding.  [default: stays as it is]",
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Processes that solve layers at once; on GPUs each takes one of its own, from --device on.  "
        "[default: 1; with --ray one for each GPU, or node]",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Solve layers on the nodes of a Ray cluster: auto (RAY_ADDRESS, or the cluster of this machine), "
        "HOST:PORT of its head, or local (starts one here).  [default: without Ray]",
    ),
]
RotateOption = Annotated[
    bool,
    typer.Option(
        "--rotate",
        help="Fold random rotations into the weights first: the same model with its outliers spread. Llama,"
        " Mistral, Qwen2, Qwen3 and alike; unties tied embeddings.",
    ),
]


def check_start(overwrite: bool, resume: bool) -> None:
    """Refuses the two ways to start together."""
    if overwrite and resume:
        raise typer.BadParameter("give --overwrite or --resume, not both", param_hint="--resume")
