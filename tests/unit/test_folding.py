"""Rotations folded into a model: the same function with other weights, or a refusal."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import job_for, like_trained, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from vptq.errors import ConfigError
from vptq.progress import ProgressEvent
from vptq.quantize.folding import FoldedFiles, check_layout, check_same_function, folds_of
from vptq.quantize.skeleton import Skeleton
from vptq.quantize.weights import spill
from vptq.transformers_versions import tied_weights

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},  # every bias there can be
    "mistral": {"hidden_size": 48, "head_dim": 12},  # sizes that are no powers of two
    "qwen2": {},  # biases of q, k and v
    "qwen3": {"head_dim": 16},  # norms inside the heads, and heads wider than the stream
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
}
SAME = [(family, tied) for family in FAMILIES for tied in (False, True)]


def model_of(family: str, **changes: Any) -> Any:
    return like_trained(tiny(family, **({"num_key_value_heads": 2} | FAMILIES.get(family, {}) | changes)))


def silent(_event: ProgressEvent) -> None:
    pass


def skeletons(model: Any, folder: Path, seed: int = 0) -> tuple[Skeleton, Skeleton, list[str]]:
    job = job_for(model, folder / "out", seed=seed, rotate=True)
    original = job.open_skeleton()
    return original, *job.fold_rotations(original, silent)


def folded(model: Any, folder: Path, seed: int = 0) -> tuple[Any, FoldedFiles]:
    """The folded model, dense and in memory."""
    _, skeleton, _ = skeletons(model, folder, seed)
    whole = AutoModelForCausalLM.from_config(skeleton.model.config, dtype=torch.float32)
    files = skeleton.files
    assert isinstance(files, FoldedFiles)
    whole.load_state_dict({name: files.load(name) for name in files})
    return whole.eval(), files


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 51).view(2, 24)).logits
    return found


@pytest.mark.parametrize(("family", "tied"), SAME)
def test_the_folded_model_computes_what_the_original_does(family: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(family, tie_word_embeddings=tied)
    turned, _ = folded(model, tmp_path)
    expected = logits(model)
    assert float(expected.std()) > 0.1, "there is something to compare"
    torch.testing.assert_close(logits(turned), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    norms = [name for name, _ in turned.named_parameters() if name.endswith("norm.weight") and "self_attn" not in name]
    assert len(norms) == 5
    assert all(bool((turned.get_parameter(name) == 1).all()) for name in norms)
    before = model.state_dict()
    for name, tensor in turned.state_dict().items():
        inside_heads = name.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias"))
        untouched = inside_heads or name.endswith(("gate_proj.bias", "up_proj.bias"))
        assert torch.equal(tensor, before[name]) == untouched, name


def test_outliers_of_the_stream_and_of_values_are_spread(tmp_path: Path) -> None:
    model = model_of("llama", attention_bias=False, mlp_bias=False)
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.mlp.up_proj.weight[4, 5] = 20
        layer.self_attn.v_proj.weight[3, 2] = 20
    turned, _ = folded(model, tmp_path)

    def peak(weight: torch.Tensor) -> float:
        return float((weight.abs().max() / weight.square().mean().sqrt()).detach())

    for path in ("mlp.up_proj", "self_attn.v_proj"):
        assert peak(turned.model.layers[0].get_submodule(path).weight) < 0.4 * peak(layer.get_submodule(path).weight)


def test_same_seed_same_rotations(tmp_path: Path) -> None:
    model = model_of("qwen2")
    one, two, three = (folded(model, tmp_path / str(n), seed)[1] for n, seed in enumerate((5, 5, 6)))
    turned = [name for name in one if "norm" not in name and not name.endswith(("q_proj.bias", "k_proj.bias"))]
    assert len(turned) == 18
    assert all(torch.equal(one.load(name), two.load(name)) for name in one)
    assert not any(torch.equal(one.load(name), three.load(name)) for name in turned)


def test_each_block_has_its_own_rotation_of_heads() -> None:
    folds = folds_of(model_of("llama"), seed=0)
    heads = [folds[f"model.layers.{index}.self_attn.v_proj"].outputs for index in range(2)]
    assert heads[0] is folds["model.layers.0.self_attn.o_proj"].inputs
    values = torch.eye(8)
    assert heads[0] is not None
    assert heads[1] is not None
    assert not torch.equal(heads[0](values), heads[1](values))


def test_tied_embeddings_come_apart_with_a_warning(tmp_path: Path) -> None:
    model = model_of("llama", tie_word_embeddings=True)
    original, skeleton, warnings = skeletons(model, tmp_path)
    assert tied_weights(original.model)
    assert not tied_weights(skeleton.model)
    assert model.config.tie_word_embeddings, "the caller's model is left alone"
    assert "lm_head.weight" in set(skeleton.files)
    assert "lm_head.weight" in skeleton.files
    assert warnings == [
        "--rotate: lm_head.weight was tied to model.embed_tokens.weight and is now stored by itself, 4,032 bytes"
    ]
    assert not skeletons(model_of("llama"), tmp_path / "untied")[2]


def test_folded_tensors_are_float32_whatever_was_stored(tmp_path: Path) -> None:
    """Rounding to bfloat16 before quantizing would be an error of its own."""
    model = model_of("llama")
    for parameter in model.parameters():  # and not the rotary frequencies, which no file holds
        parameter.data = parameter.data.bfloat16()
    turned, _ = folded(model, tmp_path)
    expected = logits(model.float())
    torch.testing.assert_close(logits(turned), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize(
    ("family", "changes", "odd"),
    [
        ("gpt_neox", {}, "no model.embed_tokens.weight"),
        ("phi", {}, "no model.layers.0.mlp.gate_proj.weight"),
        ("phi3", {"pad_token_id": 0}, "no model.layers.0.self_attn.q_proj.weight"),
        ("gemma2", {"head_dim": 8}, "a model.layers.0.pre_feedforward_layernorm.weight"),
        ("olmo2", {}, "no model.layers.0.input_layernorm.weight"),
        ("stablelm", {}, "a model.layers.0.input_layernorm.bias"),
        ("mixtral", {"num_local_experts": 2}, "no model.layers.0.mlp.gate_proj.weight"),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "no model.embed_tokens.weight"),
    ],
)
def test_other_layouts_are_refused_in_one_line(family: str, changes: dict[str, Any], odd: str) -> None:
    model = tiny(family, **changes)
    with pytest.raises(ConfigError) as caught:
        check_layout(model)
    message = str(caught.value)
    assert f"--rotate: {type(model).__name__} has {odd}, unlike Llama" in message
    assert message.endswith("leave --rotate out")
    assert "\n" not in message


def test_values_that_are_no_whole_number_of_heads_are_refused() -> None:
    model = model_of("llama")
    model.model.layers[1].self_attn.v_proj = nn.Linear(32, 12)
    with pytest.raises(ConfigError, match="no whole number of attention heads"):
        check_layout(model)


def test_an_impostor_with_the_same_names_is_found_by_running_it(tmp_path: Path) -> None:
    """Gemma's norms scale by 1 + weight."""
    model = model_of("gemma", head_dim=8)
    check_layout(model)
    with pytest.raises(ConfigError, match=r"GemmaForCausalLM .*its logits change by .*leave --rotate out") as caught:
        skeletons(model, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj.bias", "model.norm.weight"])
def test_the_check_finds_one_tensor_that_is_wrong(name: str, tmp_path: Path) -> None:
    original, skeleton, _ = skeletons(model_of("llama"), tmp_path)
    check_same_function(original, skeleton, 0, silent)
    load = skeleton.files.load
    skeleton.files.load = lambda wanted: original.files.load(name) if wanted == name else load(wanted)  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="its logits change by"):
        check_same_function(original, skeleton, 0, silent)


def test_the_check_leaves_both_models_empty(tmp_path: Path) -> None:
    original, skeleton, _ = skeletons(model_of("llama"), tmp_path)
    assert all(p.is_meta for model in (original.model, skeleton.model) for p in model.parameters())


def test_a_damaged_original_is_not_blamed_on_its_layout(tmp_path: Path) -> None:
    model = model_of("llama")
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ConfigError, match="hold NaN or infinity: the model file is damaged"):
        skeletons(model, tmp_path)


def test_a_stored_copy_of_tied_weights_is_not_read(tmp_path: Path) -> None:
    """Some folders hold the head of a tied model as well; the embedding is what the model uses."""
    model = model_of("llama", tie_word_embeddings=True)
    files = spill(model, tmp_path / "original")

    class Both:
        def __contains__(self, name: str) -> bool:
            return name in files or name == "lm_head.weight"

        def __iter__(self) -> Any:
            return iter([*files, "lm_head.weight"])

        def load(self, name: str) -> torch.Tensor:
            return torch.zeros(63, 32) if name == "lm_head.weight" else files.load(name)

    one, both = (FoldedFiles(some, folds_of(model, 0), tied_weights(model)) for some in (files, Both()))
    assert sorted(one) == sorted(both)
    assert torch.equal(both.load("lm_head.weight"), one.load("lm_head.weight"))
