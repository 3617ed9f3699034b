"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class FloatType(str, Enum):
    """The float dtypes a model can be held in."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


DeviceOption = Annotated[
    str, typer.Option("--device", help="Where to compute: auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
]
DtypeOption = Annotated[
    FloatType | None,
    typer.Option("--dtype", help="Float type to hold the model in.  [default: the one it is stored in]"),
]
SeqlenOption = Annotated[int, typer.Option("--seqlen", min=2, help="Tokens per sequence.")]
