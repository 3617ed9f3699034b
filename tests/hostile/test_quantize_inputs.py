"""What cannot be quantized: one line that says why, and nothing written."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import vptq
from vptq.config import LayerConfig
from vptq.errors import CalibrationError, ConfigError, VPTQError
from vptq.quantize.hessian import COMMUNITY_TAGS
from vptq.quantize.report import LayerReport

QUICK: dict[str, Any] = {"spec": "v4-k16", "sequences": 3, "seqlen": 16}


def refusal(kind: type[VPTQError], model: Any, output: Path, **options: Any) -> str:
    """The message of the refusal; nothing may be written beside what was there."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        vptq.quantize(model, output, **(QUICK | options))
    message = str(caught.value)
    assert "\n" not in message
    assert sorted(output.parent.rglob("*")) == before
    return message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"spec": "q4_0"}, "'q4_0' is not a quantization spec"),
        ({"spec": "v4-k100"}, "100 entries; it must have a power of two"),
        ({"spec": "v5-k16"}, "vector length is 5, which no kernel takes"),
        ({"spec": "v4-k131072"}, "131072 entries"),
        ({"sequences": 0}, "--sequences is 0"),
        ({"seqlen": 1}, "--seqlen 1"),
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"device": "abacus"}, "--device is abacus"),
        ({"hessian_inputs": "mine"}, "'mine'; choose one of quantized, original, both"),
        ({"hessian_dir": "nowhere"}, "no folder nowhere"),
        ({"hessian_dir": "/", "rotate": True}, "--rotate with --hessian-dir /: those Hessians belong to the model"),
        ({"lm_head": "auto"}, "--lm-head is auto, with no budget to choose for; give a spec"),
        ({"lm_head": "q4"}, "'q4' is not a quantization spec"),
        ({"lm_head": "v4-k16", "bits": 3.0, "spec": None}, "--lm-head is v4-k16, with 3 bits; give auto"),
        ({"lm_head": "v4-k16", "hessian_dir": "/"}, "Hessian files have none for the head"),
        ({"calibration": "missing.txt"}, "no file missing.txt"),
        ({"calibration": "/no/such/text"}, "no file /no/such/text"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], expected: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    assert expected in refusal(ConfigError, tiny_model_folder, tmp_path / "out", **options)


@pytest.mark.parametrize("model", ["./no-such-folder", "/no/such/folder", "some/where/else", "model.gguf"])
def test_a_missing_model(model: str, tmp_path: Path) -> None:
    assert f"there is no model at {model}" in refusal(ConfigError, model, tmp_path / "out")


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a model folder" in refusal(ConfigError, tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("option", [{}, {"resume": True}])
def test_an_output_folder_that_exists(option: dict[str, Any], tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    message = refusal(ConfigError, tiny_model_folder, out, **option)
    assert str(out) in message
    assert ("finished" if option else "--overwrite") in message
    assert (out / "precious").read_text() == "kept"


@pytest.mark.parametrize("resume", [False, True])
def test_more_centroids_than_any_layer_has_vectors(resume: bool, tiny_model_folder: Path, tmp_path: Path) -> None:
    message = refusal(ConfigError, tiny_model_folder, tmp_path / "out", spec="v4-k4096", resume=resume)
    assert "spec v4-k4096 has 4096 centroids, more than any layer" in message


def config_of(layer: LayerReport) -> LayerConfig:
    return LayerConfig.from_entry(layer.entry, layer.name)


def test_codebooks_larger_than_some_layers_are_clamped_with_a_warning(tiny_model_folder: Path, tmp_path: Path) -> None:
    """At v4 q_proj (32 x 32) has 256 vectors, k_proj (16 x 32) 128, gate_proj (48 x 32) 384."""
    report = vptq.quantize(tiny_model_folder, tmp_path / "out", **(QUICK | {"spec": "v4-k256"}))
    centroids = {layer.name.rpartition(".")[2]: config_of(layer).num_centroids for layer in report.layers}
    assert centroids["q_proj"] == centroids["gate_proj"] == 256
    assert centroids["k_proj"] == centroids["v_proj"] == 128
    about = [line for line in report.warnings if "clamped" in line]
    assert len(about) == 2, "one line for each kind of layer"
    assert any("k_proj" in line and "16 x 32" in line and "128 centroids" in line for line in about)


def test_a_clamped_residual_codebook_is_told_as_well(tiny_model_folder: Path, tmp_path: Path) -> None:
    report = vptq.quantize(tiny_model_folder, tmp_path / "out", **(QUICK | {"spec": "v4-k16-256"}))
    residual = {layer.name.rpartition(".")[2]: config_of(layer).num_residual_centroids for layer in report.layers}
    assert residual["k_proj"] == 128
    assert any("k_proj" in line and "residual" in line and "128" in line for line in report.warnings)


@pytest.mark.parametrize("text", ["", " \n \n"])
@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_calibration_text(text: str, resume: bool, tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text(text)
    message = refusal(CalibrationError, tiny_model_folder, tmp_path / "out", calibration=path, resume=resume)
    assert f"calibration text {path} is empty" in message


def test_a_calibration_text_that_is_no_text(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "binary.txt"
    path.write_bytes(bytes(range(256)))
    assert "not UTF-8" in refusal(ConfigError, tiny_model_folder, tmp_path / "out", calibration=path)


def test_a_model_in_memory_has_no_tokenizer_for_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ba be bi")
    assert "needs a tokenizer" in refusal(ConfigError, tiny("llama"), tmp_path / "out", calibration=path)


def test_a_model_that_rotations_cannot_be_folded_into(tmp_path: Path) -> None:
    """By its names, before it is converted; or by running it, before any block is quantized."""
    assert "GPTNeoXForCausalLM has no model" in refusal(ConfigError, tiny("gpt_neox"), tmp_path / "out", rotate=True)
    gemma = tiny("gemma", num_key_value_heads=2, head_dim=8)
    assert "its logits change by" in refusal(ConfigError, gemma, tmp_path / "out", rotate=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_found_before_any_block(
    value: float, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vptq.quantize.slabs.quantize_weight", lambda *_, **__: pytest.fail("hours were spent"))
    folder = damaged_copy(tiny_model_folder, tmp_path / "model", "model.layers.1.mlp.down_proj.weight", value)
    assert "model.layers.1.mlp.down_proj.weight holds NaN" in refusal(ConfigError, folder, tmp_path / "out")


def test_a_model_that_overflows_is_named_by_block(tiny_model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ba be bi bo bu " * 40)
    name = "model.layers.1.input_layernorm.weight"
    folder = damaged_copy(tiny_model_folder, tmp_path / "model", name, float("nan"))
    with pytest.raises(CalibrationError, match=r"block 1, inputs of .*q_proj.*NaN or infinity"):
        vptq.quantize(folder, tmp_path / "out", **QUICK, calibration=text)
    assert not (tmp_path / "out").exists()


def damaged_copy(folder: Path, target: Path, name: str, value: float) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_quantized_model_is_not_quantized_again(tiny_model_folder: Path, tmp_path: Path) -> None:
    vptq.quantize(tiny_model_folder, tmp_path / "first", **QUICK)
    assert "is quantized already" in refusal(ConfigError, tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("damage", ["truncated", "missing tensor", "pickle"])
def test_a_damaged_original(damage: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = damaged_copy(tiny_model_folder, tmp_path / "model", "model.norm.weight", 1.0)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        weights.write_bytes(pickle.dumps({"weight": [1.0]}))
    refusal(VPTQError, folder, tmp_path / "out")


def hessian_files(folder: Path, model: PreTrainedModel, blocks: int = 2) -> Path:
    """In the community layout, for every input of a Llama."""
    folder.mkdir()
    layer = model.model.layers[0]
    linears = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    for index in range(blocks):
        for name, linear in linears.items():
            width = linear.in_features
            inputs = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(width))
            covariance, (row, column) = torch.cov(inputs.T, correction=0), torch.tril_indices(width, width)
            stored = {"flatH": covariance[row, column], "mu": inputs.mean(0), "n": width, "ct": len(inputs)}
            torch.save(stored, folder / f"{index}_{COMMUNITY_TAGS[name]}.pt")
    return folder


def test_hessian_files_need_no_calibration(
    tiny_model: PreTrainedModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = hessian_files(tmp_path / "hessians", tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vptq.quantize.job.load_calibration", lambda *_: pytest.fail("no text is needed"))
        report = vptq.quantize(tiny_model_folder, tmp_path / "out", **QUICK, hessian_dir=folder)
    assert len(report.layers) == 14
    assert folder.name in report.calibration
    assert str(folder) not in report.calibration, "the model card says it to the world"
    assert all(0 < layer.loss < 0.5 for layer in report.layers)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "vptq"


@pytest.mark.parametrize("damage", ["missing", "wrong width", "NaN"])
def test_hessian_files_that_do_not_fit(
    damage: str, tiny_model: PreTrainedModel, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = hessian_files(tmp_path / "hessians", tiny_model)
    path = folder / "0_up.pt"
    if damage == "missing":
        path.unlink()
    elif damage == "wrong width":
        path.write_bytes((folder / "0_down.pt").read_bytes())
    else:
        stored = torch.load(path)
        stored["flatH"][5] = float("nan")
        torch.save(stored, path)
    assert "0_up.pt" in refusal(CalibrationError, tiny_model_folder, tmp_path / "out", hessian_dir=folder)


def test_a_hessian_file_missing_at_the_end_is_found_at_the_beginning(
    tiny_model: PreTrainedModel, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hessian_files(tmp_path / "hessians", tiny_model, blocks=1)
    monkeypatch.setattr("vptq.quantize.slabs.quantize_weight", lambda *_, **__: pytest.fail("hours were spent"))
    assert "1_qkv.pt" in refusal(CalibrationError, tiny_model_folder, tmp_path / "out", hessian_dir=folder)
