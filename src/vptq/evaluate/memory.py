"""The most memory a process has needed, and a model measured in a process of its own.

Two models in one process cannot be told apart, and a peak never comes down again. So the benchmark runs this module,
`python -m vptq.evaluate.memory`, once a model: it loads, generates a little, and prints the peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vptq.errors import VPTQError
from vptq.quantize.memory import peak_memory_bytes as resident_peak_bytes


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held at once: on a GPU that of its tensors there, on a CPU all of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident_peak_bytes()


def peak_of_model(model: str | Path, **settings: Any) -> int:
    """Most memory that a fresh process needs for loading a model and generating with it, in bytes.

    Args:
        model: Hub id, local folder, or GGUF file.
        **settings: prompt_tokens, new_tokens, threads, and device, dtype and codebook_form (text) to load it with.

    Raises:
        VPTQError: The process has failed.
    """
    request = json.dumps({"model": str(model), **settings})
    command = [sys.executable, "-m", "vptq.evaluate.memory", request]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
        raise VPTQError(f"the process that was to measure the memory of {model} has failed: {last}")
    return int(done.stdout.split()[-1])


def _measure(model: str, prompt_tokens: int, new_tokens: int, threads: int, **loading: str) -> int:
    from vptq.evaluate.throughput import generate_timed, load

    torch.set_num_threads(threads)
    loaded = load(model, **loading)
    generate_timed(loaded, prompt_tokens, new_tokens)
    return peak_memory_bytes(loaded.device)


if __name__ == "__main__":
    print(_measure(**json.loads(sys.argv[1])))  # noqa: T201
