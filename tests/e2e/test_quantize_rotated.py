"""`vptq quantize --rotate` on tiny models: the rotated model is written, and predicts what the original does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import job_for, like_trained, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import vptq
from vptq.cli import main
from vptq.linear import VQuantLinear
from vptq.quantize.report import load_report

QUICK: dict[str, Any] = {"sequences": 4, "seqlen": 16, "rotate": True}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".safetensors") and path.name != "report.json"
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 35)[None]).logits.float()
    return found


def original(tied: bool) -> Any:
    """Biases, grouped queries, and norm weights that are not ones."""
    return like_trained(tiny("qwen2", tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_what_is_written_is_the_rotated_model(norm: bool, tied: bool, tmp_path: Path) -> None:
    model = original(tied)
    report = vptq.quantize(model, tmp_path / "out", "v4-k64-64", norm=norm, **QUICK)
    assert report.rotated
    assert any("tied" in line and "4,032 bytes" in line for line in report.warnings) == tied
    assert report.skipped["lm_head.weight"] == "output head"
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]

    job = job_for(model, tmp_path / "again", rotate=True)
    folded = job.fold_rotations(job.open_skeleton(), lambda event: None)[0].files
    loaded = vptq.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert sum(parameter.numel() for parameter in loaded.get_output_embeddings().parameters()) == 63 * 32
    dense = AutoModelForCausalLM.from_config(job.original.config, dtype=torch.float32)
    if tied:  # what the folded weights belong to
        dense.lm_head.weight = torch.nn.Parameter(dense.lm_head.weight.detach().clone())
    stored = dict(loaded.state_dict())
    for name, parameter in dense.named_parameters():
        owner = loaded.get_submodule(name.rpartition(".")[0])
        expected = folded.load(name)
        if isinstance(owner, VQuantLinear) and name.endswith("weight"):
            parameter.data = owner.dequantize().float()
            assert owner.config.enable_norm == norm
            error = (parameter - expected).square().mean() / expected.square().mean()
            assert float(error.detach()) < 0.2, name
        else:
            parameter.data = stored[name].float()
            assert torch.equal(parameter, expected.bfloat16().float()), name
    assert bool((stored["model.norm.weight"] == 1).all())
    torch.testing.assert_close(logits(loaded), logits(dense.eval()), rtol=1e-3, atol=1e-3)


def test_it_predicts_about_what_the_original_does(tmp_path: Path) -> None:
    model = original(tied=True)
    vptq.quantize(model, tmp_path / "out", "v4-k64-64", **QUICK)
    loaded = vptq.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(model)
    error = float((logits(loaded) - expected).square().mean() / expected.var())
    for module in loaded.modules():  # codebooks shuffled: what a random model of this size scores
        if isinstance(module, VQuantLinear):
            module.centroids.weight.data = module.centroids.weight.data.flip(1)
    noise = float((logits(loaded) - expected).square().mean() / expected.var())
    assert error < 0.3 * noise


def test_the_command_and_the_function_write_the_same_bytes_and_another_seed_others(
    tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    original(tied=True).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    options = ["--spec", "v4-k16", "--sequences", "4", "--seqlen", "16", "--rotate"]
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(folder), "-o", str(tmp_path / "command"), *options])
    assert not ended.value.code
    report = load_report(tmp_path / "command")
    assert report is not None
    assert report.rotated
    vptq.quantize(folder, tmp_path / "function", "v4-k16", **QUICK)
    vptq.quantize(folder, tmp_path / "other", "v4-k16", **QUICK, seed=1)
    vptq.quantize(folder, tmp_path / "plain", "v4-k16", **(QUICK | {"rotate": False}))
    command, function, other, plain = (contents(tmp_path / name) for name in ("command", "function", "other", "plain"))
    assert command == function
    assert command.keys() == other.keys()
    assert command["config.json"] != plain["config.json"], "untied"
    tensors = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).model.embed_tokens.weight
        for name in ("command", "other", "plain")
    ]
    assert not torch.equal(tensors[0], tensors[1])
    assert torch.equal(tensors[2], AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight.bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path / "command").bos_token_id == 1
