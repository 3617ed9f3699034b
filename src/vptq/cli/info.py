"""`vptq info`: what is in a quantized folder, or what a spec would cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from vptq.cli.console import by_number, check_picture_file, facts, file_size, output, plain_table, print_warning
from vptq.cli.index_use import show_index_use
from vptq.cli.progress import waiting
from vptq.errors import ConfigError

if TYPE_CHECKING:
    from vptq.checkpoint import Checkpoint
    from vptq.config import LayerConfig
    from vptq.quantize.report import Report
    from vptq.spec import QuantSpec

# Square layers of today's models, small to large: what codebooks add to the indices depends on the layer's size alone.
EXAMPLE_WIDTHS = (1024, 2048, 4096, 8192)
_PARAMETERS = re.compile(r"(?:^|[-_/])(?P<count>\d+(?:\.\d+)?)(?P<unit>[BbMm])(?=[-_]|$)")


def info(
    target: Annotated[
        str,
        typer.Argument(
            metavar="DIR|NAME|SPEC",
            help="A quantized folder, the name of a published model, or a spec.",
        ),
    ],
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Show a folder's table of layers.")] = True,
    indices: Annotated[
        bool, typer.Option("--indices", help="Show instead how often a folder's centroids are used, and which never.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw what --indices shows to this file (PNG).")
    ] = None,
) -> None:
    """Show bits, size and codebooks of a folder, name or spec."""
    if picture is not None:
        if not indices:
            raise typer.BadParameter("it draws what --indices shows; give both", param_hint="--picture")
        check_picture_file(picture, "--picture")
    folder = Path(target).expanduser()
    if folder.is_dir() and indices:
        show_index_use(folder, picture)
        return
    if folder.is_dir():
        _show_folder(folder, layers)
        return
    if target.startswith((".", "/", "~")):
        raise ConfigError(f"there is no folder {target}; give a quantized folder, a model's name or a spec")
    if indices:
        raise ConfigError(f"--indices counts those of a quantized folder, and there is none at {target}")
    from vptq.spec import QuantSpec

    _show_spec(QuantSpec.parse(target), target)


def _show_spec(spec: QuantSpec, name: str) -> None:
    console = output()
    rows = {"spec": spec.name, "index bits per weight": f"{spec.index_bits_per_weight:.4g}", **_codebooks(spec)}
    if (parameters := _parameters_in(name)) is not None:
        size = parameters * spec.index_bits_per_weight / 8
        rows["size"] = (
            f"about {file_size(size)} for {parameters / 1e9:g}B weights, {file_size(2 * parameters)} in 16 bits "
            "(indices alone, as if every weight were quantized)"
        )
    console.print(facts(rows))
    console.print()
    table = plain_table("layer", "codebooks", "indices", "bits per weight")
    for width in EXAMPLE_WIDTHS:
        layer = spec.for_layer(width, width)
        table.add_row(f"{width} x {width}", *_sizes(layer), f"{layer.bits_per_weight:.3f}")
    console.print(table)


def _codebooks(spec: QuantSpec) -> dict[str, str]:
    groups = f" in each of {spec.num_groups} column groups" if spec.num_groups > 1 else ""
    rows = {"vector length": str(spec.vector_len), "main codebook": f"{spec.num_centroids:,} centroids{groups}"}
    if spec.num_residual_centroids:
        rows["residual codebook"] = f"{spec.num_residual_centroids:,} centroids{groups}"
    if spec.outlier_num_centroids:
        rows["outlier codebook"] = (
            f"{spec.outlier_num_centroids:,} centroids of length {spec.outlier_vector_len} "
            f"for {spec.outlier_percent:g}% of the columns"
        )
    return rows


def _sizes(layer: LayerConfig) -> tuple[str, str]:
    """Bytes of a layer's codebooks (with everything else that is in floats), and of its indices (with perm)."""
    import torch

    from vptq.config import tensor_specs

    specs = tensor_specs(layer, torch.float16)
    floats = sum(spec.bits for name, spec in specs.items() if spec.dtype == torch.float16 and name != "bias")
    return file_size(floats / 8), file_size((layer.stored_bits - floats) / 8)


def _parameters_in(name: str) -> float | None:
    """Parameters a model's name claims: 70e9 in "Meta-Llama-3.1-70B-Instruct-v8-k65536-256-woft"."""
    match = _PARAMETERS.search(name)
    if match is None:
        return None
    return float(match["count"]) * (1e9 if match["unit"] in "Bb" else 1e6)


def _show_folder(folder: Path, with_layers: bool) -> None:
    with waiting("reading"):
        from vptq.checkpoint import Checkpoint
        from vptq.naming import contradictions
        from vptq.quantize.report import load_report

        checkpoint = Checkpoint.open(folder)
        layers = checkpoint.layers()
        report = load_report(folder)
    for line in contradictions(folder.resolve().name, layers):
        print_warning(line)
    console = output()
    console.print(facts(_folder_facts(checkpoint, layers, report)))
    if with_layers:
        console.print()
        console.print(_layer_table(layers, report))


def _folder_facts(checkpoint: Checkpoint, layers: Mapping[str, LayerConfig], report: Report | None) -> dict[str, str]:
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    stored = sum(layer.stored_bits for layer in layers.values())
    files = sum(path.stat().st_size for path in set(checkpoint.files.values()))
    rows = {
        "folder": str(checkpoint.folder),
        "layers": f"{len(layers)} quantized, {weights:,} weights",
        "codebooks": "; ".join(f"{count} x {words}" for words, count in _forms(layers).items()),
        "bits per weight": f"{stored / weights:.3f}" if weights else "no quantized weights",
        "linear layers": f"{file_size(stored / 8)}, {file_size(2 * weights)} in 16 bits",
        "files": file_size(files),
    }
    if report is not None:
        rows |= {
            "original": report.model,
            "calibration": report.calibration,
            "mean proxy loss": f"{report.mean_loss:.3%}",
        }
    return rows


def _forms(layers: Mapping[str, LayerConfig]) -> dict[str, int]:
    """How many layers have the same codebooks, by a short description of those."""
    forms: dict[str, int] = {}
    for layer in layers.values():
        words = form(layer)
        forms[words] = forms.get(words, 0) + 1
    return forms


def form(layer: LayerConfig) -> str:
    """The codebooks and options of a layer in a few words."""
    parts = [f"v{layer.vector_len}-k{layer.num_centroids}"]
    if layer.has_residual:
        parts.append(str(layer.num_residual_centroids))
    if layer.num_groups > 1:
        parts.append(f"g{layer.num_groups}")
    text = "-".join(parts)
    if layer.has_outliers:
        text += f" + {layer.outlier_size} outlier columns v{layer.outlier_vector_len}-k{layer.outlier_num_centroids}"
    extras = [name for name, on in (("norm", layer.enable_norm), ("perm", layer.enable_perm)) if on]
    extras += [] if layer.is_packed else ["unpacked"]
    return text + (f" ({', '.join(extras)})" if extras else "")


def _layer_table(layers: Mapping[str, LayerConfig], report: Report | None) -> Table:
    losses = {} if report is None else {layer.name: layer.loss for layer in report.layers}
    # Columns that say the same in every row, or nothing, only take room away from the names.
    mixed = len(_forms(layers)) > 1
    table = plain_table(
        *("layer", "out x in"),
        *(["codebooks"] if mixed else []),
        *("size", "bits"),
        *(["proxy loss"] if losses else []),
    )
    for name, layer in sorted(layers.items(), key=lambda item: by_number(item[0])):
        cells = [name, f"{layer.out_features} x {layer.in_features}"]
        cells += [form(layer)] if mixed else []
        cells += [file_size(layer.stored_bits / 8), f"{layer.bits_per_weight:.3f}"]
        if losses:
            cells.append(f"{losses[name]:.3%}" if name in losses else "")
        table.add_row(*cells)
    return table
