"""Products rounded to bfloat16 where that is quicker, and only where they may be."""

from pathlib import Path

import pytest
import torch
from model_zoo import job_for, random_tokens, tiny
from torch import Tensor

from vptq.quantize.activations import Activations
from vptq.quantize.precision import multiplies_bfloat16, quick_products

CPU = torch.device("cpu")


@pytest.mark.parametrize("native", [True, False])
def test_float32_products_are_rounded_where_the_hardware_multiplies_bfloat16(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vptq.quantize.precision.multiplies_bfloat16", lambda device: native)
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(5, 16, generator=generator), torch.randn(3, 16, generator=generator)
    with quick_products(CPU):
        assert torch.nn.functional.linear(x, weight).dtype == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16", None])
def test_a_cpu_has_it_with_either_instruction(instruction: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    has = {name: name == instruction for name in ("avx512_bf16", "amx_bf16")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**has, "avx512_f": True}, raising=False)
    assert multiplies_bfloat16(CPU) is (instruction is not None)


def test_an_older_torch_says_nothing_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bfloat16(CPU)


def test_other_devices_are_left_as_they_are() -> None:
    assert not multiplies_bfloat16(torch.device("xpu"))


def states_behind_a_block(folder: Path, dtype: torch.dtype, *, quick: bool) -> Tensor:
    skeleton = job_for(tiny("llama"), folder).open_skeleton()
    skeleton.load_block(0, dtype)
    activations = Activations(skeleton, random_tokens(4, 16), dtype, quick=quick)
    activations.run_block(0, advance=True)
    return torch.cat(activations.batches)


def test_states_stay_float32_and_move_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vptq.quantize.precision.multiplies_bfloat16", lambda device: True)
    exact = states_behind_a_block(tmp_path / "exact", torch.float32, quick=False)
    quick = states_behind_a_block(tmp_path / "quick", torch.float32, quick=True)
    assert quick.dtype == torch.float32
    assert not torch.equal(quick, exact)
    assert (quick - exact).norm() < 0.01 * exact.norm()


def test_blocks_of_another_dtype_run_in_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float16 model on a GPU loses nothing to bfloat16."""
    monkeypatch.setattr("vptq.quantize.precision.multiplies_bfloat16", lambda device: True)
    alone = states_behind_a_block(tmp_path / "alone", torch.float16, quick=False)
    asked = states_behind_a_block(tmp_path / "asked", torch.float16, quick=True)
    assert torch.equal(asked, alone)
