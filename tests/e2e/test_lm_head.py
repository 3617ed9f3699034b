"""`--lm-head`: the output head as one more quantized layer, where it is not tied to the embedding."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import like_trained, tiny
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

import vptq
from vptq.checkpoint import Checkpoint
from vptq.cli import main
from vptq.errors import ConfigError
from vptq.linear import VQuantLinear
from vptq.progress import ProgressEvent
from vptq.quantize.report import load_report

QUICK: dict[str, Any] = {"spec": "v4-k64-64", "sequences": 4, "seqlen": 16}
TOKENS = torch.arange(3, 35)[None]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".safetensors") and path.name != "report.json"
    }


@torch.no_grad()
def log_probabilities(model: Any) -> torch.Tensor:
    return functional.log_softmax(model(input_ids=TOKENS).logits.float(), -1)


def divergence(folder: Path, original: Any) -> float:
    p, q = (log_probabilities(m) for m in (original, vptq.AutoModelForCausalLM.from_pretrained(folder)))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "phi", "gpt_neox"])
def test_a_quantized_head_predicts_what_its_dequantized_weight_does(family: str, tmp_path: Path) -> None:
    """phi's head has a bias."""
    name = "lm_head"
    model = like_trained(tiny(family))
    report = vptq.quantize(model, tmp_path / "out", lm_head="v4-k32-32", **QUICK)
    loaded = vptq.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    head = loaded.get_submodule(name)
    assert isinstance(head, VQuantLinear)
    assert (head.config.num_centroids, head.config.num_residual_centroids) == (32, 32)
    quantized = log_probabilities(loaded)
    dense = torch.nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)
    dense.weight.data = head.dequantize().float()
    if head.bias is not None:
        dense.bias.data = head.bias.float()
        assert torch.equal(head.bias, model.get_submodule(name).bias.bfloat16().float())
    loaded.set_submodule(name, dense)
    torch.testing.assert_close(quantized, log_probabilities(loaded), rtol=1e-4, atol=1e-4)
    original = model.get_submodule(name).weight
    assert float((dense.weight - original).norm() / original.norm()) < 0.4

    assert (report.layers[-1].name, report.lm_head) == (name, "v4-k32-32")
    assert f"{name}.weight" not in report.skipped
    stored = Checkpoint.open(tmp_path / "out").layers()
    weights = sum(layer.in_features * layer.out_features for layer in stored.values())
    assert report.quantized_weights == weights
    assert report.bits_per_weight == pytest.approx(sum(layer.stored_bits for layer in stored.values()) / weights)
    assert "output head | quantized too, `v4-k32-32`" in (tmp_path / "out" / "README.md").read_text()
    assert load_report(tmp_path / "out") == report


@pytest.mark.parametrize("inputs", ["both", "quantized", "original"])
def test_more_bits_for_the_head_diverge_less(inputs: str, tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=64)
    found = []
    for spec in ("v4-k16", "v4-k64", "v4-k64-64"):
        vptq.quantize(model, tmp_path / spec, lm_head=spec, hessian_inputs=inputs, **QUICK)
        found.append(divergence(tmp_path / spec, model))
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.7 * found[0]


@pytest.mark.parametrize("lm_head", ["v4-k16", "auto"])
def test_a_tied_head_is_refused_with_what_it_would_cost(lm_head: str, tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    budget: dict[str, Any] = {"spec": None, "bits": 3.0} if lm_head == "auto" else {}
    with pytest.raises(ConfigError, match=r"shares its weight .* 4,032 bytes that stay.* add [\d,]+ bytes") as caught:
        vptq.quantize(model, tmp_path / "out", lm_head=lm_head, **QUICK | budget)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_rotations_free_a_tied_head(tmp_path: Path) -> None:
    model = like_trained(tiny("llama", tie_word_embeddings=True))
    vptq.quantize(model, tmp_path / "out", lm_head="v4-k64-64", rotate=True, **QUICK)
    loaded = vptq.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.lm_head, VQuantLinear)
    vptq.quantize(model, tmp_path / "dense", rotate=True, **QUICK)
    assert divergence(tmp_path / "out", model) < 2 * divergence(tmp_path / "dense", model)


@pytest.mark.parametrize("stage", ["quantizing the output head", "quantizing layers"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(stage: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    def interrupt(event: ProgressEvent) -> None:
        if event.stage == stage and (event.layer is None or ".1." in event.layer):
            raise KeyboardInterrupt

    vptq.quantize(tiny_model_folder, tmp_path / "whole", lm_head="v4-k16", **QUICK)
    with pytest.raises(KeyboardInterrupt):
        vptq.quantize(tiny_model_folder, tmp_path / "out", lm_head="v4-k16", **QUICK, progress=interrupt)
    with pytest.raises(ConfigError, match=r"--resume: .*lm_head was .* and is now None"):
        vptq.quantize(tiny_model_folder, tmp_path / "out", resume=True, **QUICK)
    vptq.quantize(tiny_model_folder, tmp_path / "out", lm_head="v4-k16", resume=True, **QUICK)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    vptq.quantize(tiny_model_folder, tmp_path / "other", lm_head="v4-k16", seed=1, **QUICK)
    assert tree(tmp_path / "other") != tree(tmp_path / "whole")


def test_the_head_is_one_more_layer_of_a_plan(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, options = tmp_path / "model", QUICK | {"spec": None, "seqlen": 32}
    tiny("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    plan_options = {name: value for name, value in options.items() if name != "spec"}
    head = [vptq.plan(folder, bits=bits, lm_head="auto", **plan_options).layers[-1] for bits in (2.2, 3.6)]
    assert [layer.name for layer in head] == ["lm_head", "lm_head"]
    assert head[1].divergence <= head[0].divergence
    assert head[0].divergence > 0
    assert "lm_head" not in {layer.name for layer in vptq.plan(folder, bits=2.2, **plan_options).layers}

    plan = vptq.plan(folder, size="46kB", lm_head="auto", **plan_options)
    report = vptq.quantize(folder, tmp_path / "out", size="46kB", lm_head="auto", **options)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written <= plan.file_bytes <= 46e3
    assert report.lm_head == plan.layers[-1].spec
    assert report.bits_per_weight == pytest.approx(plan.bits_per_weight)
    with pytest.raises(ConfigError, match="the smallest possible is") as caught:
        vptq.plan(folder, size="30kB", **plan_options)
    alone = re.search(r"([\d.]+) MB are not quantized", str(caught.value))
    assert alone is not None
    with pytest.raises(ConfigError) as caught:
        vptq.plan(folder, size="5kB", lm_head="auto", **plan_options)
    rest = re.search(r"([\d.]+) MB are not quantized", str(caught.value))
    assert rest is not None
    assert float(rest[1]) < float(alone[1])

    with pytest.raises(SystemExit) as ended:
        main(["--model", str(tmp_path / "out"), "--prompt", "ba be"])
    assert not ended.value.code
    assert capsys.readouterr().out.strip()
