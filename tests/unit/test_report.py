"""The report as JSON, as a plot, and as a model card."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vptq.errors import CheckpointError
from vptq.quantize.card import model_card, save_card
from vptq.quantize.report import LayerReport, Report, load_report, save_report

losses = st.floats(1e-6, 10)
layers = st.builds(
    LayerReport,
    name=st.from_regex(r"model\.layers\.[0-9]{1,2}\.(q|down)_proj", fullmatch=True),
    entry=st.just({"in_features": 32, "out_features": 48}),
    bits_per_weight=st.floats(1, 5),
    losses=st.dictionaries(st.sampled_from(["k-means", "feedback", "refit"]), losses),
    seconds=st.floats(0, 1e4),
    damping=st.floats(0, 1),
)


def a_report(*layer_losses: dict[str, float]) -> Report:
    return Report(
        model="tiny",
        spec="v8-k4096-256",
        bits_per_weight=2.75,
        layers=[
            LayerReport(
                name=f"model.layers.{index}.mlp.up_proj",
                entry={"in_features": 32, "out_features": 48},
                bits_per_weight=2.75,
                losses=loss,
                seconds=1.5,
                damping=0.01,
            )
            for index, loss in enumerate(layer_losses)
        ],
        seconds=3723,
        peak_memory_bytes=123456789,
        calibration="4 x 64 tokens of text.txt",
        seed=11,
        quantized_weights=3072,
        total_weights=6144,
        skipped={"lm_head.weight": "output embedding"},
        warnings=["layer 1 looks broken"],
        hessian_inputs="quantized",
        rotated=True,
    )


@given(st.lists(layers, max_size=5))
def test_json_gives_the_same_report_back(some: list[LayerReport]) -> None:
    report = dataclasses.replace(a_report(), layers=some)
    read = Report.from_json(report.to_json())
    assert read == report
    assert list(read.mean_losses) == list(report.mean_losses)


def test_losses_are_averaged_over_the_layers_that_have_them() -> None:
    report = a_report({"k-means": 0.4, "refit": 0.2}, {"k-means": 0.2, "refit": 0.1}, {"k-means": 0.3})
    assert report.mean_losses == pytest.approx({"k-means": 0.3, "refit": 0.15})
    assert report.mean_loss == pytest.approx((0.2 + 0.1 + 0.3) / 3), "the last stage of each layer counts"
    assert report.layers[0].shape == (48, 32)
    assert math.isnan(a_report().mean_loss)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 999}', '{"version": 1}', '{"version": 1, "mean_loss": 0}']
)
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError):
        Report.from_json(text)


def test_a_folder_gets_json_and_plot_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = a_report({"k-means": 0.4, "refit": 0.2}, {"k-means": 0.3, "refit": math.nan}, {})
    assert load_report(tmp_path) is None
    save_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.png"]
    png = (tmp_path / "report.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    assert json.loads((tmp_path / "report.json").read_text())["seed"] == 11
    save_report(report, tmp_path)
    assert (tmp_path / "report.png").read_bytes() == png, "the same report must give the same bytes"


def test_an_empty_report_is_drawn_as_well(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_report(a_report(), tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 0


def test_without_matplotlib_there_is_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "vptq.quantize.plot", raising=False)
    save_report(a_report({"refit": 0.2}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    for save in (save_report, save_card):
        with pytest.raises(CheckpointError, match=r"cannot write the .* to .*missing"):
            save(a_report(), tmp_path / "missing")


def test_the_card_states_what_the_report_knows(tmp_path: Path) -> None:
    report = a_report({"refit": 0.02}, {"refit": 0.04})
    save_card(report, tmp_path, base_model="org/tiny", measured={"perplexity (text.txt)": "12.3"})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card == model_card(report, "org/tiny", {"perplexity (text.txt)": "12.3"})
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: org/tiny" in card
    for fact in (
        *("`v8-k4096-256`", "2.750 bits per weight", "4 x 64 tokens of text.txt", "| seed | 11 |", "3.000%"),
        *("4.000% (model.layers.1.mlp.up_proj)", "3,072 of 6,144 (50.0%)", "| perplexity (text.txt) | 12.3 |"),
        "| Hessians of inputs in | the quantized model |",
        "| rotations | of the residual stream and the heads, folded into the weights |",
        *("1 h 2 min", "- layer 1 looks broken", "AutoModelForCausalLM.from_pretrained"),
    ):
        assert fact in card
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_of_hessian_files_nobody_knows_whose_inputs_they_saw() -> None:
    assert "Hessians of" not in model_card(dataclasses.replace(a_report(), hessian_inputs=""))


def test_a_model_that_was_not_rotated_has_a_card_without_rotations() -> None:
    assert "rotations" not in model_card(dataclasses.replace(a_report(), rotated=False))


def test_a_report_from_before_inputs_and_rotations_were_noted_is_read() -> None:
    stored = json.loads(a_report().to_json())
    del stored["hessian_inputs"], stored["rotated"]
    assert Report.from_json(json.dumps(stored)) == dataclasses.replace(a_report(), hessian_inputs="", rotated=False)


def test_a_card_without_a_hub_original_links_to_none() -> None:
    card = model_card(a_report())
    assert "base_model" not in card
    assert "huggingface.co" not in card


def test_stages_are_in_the_order_they_run_although_some_layers_leave_some_out() -> None:
    stages = ["k-means", "joint codebooks", "refit"]
    report = a_report({"k-means": 0.3, "refit": 0.1}, dict.fromkeys(stages, 0.2), {"refit": 0.1})
    assert list(report.mean_losses) == stages
