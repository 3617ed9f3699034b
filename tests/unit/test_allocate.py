"""The budget solver: never over budget, never worse than trying everything."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vptq.errors import ConfigError
from vptq.quantize.allocate import Option, allocate

options = st.builds(Option, bits=st.integers(0, 60), damage=st.integers(0, 40).map(lambda tenths: tenths / 10))
layers = st.lists(st.lists(options, min_size=1, max_size=3), min_size=1, max_size=4)


def cost(some: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    taken = [options[number] for options, number in zip(some, chosen, strict=True)]
    return sum(option.bits for option in taken), sum(option.damage for option in taken)


def brute_force(some: list[list[Option]], budget: int) -> float:
    """The least damage within the budget; infinite when nothing fits."""
    everything = itertools.product(*(range(len(options)) for options in some))
    costs = (cost(some, list(chosen)) for chosen in everything)
    return min((damage for bits, damage in costs if bits <= budget), default=math.inf)


@given(layers, st.integers(0, 300))
def test_equals_brute_force_within_the_budget(some: list[list[Option]], budget: int) -> None:
    best = brute_force(some, budget)
    if best == math.inf:
        with pytest.raises(ConfigError, match="the smallest options take"):
            allocate(some, budget)
        return
    bits, damage = cost(some, allocate(some, budget))
    assert bits <= budget
    assert damage == pytest.approx(best)


@given(layers, st.integers(0, 300), st.integers(1, 8))
def test_a_coarse_resolution_costs_at_most_a_unit_a_layer(
    some: list[list[Option]], budget: int, max_units: int
) -> None:
    span = sum(max(o.bits for o in options) - min(o.bits for o in options) for options in some)
    divisor = math.gcd(*(o.bits - min(p.bits for p in options) for options in some for o in options)) or 1
    unit = divisor * max(1, math.ceil(span / divisor / max_units))
    if brute_force(some, budget) == math.inf:
        return
    bits, damage = cost(some, allocate(some, budget, max_units))
    assert bits <= budget
    assert damage <= brute_force(some, budget - unit * (len(some) + 1)) + 1e-9


@given(layers, st.integers(0, 300), st.integers(0, 50), st.sampled_from([4, 2**19]))
def test_more_bits_never_do_more_damage(some: list[list[Option]], budget: int, more: int, units: int) -> None:
    if brute_force(some, budget) == math.inf:
        return
    little, much = (cost(some, allocate(some, size, units))[1] for size in (budget, budget + more))
    assert much <= little + 1e-9


@given(layers, st.integers(0, 300))
def test_the_same_input_gives_the_same_answer(some: list[list[Option]], budget: int) -> None:
    if brute_force(some, budget) < math.inf:
        assert allocate(some, budget) == allocate(some, budget)


def test_bits_that_a_multiplier_would_leave_over_are_spent() -> None:
    """(0, 10), (4, 6), (9, 0): the middle option is above the line between the others, and still the best at 8 bits."""
    layer = [Option(0, 10.0), Option(4, 6.0), Option(9, 0.0)]
    assert allocate([layer], 8) == [1]
    assert sorted(allocate([layer, layer], 13)) == [1, 2]
