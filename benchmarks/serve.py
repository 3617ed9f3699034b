"""How long `vptq serve` lets people wait, and whether it loses any: many requests through the official client.

    python benchmarks/serve.py DIR [--requests 100] [--concurrency 8] [--tokens 32] [--prompt TEXT] [--json FILE]

Starts a server on a free port of this machine and asks for streamed completions of exactly so many tokens unless the
model ends one before, some at a time. Then as many are asked as wait at a time, and the server is told to stop when the
first has begun: all have to be answered to their end. Seconds are those of the client: to the first text, which
includes waiting for one's turn, and to the end. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from vptq.shards import write_json


@dataclass(frozen=True)
class Timing:
    """One request: seconds to the first text and to the end, and tokens of the answer."""

    first: float
    whole: float
    tokens: int


async def ask(
    client: openai.AsyncOpenAI, model: str, prompt: str, tokens: int, begun: asyncio.Event | None = None
) -> Timing:
    began, first, usage = time.perf_counter(), None, None
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].text:
            first = time.perf_counter() - began
            if begun is not None:
                begun.set()
        usage = chunk.usage or usage
    whole = time.perf_counter() - began
    assert usage is not None
    return Timing(first or whole, whole, usage.completion_tokens)


async def ask_all(url: str, arguments: argparse.Namespace) -> list[Timing | BaseException]:
    client = openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=3600)
    model = (await client.models.list()).data[0].id
    turn = asyncio.Semaphore(arguments.concurrency)

    async def one(number: int) -> Timing:
        async with turn:
            return await ask(client, model, f"{number}. {arguments.prompt}", arguments.tokens)

    await ask(client, model, arguments.prompt, 2)  # warms up
    return await asyncio.gather(*map(one, range(arguments.requests)), return_exceptions=True)


async def ask_while_it_stops(
    url: str, server: subprocess.Popen[str], arguments: argparse.Namespace
) -> list[Timing | BaseException]:
    client = openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=3600)
    model, begun = (await client.models.list()).data[0].id, asyncio.Event()
    asked = [
        asyncio.create_task(ask(client, model, f"{number}. {arguments.prompt}", arguments.tokens, begun))
        for number in range(arguments.concurrency)
    ]
    await begun.wait()
    server.send_signal(signal.SIGTERM)
    return await asyncio.gather(*asked, return_exceptions=True)


def percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


def start(arguments: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    """A server in a process of its own, and its address, once it says that it is there."""
    command = [sys.executable, "-m", "vptq", "serve", str(arguments.folder), "--port", "0"]
    command += ["--queue", str(arguments.concurrency)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://\S+/v1", line):
            return server, found[0]
        print(line, end="", file=sys.stderr)
    raise SystemExit("the server did not start")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    server, url = start(arguments)
    try:
        began = time.perf_counter()
        timings = asyncio.run(ask_all(url, arguments))
        seconds = time.perf_counter() - began
        last = asyncio.run(ask_while_it_stops(url, server, arguments))
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()
    errors = [str(outcome) for outcome in timings if isinstance(outcome, BaseException)]
    lost = [str(outcome) for outcome in last if isinstance(outcome, BaseException)]
    print(*errors, *lost, sep="\n", file=sys.stderr)
    timings = [outcome for outcome in timings if isinstance(outcome, Timing)]
    first, whole = [timing.first for timing in timings], [timing.whole for timing in timings]
    tokens = sum(timing.tokens for timing in timings)
    return {
        "benchmark": "serve",
        "model": arguments.folder.name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "note": arguments.note,
        "requests": arguments.requests,
        "errors": len(errors),
        "concurrency": arguments.concurrency,
        "asked_while_stopping": len(last),
        "lost_while_stopping": len(lost),
        "exit_status": server.returncode,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "first_text_p50": percentile(first, 50),
        "first_text_p95": percentile(first, 95),
        "answer_p50": percentile(whole, 50),
        "answer_p95": percentile(whole, 95),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a quantized model")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--note", default="", help="about the machine, for the file")
    arguments = parser.parse_args()
    result = measure(arguments)
    if arguments.json:
        write_json(arguments.json, {"rows": [result]})
    for key, value in result.items():
        print(f"{key:20} {value:.3f}" if isinstance(value, float) else f"{key:20} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
