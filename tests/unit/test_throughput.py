"""What a benchmark reports follows from what it timed and counted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny

from vptq.cli import main
from vptq.errors import ConfigError, VPTQError
from vptq.evaluate import throughput
from vptq.evaluate.memory import peak_of_model
from vptq.evaluate.throughput import generate_timed, measure_throughput, memory_bandwidth, weight_bytes_per_token
from vptq.streaming import TokenTimes


def test_speed_counts_the_tokens_after_the_first() -> None:
    clock = TokenTimes()
    for _ in range(2):  # the prompt and one token
        clock.put(torch.ones(1))
    assert (len(clock._times), clock.tokens_per_second) == (1, 0.0)
    clock._times = [10.0, 10.5, 11.0, 12.0]
    assert clock.tokens_per_second == pytest.approx(3 / 2)


def test_exactly_the_tokens_asked_for_are_generated_and_cached() -> None:
    model = tiny("llama")
    for new_tokens in (2, 5):
        timing = generate_timed(model, prompt_tokens=7, new_tokens=new_tokens)
        # Keys and values of 2 blocks with 2 heads of 8 float32, of every token but the last, which is never run.
        assert timing.cache_bytes == 2 * 2 * 2 * 8 * 4 * (7 + new_tokens - 1)
        assert timing.first_token_seconds > 0
        assert timing.tokens_per_second > 0


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gpt_neox", False), ("gemma2", True)])
def test_a_token_reads_all_weights_but_one_row_of_an_input_embedding(family: str, tied: bool) -> None:
    model = tiny(family)
    stored = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    table = 63 * 32 * 4
    assert weight_bytes_per_token(model) == (stored if tied else stored - table + 32 * 4)


def test_bandwidth_counts_two_reads_and_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "TRIAD_BYTES", 1 << 20)
    ticks = iter(range(100))
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(ticks))
    assert memory_bandwidth(torch.device("cpu")) == 3 * (1 << 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"new_tokens": 1}, "new_tokens is 1"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"prompt_tokens": 250, "new_tokens": 7}, "256 tokens"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_loaded(
    settings: dict[str, Any], message: str, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "peak_of_model", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(ConfigError, match=message):
        measure_throughput(tiny_model_folder, **settings)


def test_a_process_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(VPTQError, match=r"^the process that was to measure[^\n]*no model at[^\n]*$"):
        peak_of_model(
            tmp_path / "none", prompt_tokens=2, new_tokens=2, threads=1, device="cpu", dtype="auto", codebook_form=""
        )


def test_the_command_measures_both_models_and_writes_what_it_prints(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "TRIAD_BYTES", 1 << 20)
    order: list[Any] = []
    generate: Callable[..., Any] = throughput.generate_timed

    def spy(model: Any, *arguments: Any) -> Any:
        order.append(model)
        return generate(model, *arguments)

    monkeypatch.setattr(throughput, "generate_timed", spy)
    figures = tmp_path / "bench.json"
    arguments = ["--prompt-tokens", "8", "--tokens", "3", "--rounds", "2", "--threads", "1", "--device", "cpu"]
    folder = str(tiny_model_folder)
    with pytest.raises(SystemExit) as caught:
        main(["bench", folder, "--reference", folder, "--json", str(figures), *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 0, captured.err
    assert len(order) == 6, "a round to warm up and two that count, of two models"
    assert order[0] is not order[1]
    assert order == order[:2] * 3, "the models take turns"
    measured = json.loads(figures.read_text())
    assert (measured["prompt_tokens"], measured["new_tokens"], measured["rounds"], measured["threads"]) == (8, 3, 2, 1)
    for speed in (measured["model"], measured["reference"]):
        assert speed["prefill_tokens_per_second"] * speed["first_token_seconds"] == pytest.approx(8)
        bound = measured["bandwidth_bytes_per_second"] / speed["bytes_per_token"]
        assert speed["bound_tokens_per_second"] == pytest.approx(bound)
        assert speed["share_of_bound"] * bound == pytest.approx(speed["decode_tokens_per_second"])
        assert speed["peak_memory_bytes"] > 100e6, "a process with torch in it"
        assert f"{speed['decode_tokens_per_second']:.2f} tokens/s" in captured.out
