"""Adapters of peft on a quantized model: attached, saved, loaded, switched and refused by peft's public calls alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import IDS, TARGETS, adapted, load, logits, train
from random_layers import random_weight

from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.linear import VQuantLinear

peft = pytest.importorskip("peft")

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint(dtype=torch.float32).folder


def test_a_saved_adapter_is_small_and_loads_to_the_same_logits(folder, tmp_path):
    model = adapted(folder)
    train(model, steps=2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    stored = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert "model.safetensors" not in stored
    trainable = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert stored["adapter_model.safetensors"] < trainable + 4096

    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(folder), tmp_path)), expected)
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)), expected)
    plain = load(folder)
    plain.load_adapter(str(tmp_path))  # transformers' own way to adapters
    assert torch.equal(logits(plain), expected)


@pytest.mark.parametrize("imports", ["import peft, vptq", "import vptq, peft"])
def test_a_fresh_process_needs_no_more_than_the_imports(folder, tmp_path, imports):
    model = adapted(folder)
    train(model, steps=1)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = f"""
{imports}, torch
model = peft.AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / "adapter")!r})
with torch.no_grad():
    found = model(torch.arange(1, 49).reshape(4, 12)).logits
print(torch.equal(found, torch.load({str(tmp_path / "logits.pt")!r})))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error:Unsupported layer", "-c", code],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    assert done.stdout == "True\n", done.stderr


def test_disabled_adapters_leave_the_base_as_it_was(folder):
    expected = logits(load(folder))
    model = adapted(folder)
    assert torch.equal(logits(model), expected)  # B starts as zero
    train(model, steps=2)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


def test_several_adapters_live_side_by_side(folder):
    model = adapted(folder)
    train(model, steps=2)
    first = logits(model)
    model.add_adapter("second", peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(load(folder)))
    train(model, steps=2)
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["default", "second", "second", "__base__"]).logits
    torch.testing.assert_close(mixed[0], first[0])
    torch.testing.assert_close(mixed[1:3], second[1:3])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[3], logits(model)[3])


def test_all_linear_means_the_quantized_layers(folder):
    layers = {path for path, module in load(folder).named_modules() if isinstance(module, VQuantLinear)}
    model = adapted(folder, target_modules="all-linear")
    found = {path for path, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert found == layers
    model.add_adapter("again", peft.LoraConfig(target_modules="all-linear", r=2))
    assert not any("base_layer" in name for name in model.peft_config["again"].target_modules)
    assert all({"default", "again"} == set(model.base_model.model.get_submodule(path).lora_A) for path in layers)


def test_all_linear_takes_dense_layers_too_but_not_the_head(folder):
    base = load(folder)
    base.model.layers[0].mlp = load(folder).dequantize().model.layers[0].mlp
    base.lm_head = VQuantLinear.from_weight(random_weight(LayerConfig(64, 96, 8, 16)), torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", r=2))
    assert hasattr(model.base_model.model.model.layers[0].mlp.up_proj, "lora_A")
    assert hasattr(model.base_model.model.model.layers[1].mlp.up_proj, "lora_A")
    assert not hasattr(model.base_model.model.lm_head, "lora_A")


def test_adapters_follow_the_base_layer_where_peft_is_told_not_to_cast(folder):
    config = peft.LoraConfig(target_modules=TARGETS, r=2, use_dora=True)
    model = peft.get_peft_model(load(folder, dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


def test_merging_is_refused_and_the_way_the_message_tells_works(folder, tmp_path):
    model = adapted(folder, target_modules=[*TARGETS, "embed_tokens"])
    train(model, steps=2)
    expected = logits(model)
    for merge in (
        model.merge_and_unload,
        model.merge_adapter,
        model.base_model.model.model.layers[0].mlp.down_proj.merge,
    ):
        with pytest.raises(
            ConfigError, match=r"cannot be merged into quantized layers; .*base\.dequantize\(\)"
        ) as error:
            merge()
        assert "\n" not in str(error.value)
    assert torch.equal(logits(model), expected)  # nothing was merged before the refusal, the dense embedding included
    model.save_pretrained(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(load(folder).dequantize(), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "mica"}, {"use_bdlora": {"nblocks": 2}}], ids=str
)
def test_what_takes_the_weight_apart_is_refused(folder, options):
    if "use_bdlora" in options:
        options = {"use_bdlora": peft.tuners.lora.BdLoraConfig(nblocks=2)}
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* does not work on a quantized layer") as error:
        adapted(folder, **options)
    assert "\n" not in str(error.value)


def test_the_example_of_the_readme(folder, tmp_path):
    [code] = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "peft" in code]
    code = code.replace('"DIR"', repr(str(folder))).replace('"ADAPTER"', repr(str(tmp_path / "adapter")))
    exec(code, {"batches": [IDS, IDS]})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
