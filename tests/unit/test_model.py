"""The published package's entry point: its own keywords, handed on to transformers in transformers' words."""

from __future__ import annotations

from typing import Any

import accelerate.utils
import pytest
from random_layers import random_weight
from torch import float32, nn

import vptq
from vptq import model
from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.linear import VQuantLinear

GPU, CPU = 80_000, 500_000


@pytest.fixture
def handed_on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `load_model` would get, on a machine with one GPU."""

    def call(**kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def load(*args: Any, **kwargs: Any) -> nn.Module:
            seen.append((args, kwargs))
            return nn.Module()

        monkeypatch.setattr(model, "load_model", load)
        monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: {0: GPU, "cpu": CPU})
        vptq.AutoModelForCausalLM.from_pretrained("some/model", **kwargs)
        return seen[0]

    return call


def test_by_default_nothing_is_added(handed_on: Any) -> None:
    assert handed_on() == (("some/model",), {})
    assert handed_on(device_map={"": 0}, token="t", revision="r")[1] == {
        "device_map": {"": 0},
        "token": "t",
        "revision": "r",
    }


def test_gpu_utilization_scales_the_gpus_only(handed_on: Any) -> None:
    limits = {0: GPU // 4, "cpu": CPU}
    assert handed_on(gpu_utilization=0.25)[1] == {"device_map": "auto", "max_memory": limits}
    assert handed_on(gpu_utilization=0.25, device_map="sequential")[1]["device_map"] == "sequential"


def test_max_memory_wins_over_gpu_utilization(handed_on: Any) -> None:
    limits = {0: 10, "cpu": 20}
    assert handed_on(gpu_utilization=0.25, max_memory=limits)[1] == {"device_map": "auto", "max_memory": limits}


def test_torch_dtype_is_the_old_name_of_dtype(handed_on: Any) -> None:
    assert handed_on(torch_dtype="float16")[1] == {"dtype": "float16"}
    assert handed_on(torch_dtype="float16", dtype="bfloat16")[1] == {"dtype": "bfloat16"}


def test_the_codebook_form_reaches_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = VQuantLinear.from_weight(random_weight(LayerConfig(8, 8, 4, 16)), float32)
    monkeypatch.setattr(model, "load_model", lambda *_: nn.Sequential(nn.ReLU(), nn.Sequential(layer)))
    vptq.AutoModelForCausalLM.from_pretrained("some/model", codebook_form="int8")
    assert layer.codebook_form == "int8"


def test_an_unknown_codebook_form_is_refused_before_loading(handed_on: Any) -> None:
    with pytest.raises(ConfigError, match="codebook form is 'int4'; allowed are exact and int8"):
        handed_on(codebook_form="int4")
