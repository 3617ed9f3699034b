"""Layers that read the same input, by one launch: each gets what it gets by itself, and nothing waits for the GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_layers import CARD, AsCpp
from cuda_layers import DEVICES as CUDA_DEVICES
from layer_checks import assert_close
from layer_groups import ALIKE, OTHER, group_arguments, layers_of
from torch import Tensor
from triton_layers import DEVICES

from vptq import ops
from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.ops import cuda_compile, cuda_launch, cuda_plan, devices

pytest.importorskip("triton")
from vptq.ops import triton_launch, triton_ops


def check(configs: Sequence[LayerConfig], tokens: int, device: str) -> list[Tensor]:
    """What the operator gives every layer is the product with its weight."""
    pairs = layers_of(configs, device)
    x = torch.randn(tokens, 1, configs[0].in_features, generator=torch.Generator().manual_seed(tokens)).half()
    flat = triton_ops.linear_group(x.to(device), *group_arguments([layer for layer, _ in pairs])).cpu()
    outputs = flat.split([tokens * config.out_features for config in configs])
    found = [y.view(tokens, 1, config.out_features) for y, config in zip(outputs, configs, strict=True)]
    for y, config, (_, stored) in zip(found, configs, pairs, strict=True):
        assert_close(y, x, config, stored)
    return found


class Launches:
    """Counts the layers that each launch serves."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.layers: list[int] = []
        for module, name in ((cuda_launch, "decode"), (triton_launch, "vector"), (triton_launch, "tiles")):
            launch = getattr(module, name)
            patch.setattr(module, name, lambda x, what, n=name, f=launch: (self._count(n, what), f(x, what))[1])

    def _count(self, name: str, what: Any) -> None:
        self.layers.append(1 if name == "tiles" else len(what))


@pytest.fixture
def cuda(device: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsCpp | None:
    """The CUDA kernel serves decoding; on a CPU it is compiled as C++, as if for a GPU of the newest kind."""
    if device != "cpu":
        return None
    stand_in = AsCpp(folder, CARD)
    monkeypatch.setattr(cuda_launch, "cuda_compile", stand_in)
    monkeypatch.setattr(devices, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton_ops.cuda_compile, "missing", lambda: "")
    return stand_in


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compile, "missing", lambda: "these tests are about Triton")


@pytest.mark.parametrize("device", CUDA_DEVICES)
def test_one_cuda_launch_gives_the_bytes_of_three(
    device: str, cuda: AsCpp | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = Launches(monkeypatch)
    for tokens in (1, 3):
        launches.layers.clear()
        together = check(ALIKE, tokens, device)
        assert launches.layers == [3]
        alone = [check([config], tokens, device)[0] for config in ALIKE[:1]]
        assert torch.equal(together[0], alone[0])
    assert [len(y) for y in check(ALIKE[:2], 8, device)] == [8, 8]


@pytest.mark.parametrize("device", CUDA_DEVICES)
def test_slices_of_the_columns_of_several_layers(device: str, cuda: AsCpp | None) -> None:
    """Where little shared memory is left, and for several groups of columns, one more launch adds all parts."""
    grouped = [dataclasses.replace(config, in_features=2 * 811, num_groups=2, group_size=811) for config in ALIKE]
    if cuda is not None:
        cuda.on = cuda_plan.Card(7, 40 << 10)
    check(grouped, 8, device)
    if cuda is not None:
        assert len(cuda.grids) == 2
        assert cuda.grids[0][1] > 2, "more slices than groups"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("programs", [1, 1000])
def test_one_triton_launch_serves_a_token(
    device: str, programs: int, no_cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not programs share the columns of a row, with outliers, groups and vectors that need padding."""
    monkeypatch.setattr(triton_launch, "VECTOR_PROGRAMS", programs)
    outliers: dict[str, Any] = {"outlier_size": 11, "outlier_vector_len": 4, "outlier_num_centroids": 30}
    rich = [dataclasses.replace(config, vector_len=6, num_groups=2, group_size=300, **outliers) for config in ALIKE]
    for configs in (ALIKE, rich, ALIKE[:2]):
        launches = Launches(monkeypatch)
        check(configs, 1, device)
        assert launches.layers == [len(configs)]


@pytest.mark.parametrize("device", DEVICES)
def test_what_cannot_share_a_launch_gets_its_own(device: str, no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for configs, tokens in (((*ALIKE[:2], OTHER), 1), ((*ALIKE, ALIKE[0]), 1), (ALIKE, 2), (ALIKE, 9)):
        launches = Launches(monkeypatch)
        check(configs, tokens, device)
        assert max(launches.layers, default=1) == 1
    assert check(ALIKE, 0, device)[0].shape == (0, 1, 77)


def test_every_device_has_it() -> None:
    """The default is the layers' own operator, one after the other."""
    layers = [layer for layer, _ in layers_of((*ALIKE[:2], OTHER), "cpu")]
    tensors, sizes = group_arguments(layers)
    x = torch.randn(2, 3, 611).half()
    found = ops.linear_group(x, tensors, sizes)
    assert torch.equal(found, torch.cat([layer(x).flatten() for layer in layers]))
    torch.library.opcheck(torch.ops.vptq.linear_group.default, (x, tensors, sizes))


def test_another_width_or_dtype_is_refused() -> None:
    arguments = group_arguments([layer for layer, _ in layers_of(ALIKE, "cpu")])
    for x, why in ((torch.randn(1, 611), "cast one of them"), (torch.randn(1, 612).half(), "must be in_features, 611")):
        with pytest.raises(ConfigError, match=why):
            triton_ops.linear_group(x, *arguments)


def test_a_layer_of_another_dtype_is_refused_and_never_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers would be read as those of the first layer's dtype."""
    launches = Launches(monkeypatch)
    layers = [layer for layer, _ in layers_of(ALIKE[:2], "cpu")]
    layers[1].to(torch.bfloat16)
    with pytest.raises((ConfigError, RuntimeError), match=r"the input (is torch.float16|must have the dtype of)"):
        triton_ops.linear_group(torch.randn(1, 611).half(), *group_arguments(layers))
    assert max(launches.layers, default=1) == 1
