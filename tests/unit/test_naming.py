"""A name may say what the tensors have, and nothing else."""

import pytest

from vptq.config import LayerConfig
from vptq.naming import contradictions
from vptq.spec import QuantSpec

LARGE = {"q_proj": QuantSpec.parse("v8-k65536-256").for_layer(8192, 8192)}  # 3 index bits, 3.13 stored
SMALL = {"q_proj": QuantSpec.parse("v8-k4096-256").for_layer(576, 576)}  # 2.5 index bits, 4.2 stored


@pytest.mark.parametrize(
    "name",
    ["Llama-70B-v8-k65536-256-woft", "llama-3bit", "llama_3.1-bits", "llama-3-8B", "8bitter-lessons", "m"],
)
def test_a_name_that_is_right_or_silent_is_fine(name: str) -> None:
    assert contradictions(name, LARGE) == []


@pytest.mark.parametrize(
    ("name", "layers", "says"),
    [
        ("llama-2bit", LARGE, "2 bits, but 3.1"),
        ("Llama-4-bits", LARGE, "4 bits, but 3.1"),
        ("model-1.5-bit-v2", LARGE, "1.5 bits, but 3.1"),
        ("Llama-v8-k65536-0-woft", LARGE, "v8-k65536, but 100% of the weights have other codebooks"),
        ("smol-v8-k4096-256", SMALL, "2.5 bits of indices, but 4."),
    ],
)
def test_a_name_that_lies_is_told(name: str, layers: dict[str, LayerConfig], says: str) -> None:
    assert any(f"the name {name} says " in line and says in line for line in contradictions(name, layers))
