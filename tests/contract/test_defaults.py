"""What an option means when it is left out: the same in every function and command that has it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from vptq.cli import finetune as finetune_command
from vptq.cli import plan as plan_command
from vptq.cli import quantize as quantize_command
from vptq.quantize.finetune_folder import finetune
from vptq.quantize.pipeline import quantize
from vptq.quantize.planner import plan
from vptq.quantize.setup import prepare

FUNCTIONS = [prepare, plan, finetune, quantize_command.quantize, plan_command.plan, finetune_command.finetune]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_what_is_left_out_means_the_same_everywhere(function: Callable[..., Any]) -> None:
    expected, found = defaults(quantize), defaults(function)
    shared = expected.keys() & found.keys() - {"progress"}  # a form on the command line, a function in Python
    assert {"calibration", "sequences", "seqlen", "seed", "device"} <= shared
    assert {name: found[name] for name in shared} == {name: expected[name] for name in shared}
