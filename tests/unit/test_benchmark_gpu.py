"""benchmarks/gpu.py without a GPU: what it refuses, and that what it derives from times is right."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from random_layers import random_weight

from vptq import shared_input
from vptq.linear import VQuantLinear
from vptq.spec import QuantSpec

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main()


def test_rows_compare_the_way_that_serves_with_float16(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    config = QuantSpec.parse("v8-k16").for_layer(24, 40, False)
    layer = VQuantLinear.from_weight(random_weight(config, torch.float16), torch.float16)
    took = {"cuda": 1.0, "vector": 2.0, "tiles": 4.0, "dense": 8.0}
    monkeypatch.setattr(gpu, "takes_cuda", lambda layer: decodes)
    monkeypatch.setattr(gpu, "random_layer", lambda name, shape: layer)
    monkeypatch.setattr(gpu, "run", lambda way, layer, x: took[way])
    monkeypatch.setattr(gpu, "microseconds", lambda work: work())
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, device, **rest: randn(*size, **rest))
    decodes = True
    (row,) = gpu.measure("v8-k16", (40, 24), (1,), {1: 10.0})
    assert (row["served"], row["times_fp16"], len(row["microseconds"])) == ("cuda", 10.0, 4)
    decodes = False
    rows = gpu.measure("v8-k16", (40, 24), (1, 16, 512), {1: 10.0, 16: 12.0, 512: 80.0})
    assert [(row["served"], row["times_fp16"]) for row in rows] == [("vector", 5.0), ("tiles", 3.0), ("dense", 10.0)]
    assert [sorted(row["microseconds"]) for row in rows] == [["dense", "tiles", "vector"], *[["dense", "tiles"]] * 2]
    stored = sum(parameter.nbytes for parameter in layer.parameters())
    assert rows[0]["gb_per_second"] == pytest.approx(stored / 2e-6 / 1e9)


@pytest.mark.parametrize("seconds", [60, 0])
def test_a_whole_run_writes_what_it_had_time_for(
    seconds: int, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, at toy sizes and with the reference in place of all kernels."""
    pytest.importorskip("triton")
    shapes = ((32, 64), (64, 32))
    spec = QuantSpec.parse("v8-k16")
    layers = {shape: spec.for_layer(shape[1], shape[0], False) for shape in shapes}
    functions = {
        "compile_all": lambda configs: 1.0,
        "bandwidth": lambda: 1e12,
        "eager_microseconds": lambda layer: 20.0,
        "microseconds": lambda work: work() is not None and 5.0,
        "random_layer": lambda name, shape: VQuantLinear.from_weight(random_weight(layers[shape]), torch.float16),
        "run": lambda way, layer, x: None if way == "cuda" else layer(x),
    }
    for name, function in functions.items():
        monkeypatch.setattr(gpu, name, function)
    monkeypatch.setattr(gpu, "SHAPES", shapes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    for name in ("randn", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, make=make, **rest: make(*size, **rest | {"device": "cpu"}))
    path = tmp_path / "gpu-a-card.json"
    options = ["--seconds", seconds, "--generate", 0, "--configs", "v8-k16", "--tokens", "1,16", "--json", path]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, options)])
    gpu.main()
    told = capsys.readouterr().out
    result = json.loads(told.splitlines()[-1])
    assert result == json.loads(path.read_text())
    assert list(tmp_path.iterdir()) == [path]
    found = [(row["shape"], row["tokens"], row["served"]) for row in result["rows"]]
    if seconds:
        expected = [(1, "vector"), (16, "tiles")]
        assert found == [(shape, *what) for shape in ("32x64", "64x32") for what in expected]
        assert not result["left_out"]
    else:
        assert found == []
        assert "left out, the time was over: v8-k16 32x64, v8-k16 64x32" in told
    assert result["device"] == "A card"
    assert {"torch", "triton", "cuda", "commit", "peers", "peers_missing"} <= result.keys()


@pytest.mark.parametrize(
    ("fastest", "expected"),
    [
        ({1: "vector", 2: "tiles", 64: "tiles", 512: "dense"}, (0, 1, 64)),
        ({1: "vector", 2: "vector", 64: "dense", 512: "dense"}, (0, 2, 2)),
        ({1: "tiles", 2: "tiles", 64: "tiles", 512: "tiles"}, (0, 0, 512)),
        ({1: "cuda", 2: "cuda", 64: "tiles", 512: "dense"}, (2, 2, 64)),
    ],
)
def test_crossovers_are_where_the_sum_of_all_rows_turns(
    gpu: ModuleType, fastest: dict[int, str], expected: tuple[int, int, int]
) -> None:
    rows: list[dict[str, Any]] = []
    for tokens, best in fastest.items():
        times = {way: 1.0 if way == best else 3.0 for way in gpu.WAYS if tokens <= gpu.LIMITS.get(way, tokens)}
        other = dict.fromkeys(times, 2.0)  # a layer with no preference changes nothing
        rows += [{"tokens": tokens, "microseconds": times}, {"tokens": tokens, "microseconds": other}]
    assert tuple(gpu.crossovers(rows).values()) == expected


SMALL = {"blocks": 2, "hidden": 32, "inner": 48, "heads": 4, "kv_heads": 2, "vocabulary": 63, "context": 24}


def test_the_whole_model_is_a_llama(gpu: ModuleType) -> None:
    """With the same weights it says what transformers' Llama says."""
    import llama
    from model_zoo import tiny

    theirs = tiny("llama", rms_norm_eps=1e-6)
    ours = llama.Llama(llama.Shape(**SMALL), lambda width, rows: torch.nn.Linear(width, rows, bias=False))
    ours.load_state_dict(theirs.state_dict())
    prompt = torch.tensor([[5]])
    expected = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode():
        for token in (3, 5):  # a second sequence is not told of the first
            ours.restart(token)
            found = [int(ours.step()) for _ in range(20)]
    assert found == expected[0, 1:].tolist()


def test_whole_models_are_measured_together_and_apart(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama

    monkeypatch.setattr(shared_input, "_pays", lambda device: True)
    stored, served = {}, []
    operator = shared_input._linear_group
    monkeypatch.setattr(shared_input, "_linear_group", lambda *a: (served.append(len(a[2]) // 4), operator(*a))[1])
    for name in ("", "v8-k16"):
        row = llama.end_to_end(name, llama.Shape(**SMALL), 4, "cpu")
        assert row["tokens_per_second"] > 0
        assert ("apart_tokens_per_second" in row) == bool(name)
        stored[name] = row["stored_bytes"]
    assert stored["v8-k16"] < stored[""]
    assert served == [3, 2] * 2 * 5, "of two blocks, in four steps and one to begin with"


def test_rows_of_whole_models_are_compared_with_float16(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {"": 50.0, "a": 100.0, "b": 25.0}

    def end_to_end(name: str, *_: Any) -> dict[str, Any]:
        return {"config": name, "tokens_per_second": speed[name], "memory_bytes": 1e9, "memory_over_stored": 1.0}

    monkeypatch.setattr(gpu, "end_to_end", end_to_end)
    rows = gpu.whole_models(["a", "b"], 10, None, lambda: True)
    assert [row["times_fp16"] for row in rows] == [1.0, 2.0, 0.5]
    assert gpu.whole_models(["a"], 0, None, lambda: True) == []
    assert gpu.whole_models(["a"], 10, None, lambda: False) == []
