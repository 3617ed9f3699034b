"""Training on top: adapters of peft on a quantized model, through nothing but the public calls of peft and Trainer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from random_layers import random_weight

from vptq.config import LayerConfig
from vptq.errors import ConfigError
from vptq.linear import VQuantLinear

peft = pytest.importorskip("peft")

README = Path(__file__).parents[2] / "README.md"
IDS = torch.arange(1, 49).reshape(4, 12)
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint(dtype=torch.float32).folder


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def adapted(folder, dtype=torch.float32, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"target_modules": TARGETS, "r": 4, "task_type": "CAUSAL_LM"} | options)
    return peft.get_peft_model(load(folder, dtype=dtype), config)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(IDS).logits


def train(model, steps=6, autocast=False):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def base_tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_dropout": 0.1, "use_rslora": True}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.1}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_learns(folder, options, dtype):
    model = adapted(folder, dtype, **options)
    before = base_tensors(model)
    assert any(name.endswith("q_proj.base_layer.indices") for name in before)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(before[name], tensor) for name, tensor in base_tensors(model).items())
    model(IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


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


def test_an_adapter_can_start_from_activations(folder):
    options = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(adjust_scaling_factors=False)}
    model = adapted(folder, **options)
    peft.initialize_lora_eva_weights(model, [{"input_ids": IDS}], show_progress_bar=False)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05


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


def test_activated_lora_starts_at_its_invocation(folder):
    model = adapted(folder, alora_invocation_tokens=[5, 6])  # in the first sequence only
    losses = train(model)
    assert losses[-1] < losses[0]
    with model.disable_adapter():
        base = logits(model)
    found = logits(model)
    assert torch.equal(found[1:], base[1:])
    assert torch.equal(found[0, :4], base[0, :4])
    assert not torch.equal(found[0, 4:], base[0, 4:])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(folder, reentrant):
    plain, checkpointed = adapted(folder), adapted(folder)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for model in (plain, checkpointed):
        model.train()
        model(IDS, labels=IDS).loss.backward()
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradients_are_those_of_the_dense_model(folder):
    quantized = adapted(folder)
    torch.manual_seed(0)
    dense = peft.get_peft_model(load(folder).dequantize(), quantized.peft_config["default"])
    for model in (quantized, dense):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        model(IDS, labels=IDS).loss.backward()
    adapters = [{n: p.grad for n, p in model.named_parameters() if "lora_" in n} for model in (quantized, dense)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, grad in adapters[0].items():
        torch.testing.assert_close(grad, adapters[1][name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(folder, base):
    losses = train(adapted(folder, base), autocast=True)
    assert losses[-1] < losses[0] - 0.05


def trainer(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in IDS]
    return transformers.Trainer(model=model, args=arguments, train_dataset=data)


@pytest.mark.parametrize("options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=str)
def test_trainer_takes_an_adapted_model(folder, tmp_path, options):
    model = adapted(folder)
    before = base_tensors(model)
    start = logits(model)
    assert trainer(model, tmp_path, **options).train().global_step == 2
    assert not torch.equal(logits(model), start)
    assert all(torch.equal(before[name], tensor) for name, tensor in base_tensors(model).items())


def test_trainer_takes_adapters_that_transformers_attached(folder, tmp_path):
    model = load(folder)
    model.add_adapter(peft.LoraConfig(target_modules="all-linear", r=2))
    assert trainer(model, tmp_path).train().global_step == 2


def test_trainer_refuses_a_quantized_model_without_adapters(folder, tmp_path):
    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer(load(folder), tmp_path)


def test_the_example_of_the_readme(folder, tmp_path):
    [code] = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "peft" in code]
    code = code.replace('"DIR"', repr(str(folder))).replace('"ADAPTER"', repr(str(tmp_path / "adapter")))
    exec(code, {"batches": [IDS, IDS]})
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
