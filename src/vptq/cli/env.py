"""`vptq env`: what a bug report should say about the machine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vptq.cli.console import facts, file_size, output, plain_table
from vptq.extras import EXTRAS, install_command, installed_version

PACKAGES = {"torch": "", "transformers": "", "safetensors": "", "accelerate": "", "tokenizers": "", "triton": ""}
PACKAGES |= {"cuda-core": "cuda", "datasets": "data", "matplotlib": "plot", "gguf": "gguf", "vllm": "vllm"}


def env(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR]", help="A quantized folder, to show which kernel serves which of its layers."),
    ] = None,
) -> None:
    """Show versions, devices, and kernels, and why each is used."""
    import vptq

    served = None if folder is None else _served(folder)
    console = output()
    console.print(facts({"vptq": vptq.__version__, "python": platform.python_version(), "system": platform.platform()}))
    console.print()
    console.print(facts({package: _version(package, extra) for package, extra in PACKAGES.items()}))
    console.print()
    console.print(facts(_devices()))
    console.print()
    from vptq.ops import backends

    table = plain_table("backend", "state", "why")
    table.columns[1].justify = table.columns[2].justify = "left"
    for backend in backends():
        state = "[green]in use[/green]" if backend.active else "[yellow]not used[/yellow]"
        table.add_row(backend.name, state, backend.reason)
    console.print(table)
    if served is not None:
        console.print()
        console.print(served)


def _served(folder: Path) -> Table:
    """A folder's layers by kind, and the kernels for each kind by the number of tokens."""
    from vptq.checkpoint import Checkpoint
    from vptq.cli.info import form
    from vptq.ops.serving import serving

    checkpoint = Checkpoint.open(folder.expanduser())
    kinds: dict[str, list[str]] = {}
    ways = {}
    for name, layer in checkpoint.layers().items():
        dtype = checkpoint.headers[f"{name}.centroids.weight"].dtype
        kind = f"{form(layer)}, {str(dtype).removeprefix('torch.')}"
        kinds.setdefault(kind, []).append(name)
        ways[kind] = serving(layer, dtype)
    table = plain_table("layers", "count", "tokens", "kernel", "why")
    for column in table.columns[3:]:
        column.justify = "left"
    for kind, names in kinds.items():
        for row, way in enumerate(ways[kind]):
            table.add_row(*((kind, str(len(names))) if row == 0 else ("", "")), *way)
    return table


def _version(package: str, extra: str) -> str:
    missing = f"not installed ({EXTRAS[extra]}: {install_command(extra)})" if extra else "not installed"
    return installed_version(package) or missing


def _devices() -> dict[str, str]:
    import torch

    rows = {"cpu": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows[f"cuda:{index}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{file_size(properties.total_memory)}"
        )
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        rows["cuda"] = "no device that this torch can use" if built else "this torch is built without it"
    return rows


def _cpu_name() -> str:
    """The model name: /proc says it on Linux, where `platform` knows only the architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
