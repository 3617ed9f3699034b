"""Budgets as people write them, and what is said when they are out of reach."""

import pytest

from vptq.errors import ConfigError
from vptq.quantize.budget import Budget, parse_size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.2GiB", int(1.2 * 2**30)),
        ("1.3GB", 1_300_000_000),
        ("900 MiB", 900 * 2**20),
        ("900mb", 900_000_000),
        ("7kB", 7000),
        (12345, 12345),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "1.2", "GiB", "-1GB", "1.2 bananas", "0x10MB", "nanGB", "1e3MB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"such as 1\.2GiB"):
        parse_size(text)


def test_one_budget_at_most() -> None:
    assert Budget.read(None, None) is None
    assert Budget.read(2, None) == Budget(bits=2.0)
    assert Budget.read(None, "1MB") == Budget(size=10**6)
    with pytest.raises(ConfigError, match="give one of them"):
        Budget.read(2, "1MB")


@pytest.mark.parametrize("bits", [0.0, -1.0, float("nan"), float("inf")])
def test_bits_are_a_positive_number(bits: float) -> None:
    with pytest.raises(ConfigError, match="positive number"):
        Budget.read(bits, None)


def test_out_of_reach_names_what_is_in_reach() -> None:
    reach = {"least": 1100, "most": 4500, "weights": 1000, "other_bytes": 5_000_000}
    for bits in (1.1, 4.5):
        Budget(bits=bits).check(**reach)
    for bits in (1.099, 4.51):
        with pytest.raises(ConfigError, match=rf"--bits is {bits:g}; .* 1\.1 to 4\.5 bits"):
            Budget(bits=bits).check(**reach)
    Budget(size=5_000_138).check(**reach)
    Budget(size=10**12).check(**reach)
    with pytest.raises(ConfigError, match=r"--size is 5\.00014 MB; the smallest possible is 5\.01 MB, of which 5 MB"):
        Budget(size=5_000_137).check(**reach)
