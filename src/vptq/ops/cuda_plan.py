"""How a layer is cut for the CUDA decode kernel: where its codebooks lie, and what each block does. Arithmetic only.

The kernel (`cuda/decode.cu`) looks vectors up in shared memory, which Triton cannot. A codebook lies there in as many
copies as fit: with one for each group of banks (8 at vectors of 16 bytes, 16 at 8) no two lookups collide. One that
does not fit, such as 65536 vectors of 8 (1 MB), stays in global memory, served by the second-level cache.

Before its first lookup a block gathers the inputs of its columns in the permutation's order, two bytes at a time. So
columns are cut into slices, as short as the parts of sums that this makes allow.

Nothing here was measured on a GPU. What each choice should cost is in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from vptq.ops.triton_layer import LayerSizes

TOKENS = (1, 2, 4, 8)
"""Tokens that a kernel takes at once; numbers in between take the next one."""
VECTOR_LENS = (4, 6, 8, 12, 16)
FLOATS = {torch.float16: "Half", torch.bfloat16: "BFloat16"}
OLDEST = (7, 0)
"""The first compute capability whose threads progress one by one, as the kernel's warps expect."""
STEP = 256
"""Columns of a warp's step, `kStepColumns`."""
LAYERS = 3
"""Layers that one launch takes, if they read the same input."""
COPIED_BYTES = 128 << 10
"""Of one codebook's copies, at most: two of 4096 vectors of 8, which on paper spare a twelfth of the cycles of one."""
LOOKUP_CYCLES = 10
"""What a vector in each lane of a warp takes a multiprocessor, about; a gathered input or 32 bytes of parts take 1."""
ADD_CYCLES = 2000
"""What adding the parts of slices takes besides: one more launch."""


@dataclass(frozen=True)
class Card:
    """What of a GPU decides how a layer is cut.

    Attributes:
        multiprocessors: How many.
        shared_bytes: Shared memory that a block may ask for.
    """

    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Kind:
    """The layers that one compiled kernel serves: `Kind` in decode.cu, without the tokens.

    Attributes:
        dtype: float16 or bfloat16.
        vector_len: v.
        bits: Of the main index.
        residual_bits: Of the residual index, 0 without.
        copies: Of the main codebook in shared memory; 0 leaves it in global memory.
        residual_copies: The same for the residual codebook.
    """

    dtype: torch.dtype
    vector_len: int
    bits: int
    residual_bits: int
    copies: int = 0
    residual_copies: int = 0

    def parameters(self, tokens: int) -> str:
        """The template's arguments for a kernel of `tokens`, one of `TOKENS`."""
        sizes = (self.vector_len, self.bits, self.residual_bits, tokens, self.copies, self.residual_copies)
        return f"{FLOATS[self.dtype]}, {', '.join(map(str, sizes))}"

    def rows(self, tokens: int) -> int:
        """Vector rows that a lane sums at a time."""
        sums = self.vector_len * tokens
        return 4 if sums <= 8 else 2 if sums <= 32 else 1

    def sums(self, tokens: int) -> int:
        """Sums of a lane."""
        return self.rows(tokens) * tokens * self.vector_len

    def warps(self, tokens: int) -> int:
        """Warps of a block: fewer where each needs more registers."""
        return 16 if self.sums(tokens) <= 48 else 8

    def book_bytes(self) -> int:
        """Shared memory for the codebooks."""
        return _book(self.vector_len, self.bits) * self.copies + self.residual_bytes()

    def residual_bytes(self) -> int:
        """Of these, the residual codebook's."""
        return _book(self.vector_len, self.residual_bits) * self.residual_copies

    def fixed_bytes(self, tokens: int) -> int:
        """Shared memory besides codebooks and input: the sums of warps."""
        return self.warps(tokens) * 2 * (4 * self.sums(tokens) + tokens)


@dataclass(frozen=True)
class Plan:
    """One launch.

    Attributes:
        kind: Of the layer.
        tokens: The kernel's, one of `TOKENS`.
        blocks: Each layer's, along its rows.
        grid: All of these, and slices of columns.
        threads: Of a block.
        shared_bytes: Of a block.
        columns: Of a slice.
        slices_a_group: Slices of each group of columns.
        across: Warps of a block that share a row.
        steps: Of the busiest warp, from its first to its last.
    """

    kind: Kind
    tokens: int
    blocks: tuple[int, ...]
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    columns: int
    slices_a_group: int
    across: int
    steps: int


def obstacle(vector_len: int, dtype: torch.dtype, packed: bool, outliers: bool, capability: tuple[int, int]) -> str:
    """Why the kernel does not take a layer, which Triton then does; empty where it does.

    Args:
        vector_len: v.
        dtype: The layer's float dtype.
        packed: Its indices are.
        outliers: It has outlier columns.
        capability: The GPU's compute capability.
    """
    if capability < OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is older than {OLDEST[0]}.{OLDEST[1]}"
    if dtype not in FLOATS:
        return f"{str(dtype).removeprefix('torch.')} layers have no CUDA kernel"
    if vector_len not in VECTOR_LENS:
        return f"vectors of {vector_len} have no CUDA kernel ({', '.join(map(str, VECTOR_LENS))} do)"
    if not packed:
        return "unpacked indices have no CUDA kernel"
    return "outlier columns have no CUDA kernel" if outliers else ""


def describe(kind: Kind | None) -> str:
    """Where a kind's codebooks lie, for people to read."""
    if kind is None:
        return "not even a step of its inputs fits the shared memory of this GPU"
    places = [_place("main", kind.copies)]
    if kind.residual_bits:
        places.append(_place("residual", kind.residual_copies))
    return ", ".join(places)


def _place(name: str, copies: int) -> str:
    if not copies:
        return f"{name} codebook in the second-level cache"
    return f"{name} codebook in shared memory" + (f" {copies} times" if copies > 1 else "")


@lru_cache
def kind_of(dtype: torch.dtype, vector_len: int, bits: int, residual_bits: int, card: Card) -> Kind | None:
    """Where a layer's codebooks lie on a card, whatever the number of tokens; None if no step of its inputs fits.

    Each is placed once before any is copied; the smaller first, which gains more by its copies.
    """
    bare = Kind(dtype, vector_len, bits, residual_bits)
    room = card.shared_bytes - max(bare.fixed_bytes(tokens) + _input_bytes(tokens, STEP) for tokens in TOKENS)
    if room < 0:
        return None
    books = {"copies": _book(vector_len, bits)}
    if residual_bits:
        books["residual_copies"] = _book(vector_len, residual_bits)
    copies = dict.fromkeys(books, 0)
    for most in (1, 128 // _piece(vector_len)):
        for name in sorted(books, key=books.__getitem__):
            while copies[name] < most:
                more = copies[name] or 1
                if more * books[name] > room or (copies[name] and 2 * more * books[name] > COPIED_BYTES):
                    break
                copies[name] += more
                room -= more * books[name]
    return Kind(dtype, vector_len, bits, residual_bits, **copies)


@lru_cache(maxsize=4096)
def plan(kind: Kind, tokens: int, out_features: tuple[int, ...], groups: int, group_size: int, card: Card) -> Plan:
    """The launch for so many tokens (1 to 8) of a layer, or of several that differ in nothing but their rows.

    Args:
        kind: From `kind_of` for this card.
        tokens: Of the input.
        out_features: Rows of each layer's weight.
        groups: Groups of columns.
        group_size: Columns of each.
        card: The GPU.
    """
    kernel = next(count for count in TOKENS if tokens <= count)
    room = card.shared_bytes - kind.fixed_bytes(kernel) - kind.book_bytes()
    fewest = -(-group_size // (room // _input_bytes(kernel, STEP) * STEP))
    most = max(fewest, min(-(-group_size // STEP), card.multiprocessors // groups))
    cuts = (
        _cut(kind, kernel, out_features, groups, group_size, columns, across, card)
        for columns in sorted({_whole_steps(-(-group_size // slices)) for slices in range(fewest, most + 1)})
        for across in (1, 2, 4, 8, 16)
        if across <= min(kind.warps(kernel), columns // STEP)
    )
    return min(cuts, key=lambda cut: _cycles(cut, tokens, sum(out_features), card))


def _cut(
    kind: Kind,
    kernel: int,
    out_features: tuple[int, ...],
    groups: int,
    group_size: int,
    columns: int,
    across: int,
    card: Card,
) -> Plan:
    """The launch with slices of so many columns, and so many warps across each; blocks are shared out by rows."""
    slices, warps = -(-group_size // columns), kind.warps(kernel)
    at_once = kind.vector_len * kind.rows(kernel) * (warps // across)
    rounds = [-(-rows // at_once) for rows in out_features]
    room = card.multiprocessors // (groups * slices)
    blocks = tuple(max(1, min(some, room * some // sum(rounds))) for some in rounds)
    longest = max(-(-some // own) for some, own in zip(rounds, blocks, strict=True))
    return Plan(
        kind,
        kernel,
        blocks,
        (sum(blocks), groups * slices),
        32 * warps,
        kind.fixed_bytes(kernel) + kind.book_bytes() + _input_bytes(kernel, columns),
        columns,
        slices,
        across,
        longest * -(-columns // STEP // across),
    )


def _cycles(cut: Plan, tokens: int, outputs: int, card: Card) -> int:
    """What of a launch depends on how a layer is cut: the busiest block's lookups and gathered inputs, and parts."""
    slices = cut.grid[1]
    looked_up = cut.steps * cut.threads // 32 * cut.kind.rows(cut.tokens) * STEP // 32
    parts = slices * tokens * outputs * 4
    added = ADD_CYCLES + 2 * parts // (32 * card.multiprocessors) if slices > 1 else 0
    return LOOKUP_CYCLES * looked_up + (cut.tokens + 1) * cut.columns + added


def layer_kind(sizes: LayerSizes, card: Card) -> Kind | None:
    """`kind_of` for a checked layer."""
    arguments = sizes.arguments
    return kind_of(sizes.dtype, arguments["V"], arguments["BITS"], arguments["RESIDUAL_BITS"], card)


def _piece(vector_len: int) -> int:
    """Bytes of one load of a vector."""
    return 16 if vector_len % 8 == 0 or vector_len == 6 else 8


def _book(vector_len: int, bits: int) -> int:
    """Bytes of one copy of a codebook, its vectors padded to whole loads."""
    piece = _piece(vector_len)
    return -(-2 * vector_len // piece) * piece << bits if bits else 0


def _input_bytes(tokens: int, columns: int) -> int:
    """The slice's inputs, as float32."""
    return 4 * tokens * columns


def _whole_steps(columns: int) -> int:
    return -(-columns // STEP) * STEP
