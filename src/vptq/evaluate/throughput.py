"""How fast a model generates, beside the original, and how near that comes to what the memory allows.

    from vptq.evaluate.throughput import measure_throughput

    result = measure_throughput("smol-2bit", reference="HuggingFaceTB/SmolLM2-135M-Instruct")
    print(result.model.decode_tokens_per_second, result.model.share_of_bound)

What is timed is transformers' generate() as everybody calls it: one sequence, greedy, the default cache. The two models
take turns, so that whatever else the machine does slows both; figures are medians over rounds, after one to warm up.

Every new token reads all weights once, whatever the arithmetic, so memory bandwidth over bytes per token bounds tokens
per second. Bandwidth is that of `a = b + s * c` over arrays no cache holds, by the same threads, counted as STREAM does
(two reads and a write); pure reading can be a little faster than that. In a mixture of experts a token reads only some
of them, and all are counted: its share of the bound comes out too high.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vptq.download import download
from vptq.errors import ConfigError
from vptq.evaluate.memory import peak_of_model
from vptq.progress import ProgressCallback, ProgressEvent, ignore
from vptq.sampling import Sampling
from vptq.streaming import TokenTimes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIAD_BYTES = 1 << 28  # an array; last-level caches are smaller
TRIAD_ROUNDS = 6
MEMORY_TOKENS = 2  # peaks come with loading and with the prompt


@dataclass(frozen=True)
class Speed:
    """Figures of one model.

    Attributes:
        model: Which.
        dtype: Its float type.
        first_token_seconds: From a prompt to its first new token.
        prefill_tokens_per_second: Tokens of the prompt over that time.
        decode_tokens_per_second: New tokens after the first.
        peak_memory_bytes: Of a process that loads it and generates; on a GPU of the tensors there.
        bytes_per_token: Weights and cache that one new token reads.
        bound_tokens_per_second: Memory bandwidth over that.
        share_of_bound: Decoding speed over the bound.
    """

    model: str
    dtype: str
    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    bytes_per_token: int
    bound_tokens_per_second: float
    share_of_bound: float


@dataclass(frozen=True)
class Throughput:
    """What was measured, and on what.

    Attributes:
        model: The model's figures.
        reference: The original's; None without one.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated.
        rounds: Timed runs of each model.
        device: Where.
        threads: Of the CPU.
        bandwidth_bytes_per_second: Of that device's memory.
    """

    model: Speed
    reference: Speed | None
    prompt_tokens: int
    new_tokens: int
    rounds: int
    device: str
    threads: int
    bandwidth_bytes_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; the keys are always the same."""
        return asdict(self)


def measure_throughput(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    codebook_form: str = "",
    progress: ProgressCallback | None = None,
) -> Throughput:
    """Measure how fast a model generates, beside the original if given.

    Args:
        model: Hub id, local folder, or GGUF file.
        reference: The original model, likewise.
        prompt_tokens: Length of the prompt, which is random tokens.
        new_tokens: How many to generate, at least 2.
        rounds: Timed runs of each model.
        threads: Of the CPU; None for torch's own choice.
        device: Where to load models: "auto" (a GPU if there is one), or a torch device.
        dtype: Name of the float type to load models in; "auto" is the one each is stored in.
        codebook_form: As for `vptq.AutoModelForCausalLM.from_pretrained`.
        progress: Told what is loaded, and about every round.

    Raises:
        ConfigError: A setting is impossible, a model does not exist, or its context is too short for all these tokens.
        VPTQError: A model cannot be loaded or run.
    """
    names = [model] if reference is None else [model, reference]
    _check_settings(names, prompt_tokens, new_tokens, rounds, threads)
    tell = progress or ignore
    for name in names:
        download(name, tell)
    loading = {"device": device, "dtype": dtype, "codebook_form": codebook_form}
    with _threads(threads) as count:
        peaks: list[int] = []
        for name in names:
            tell(ProgressEvent("measuring memory", len(peaks), len(names)))
            tokens = {"prompt_tokens": prompt_tokens, "new_tokens": MEMORY_TOKENS}
            peaks.append(peak_of_model(name, **tokens, threads=count, **loading))
        models = []
        for name in names:
            tell(ProgressEvent(f"loading {name}"))
            models.append(load(name, **loading))
        tell(ProgressEvent("measuring memory bandwidth"))
        bandwidth = memory_bandwidth(models[0].device)
        timed: list[list[Timing]] = [[] for _ in models]
        for round_number in range(rounds + 1):
            tell(ProgressEvent("timing", round_number, rounds + 1))
            for timings, loaded in zip(timed, models, strict=True):
                timings.append(generate_timed(loaded, prompt_tokens, new_tokens))
    speeds = [
        _speed(str(name), loaded, timings[1:], peak, prompt_tokens, bandwidth)
        for name, loaded, timings, peak in zip(names, models, timed, peaks, strict=True)
    ]
    return Throughput(
        *(speeds[0], speeds[1] if reference is not None else None, prompt_tokens, new_tokens, rounds),
        *(str(models[0].device), count, bandwidth),
    )


@dataclass(frozen=True)
class Timing:
    """One run of generate(): seconds to the first token, tokens/s after it, bytes in the cache at the end."""

    first_token_seconds: float
    tokens_per_second: float
    cache_bytes: int


def load(model: str | Path, device: str, dtype: str, codebook_form: str) -> PreTrainedModel:
    """Load a model as it is measured."""
    from vptq.model import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, device_map=device, dtype=dtype, codebook_form=codebook_form)


@torch.inference_mode()
def generate_timed(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> Timing:
    """Generate exactly `new_tokens` after a random prompt, and time it."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(model.device)
    generator: Any = model  # nn.Module.__getattr__ hides the mixin's method from the type checker
    times = TokenTimes()
    output = generator.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=times,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        return_dict_in_generate=True,
        **Sampling(temperature=0.0).generate_arguments(),
    )
    return Timing(times.first_token_seconds, times.tokens_per_second, _cache_bytes(output.past_key_values))


def weight_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that one token reads: all, but of the input embedding a single row.

    An embedding that is the output head as well is read whole.
    """
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    of: Any = model  # whose embeddings the type checker takes for any module
    embedding, head = of.get_input_embeddings(), of.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        return total
    return int(total - embedding.weight.nbytes + embedding.weight[0].nbytes)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second of the fastest of a few triads `a = b + s * c`, by as many threads as torch has."""
    a, b, c = (torch.ones(TRIAD_BYTES // 4, device=device) for _ in range(3))
    seconds = []
    for _ in range(TRIAD_ROUNDS):
        _synchronize(device)
        began = time.perf_counter()
        torch.add(b, c, alpha=3.0, out=a)
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 3 * TRIAD_BYTES / min(seconds)


def _speed(
    name: str, model: PreTrainedModel, timings: list[Timing], peak: int, prompt_tokens: int, bandwidth: float
) -> Speed:
    first = statistics.median(timing.first_token_seconds for timing in timings)
    decode = statistics.median(timing.tokens_per_second for timing in timings)
    bytes_per_token = weight_bytes_per_token(model) + timings[-1].cache_bytes
    return Speed(
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        first_token_seconds=first,
        prefill_tokens_per_second=prompt_tokens / first,
        decode_tokens_per_second=decode,
        peak_memory_bytes=peak,
        bytes_per_token=bytes_per_token,
        bound_tokens_per_second=bandwidth / bytes_per_token,
        share_of_bound=decode * bytes_per_token / bandwidth,
    )


def _check_settings(
    names: list[str | Path], prompt_tokens: int, new_tokens: int, rounds: int, threads: int | None
) -> None:
    from vptq.source import load_config

    least = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2), "rounds": (rounds, 1)}
    for what, (value, minimum) in (least | ({} if threads is None else {"threads": (threads, 1)})).items():
        if value < minimum:
            raise ConfigError(f"{what} is {value}; it must be at least {minimum}")
    for name in names:
        context = getattr(load_config(name).get_text_config(), "max_position_embeddings", None)
        if context is not None and prompt_tokens + new_tokens > context:
            raise ConfigError(
                f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones do not fit the context of {name}, "
                f"{context} tokens; ask for fewer"
            )


def _cache_bytes(cache: Any) -> int:
    """Keys and values; what caches of another kind hold is not counted."""
    tensors = (getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """As many threads as asked for, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)
