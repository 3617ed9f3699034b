"""report.html: complete in itself, every layer in its place, and nothing a model's name could break."""

from __future__ import annotations

import math
import re

import pytest
import torch

from vptq.index_use import CodebookUse
from vptq.quantize.page import report_page
from vptq.quantize.report import LayerReport, Report

KINDS = ("q_proj", "up_proj")


def a_report(blocks: int = 3, **changes: object) -> Report:
    layers = [
        LayerReport(
            name=f"model.layers.{block}.mlp.{kind}",
            entry={"in_features": 32, "out_features": 48},
            bits_per_weight=2 + 0.25 * number,
            losses={"k-means": 0.2, "feedback": 0.01 * (block + 1) * (number + 1)},
            seconds=1.0,
            damping=0.01,
        )
        for block in range(blocks)
        for number, kind in enumerate(KINDS)
    ]
    settings: dict[str, object] = {
        **{"model": "tiny", "spec": "v4-k16", "bits_per_weight": 2.125, "layers": layers, "seconds": 100.0, "seed": 0},
        **{"peak_memory_bytes": 10**9, "calibration": "text", "quantized_weights": 10**6, "total_weights": 3 * 10**6},
        "stage_seconds": {"sampling calibration text": 30.0, "quantizing layers": 60.0},
    }
    return Report(**(settings | changes))  # type: ignore[arg-type]


def cells(page: str, section: str) -> list[tuple[str, str]]:
    """Color and title of each cell in a section's maps."""
    part = page.partition(f"<h2>{section}</h2>")[2].partition("<h2>")[0]
    return re.findall(r'fill="(#\w{6})"><title>([^<]*)</title>', part)


def test_nothing_is_fetched_and_nothing_runs() -> None:
    page = report_page(a_report())
    assert not re.search(r"https?:|//|src=|href=|url\(|@import|<script", page)
    assert len(page) < 20_000


def test_every_layer_is_in_every_map_darker_where_there_is_more() -> None:
    report = a_report()
    losses, bits = (cells(report_page(report), section) for section in ("Loss by layer", "Bits by layer"))
    for layer, (_, loss), (_, bit) in zip(report.layers, losses, bits, strict=True):
        assert loss == f"{layer.name}: {layer.loss:.3%}"
        assert bit == f"{layer.name}: {layer.bits_per_weight:.3f} bits"
    darkness = [-int(color[1:3], 16) for color, _ in losses]
    by_loss = sorted(range(len(darkness)), key=lambda index: report.layers[index].loss)
    assert [darkness[index] for index in by_loss] == sorted(darkness)
    assert len(set(darkness)) == len({layer.loss for layer in report.layers})


def test_the_worst_expert_stands_for_those_of_its_block() -> None:
    report = a_report(1)
    names = [f"model.layers.0.experts.{number}.up_proj" for number in range(3)]
    report.layers = [
        LayerReport(name, {}, 2.0, {"feedback": loss}, 1.0, 0.0)
        for name, loss in zip(names, (0.1, 0.3, 0.2), strict=True)
    ]
    assert [title for _, title in cells(report_page(report), "Loss by layer")] == [f"{names[1]}: 30.000%"]


def test_sizes_are_those_of_the_files() -> None:
    page = report_page(a_report())
    assert "6.0 MB, linear layers 2.0 MB" in page
    assert "4.3 MB, linear layers 0.3 MB" in page, "10^6 weights at 2.125 bits, 2 x 10^6 in 16"


def test_time_and_stages_have_their_figures() -> None:
    page = report_page(a_report())
    for text in ("sampling calibration text", "30.0 s", "1 min 0 s", "1 min 40 s", "k-means", "20.000%", "2.000%"):
        assert text in page


@pytest.mark.parametrize("kinds", [("main",), ("main", "residual")])
def test_index_use_has_a_map_for_each_kind_of_codebook(kinds: tuple[str, ...]) -> None:
    counts = torch.tensor([[4, 4, 4, 0]])
    uses = [CodebookUse(layer.name, kind, counts) for layer in a_report().layers for kind in kinds]
    page = report_page(a_report(), iter(uses))
    found = cells(page, "Use of indices")
    assert len(found) == len(uses)
    assert all(title.endswith(f"entropy {math.log2(3):.2f} of 2 bits, 1 of 4 dead") for _, title in found)
    assert f"{len(uses)} of {4 * len(uses)} centroids are used by no vector" in page
    assert "Use of indices" not in report_page(a_report())


def test_names_are_text_and_broken_layers_are_left_out() -> None:
    report = a_report(model="<script>alert(1)</script>", warnings=["<b>"])
    report.layers[0].losses["feedback"] = math.nan
    page = report_page(report)
    assert "<script" not in page
    assert "<b>" not in page
    assert len(cells(page, "Loss by layer")) == len(report.layers) - 1


def test_a_report_without_layers_is_a_page_too() -> None:
    assert "nothing to show" in report_page(a_report(0, stage_seconds={}))
