"""Which option each layer takes: the least total damage that a budget of bits allows.

This is the multiple-choice knapsack problem, solved by dynamic programming over the bits that are spent beyond every
layer's smallest option, and not by a Lagrange multiplier: that reaches only the budgets where the lower convex hull has
a corner, and leaves bits over everywhere else.

Bits are counted in units: of the greatest common divisor of all differences, which loses nothing, or of a 2^19th of
their range where that is larger. Options are then rounded up, so that the budget holds in any case; the answer is the
optimum for a budget that is less by at most one unit a layer (0.002 bits per weight for 210 layers between 1 and 5
bits). The unit does not depend on the budget: more bits never give a worse answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vptq.errors import ConfigError

MAX_UNITS = 2**19


@dataclass(frozen=True)
class Option:
    """One way to store one layer.

    Attributes:
        bits: What it takes to store.
        damage: What it costs; damages of different layers add up.
    """

    bits: int
    damage: float


def allocate(layers: Sequence[Sequence[Option]], budget: int, max_units: int = MAX_UNITS) -> list[int]:
    """Chooses an option for every layer.

    Args:
        layers: The options of each layer, 1 to 256, in any order.
        budget: Bits that the chosen options may take together.
        max_units: Resolution; see the module.

    Returns:
        For each layer the index of its option. The same input gives the same answer.

    Raises:
        ConfigError: Even the smallest options take more than `budget`.
    """
    least = [min(option.bits for option in options) for options in layers]
    if sum(least) > budget:
        raise ConfigError(f"the budget is {budget} bits; the smallest options take {sum(least)}")
    extras = [[option.bits - floor for option in options] for options, floor in zip(layers, least, strict=True)]
    unit = _unit(extras, max_units)
    steps = [[-(-extra // unit) for extra in some] for some in extras]
    capacity = min((budget - sum(least)) // unit, sum(max(some) for some in steps))
    damage = torch.zeros(capacity + 1, dtype=torch.float64)
    choices: list[Tensor] = []
    for options, costs in zip(layers, steps, strict=True):
        damage, choice = _add_layer(damage, options, costs)
        choices.append(choice)
    return _read_back(choices, steps, capacity)


def _unit(extras: Sequence[Sequence[int]], max_units: int) -> int:
    """The bits of one step: a multiple of every difference's common divisor."""
    divisor = math.gcd(*(extra for some in extras for extra in some)) or 1
    most = sum(max(some) for some in extras) // divisor
    return divisor * max(1, -(-most // max_units))


def _add_layer(damage: Tensor, options: Sequence[Option], steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Least damage within 0..capacity units with one layer more, and the option of that layer that gives it."""
    best = torch.full_like(damage, math.inf)
    choice = torch.zeros(len(damage), dtype=torch.uint8)
    for number in _worth_a_look(options):
        paid = damage[: max(0, len(damage) - steps[number])] + options[number].damage
        rest = slice(len(damage) - len(paid), None)
        better = paid < best[rest]
        best[rest] = torch.where(better, paid, best[rest])
        choice[rest].masked_fill_(better, number)
    return best, choice


def _worth_a_look(options: Sequence[Option]) -> list[int]:
    """The options that no other one beats in bits and damage both."""
    kept: list[int] = []
    for number in sorted(range(len(options)), key=lambda n: (options[n].bits, options[n].damage)):
        if not kept or options[number].damage < options[kept[-1]].damage:
            kept.append(number)
    return kept


def _read_back(choices: Sequence[Tensor], steps: Sequence[Sequence[int]], left: int) -> list[int]:
    chosen: list[int] = []
    for choice, costs in zip(reversed(choices), reversed(steps), strict=True):
        chosen.append(int(choice[left]))
        left -= costs[chosen[-1]]
    return chosen[::-1]
