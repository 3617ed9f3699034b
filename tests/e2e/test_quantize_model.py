"""`vptq.quantize` on tiny models: what is written, what loads, and what decides the bytes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny
from solver_problems import loss_of
from transformers import AutoModelForCausalLM, AutoTokenizer

import vptq
from vptq.checkpoint import load_layer
from vptq.linear import VQuantLinear
from vptq.quantize.report import Report, load_report
from vptq.reference import dequantize

QUICK: dict[str, Any] = {"sequences": 4, "seqlen": 16}


def contents(folder: Path) -> dict[str, bytes]:
    """The files that the same seed must give again; a report holds times and memory as well."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".safetensors", ".jinja") and path.name != "report.json"
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 35)[None]).logits.float()
    return found


@pytest.fixture(scope="module")
def quantized(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("quantized") / "out"
    return folder, vptq.quantize(tiny_model_folder, folder, "v4-k64-16", **QUICK)


def test_the_folder_loads_and_predicts_about_what_the_original_does(
    quantized: tuple[Path, Report], tiny_model_folder: Path
) -> None:
    folder, report = quantized
    model = vptq.AutoModelForCausalLM.from_pretrained(folder)
    layers = [name for name, module in model.named_modules() if isinstance(module, VQuantLinear)]
    assert layers == [layer.name for layer in report.layers]
    assert len(layers) == 14
    original = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    expected = logits(original)
    error = float((logits(model) - expected).square().mean() / expected.var())
    # The same folder with the codebooks of every layer shuffled is what a random model of this size scores.
    for module in model.modules():
        if isinstance(module, VQuantLinear):
            module.centroids.weight.data = module.centroids.weight.data.flip(1)
    noise = float((logits(model) - expected).square().mean() / expected.var())
    assert error < 0.3 * noise
    assert AutoTokenizer.from_pretrained(folder).bos_token_id == 1
    generated = model.generate(torch.tensor([[1, 5]]), max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > 2


def test_every_parameter_is_quantized_or_said_not_to_be(
    quantized: tuple[Path, Report], tiny_model_folder: Path
) -> None:
    _, report = quantized
    original = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    shapes = dict(original.named_parameters())
    taken = {f"{layer.name}.weight" for layer in report.layers}
    assert taken | report.skipped.keys() == shapes.keys()
    assert not taken & report.skipped.keys()
    assert report.skipped["model.embed_tokens.weight"] == "embedding"
    assert report.skipped["lm_head.weight"] == "output head"
    assert report.quantized_weights == sum(shapes[name].numel() for name in taken)
    assert report.total_weights == sum(parameter.numel() for parameter in shapes.values())


def test_what_is_not_quantized_is_stored_as_it_was(quantized: tuple[Path, Report], tiny_model_folder: Path) -> None:
    folder, report = quantized
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored, original = model.state_dict(), AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    assert report.skipped
    for name in report.skipped:
        assert torch.equal(stored[name], original[name].bfloat16()), name


def test_reported_losses_are_those_of_the_stored_weights(tiny_model_folder: Path, tmp_path: Path) -> None:
    """With original inputs the Hessian can be taken from the model as it is."""
    text = tmp_path / "text.txt"
    text.write_text("ba be bi bo bu da de di do du fa fe fi " * 60)
    report = vptq.quantize(
        tiny_model_folder, tmp_path / "out", "v4-k16", calibration=text, hessian_inputs="original", **QUICK
    )
    assert report.hessian_inputs == "original"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][: 4 * 16]
    original = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    for layer in report.layers:
        original.get_submodule(layer.name).register_forward_pre_hook(
            lambda _, args, name=layer.name: seen.update({name: args[0].flatten(0, 1)})
        )
    logits_of_text = original(input_ids=torch.tensor(ids).view(4, 16)).logits
    assert bool(torch.isfinite(logits_of_text).all())
    for layer in report.layers:
        weight = original.get_submodule(layer.name).weight.detach()
        stored = load_layer(tmp_path / "out", layer.name)
        error = weight - dequantize(stored.config, stored.to_tensors(torch.bfloat16)).float()
        hessian = seen[layer.name].detach().T @ seen[layer.name].detach()
        assert layer.loss == pytest.approx(loss_of(error.T, hessian) / loss_of(weight.T, hessian), rel=0.05)


@pytest.mark.parametrize("hessian_inputs", ["quantized", "original", "both"])
def test_same_seed_same_bytes(hessian_inputs: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.manual_seed(len(name))  # global state must not matter
        options = QUICK | {"seed": seed, "hessian_inputs": hessian_inputs}
        vptq.quantize(tiny_model_folder, tmp_path / name, "v4-k16", **options)
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one.keys() == three.keys()
    assert any(one[name] != three[name] for name in one if name.endswith(".safetensors"))


def test_a_model_in_memory_gives_what_its_folder_gives(
    tiny_model_folder: Path, tmp_path: Path, quantized: tuple[Path, Report]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_json_string()
    report = vptq.quantize(model, tmp_path / "out", "v4-k64-16", **QUICK)
    assert [layer.losses for layer in report.layers] == [layer.losses for layer in quantized[1].layers]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_json_string() == config, "the caller's model is not the one that was quantized"
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")),
        logits(AutoModelForCausalLM.from_pretrained(quantized[0])),
    )


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "phi", "gemma2", "opt"])
def test_other_architectures_quantize_and_load(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    report = vptq.quantize(model, tmp_path / "out", "v4-k64-64", **QUICK)
    loaded = vptq.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    quantized = {name for name, module in loaded.named_modules() if isinstance(module, VQuantLinear)}
    assert quantized == {layer.name for layer in report.layers}
    for name in quantized:
        original, found = model.get_submodule(name), loaded.get_submodule(name)
        assert (original.bias is None) == (found.bias is None)
        error = (found.dequantize().float() - original.weight).square().mean() / original.weight.square().mean()
        assert float(error.detach()) < 0.2, name
        if original.bias is not None:
            assert torch.equal(found.bias, original.bias.bfloat16())
    assert torch.isfinite(logits(loaded)).all()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    report = vptq.quantize(model, tmp_path / "out", "v4-k16", **QUICK)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert "lm_head.weight" not in report.skipped
    assert report.total_weights == sum(parameter.numel() for parameter in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.bfloat16())


def test_the_report_is_in_the_folder(quantized: tuple[Path, Report]) -> None:
    folder, report = quantized
    assert load_report(folder) == report
    assert report.peak_memory_bytes > 2**20
    assert report.spec == "v4-k64-16"
    assert report.bits_per_weight > 2.5
    assert (folder / "report.png").is_file()
    assert (folder / "README.md").is_file()
    leftovers = [path.name for path in folder.parent.iterdir() if path != folder]
    assert not leftovers, "the work folder goes when the work is done"
