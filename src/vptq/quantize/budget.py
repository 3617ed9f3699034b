"""What a plan may spend: bits per weight of the quantized layers, or bytes of the written files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vptq.errors import ConfigError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?) *(?P<unit>[A-Za-z]+)")


@dataclass(frozen=True)
class Budget:
    """One of the two.

    Attributes:
        bits: Stored bits per weight of the quantized layers, codebooks and scales included.
        size: Bytes of all weight files of the quantized folder, what is not quantized included.

    Raises:
        ConfigError: `bits` is no positive number.
    """

    bits: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        assert (self.bits is None) != (self.size is None)
        if self.bits is not None and not (math.isfinite(self.bits) and self.bits > 0):
            raise ConfigError(f"--bits is {self.bits:g}; it must be a positive number of bits per weight, such as 2.25")

    @classmethod
    def read(cls, bits: float | None, size: str | int | None) -> Budget | None:
        """The budget that was asked for; None where neither is given.

        Args:
            bits: As the attribute.
            size: Bytes, or text such as "1.2GiB".

        Raises:
            ConfigError: Both are given, or one of them makes no sense.
        """
        if bits is not None and size is not None:
            raise ConfigError("--bits and --size are two budgets for the same thing; give one of them")
        if size is not None:
            return cls(size=parse_size(size))
        return None if bits is None else cls(bits=float(bits))

    def for_layers(self, weights: int, other_bytes: int) -> int:
        """Bits that the quantized layers may take.

        Args:
            weights: In quantized layers.
            other_bytes: Everything else in the files.
        """
        return math.floor(self.bits * weights) if self.bits is not None else 8 * ((self.size or 0) - other_bytes)

    def check(self, least: int, most: int, weights: int, other_bytes: int) -> None:
        """Refuses what no choice of specs can reach.

        Args:
            least: Bits of the quantized layers when each is as small as it gets.
            most: Likewise, as large as it gets.
            weights: As for `for_layers`.
            other_bytes: Likewise.

        Raises:
            ConfigError: The budget is too small, or bits that no candidate could use.
        """
        allowed = self.for_layers(weights, other_bytes)
        if self.bits is not None and not least <= allowed <= most:
            low = math.ceil(1000 * least / weights) / 1000
            high = max(low, math.floor(1000 * most / weights) / 1000)
            raise ConfigError(
                f"--bits is {self.bits:g}; this model's layers can take {low:g} to {high:g} bits per weight, codebooks "
                "and scales included"
            )
        if allowed < least:
            raise ConfigError(
                f"--size is {self}; the smallest possible is {_megabytes(-(-least // 8) + other_bytes)}, of which "
                f"{_megabytes(other_bytes)} are not quantized"
            )

    def __str__(self) -> str:
        return f"{self.bits:g} bits" if self.bits is not None else f"{(self.size or 0) / 1e6:.6g} MB"


def parse_size(text: str | int) -> int:
    """Bytes in a size such as "1.2GiB", "900 MB" or 123456.

    Raises:
        ConfigError: It is no size.
    """
    if isinstance(text, int):
        text = f"{text} B"
    match = _SIZE.fullmatch(text.strip())
    unit = match and _UNITS.get(match["unit"].upper())
    if not match or not unit:
        raise ConfigError(f"--size is {text!r}; write a number and a unit, such as 1.2GiB, 1.3GB, 900MiB or 900MB")
    return math.floor(float(match["number"]) * unit)


def _megabytes(count: int) -> str:
    """Rounded up, so that what an error calls possible is."""
    return f"{math.ceil(count / 1e4) / 100:g} MB"
