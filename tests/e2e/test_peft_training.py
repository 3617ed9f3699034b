"""Training on top: adapters learn, and the quantized layers under them stay as they are, to the bit."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapters import IDS, adapted, base_tensors, load, logits, train

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(make_checkpoint):
    return make_checkpoint(dtype=torch.float32).folder


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


def test_an_adapter_can_start_from_activations(folder):
    options = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(adjust_scaling_factors=False)}
    model = adapted(folder, **options)
    peft.initialize_lora_eva_weights(model, [{"input_ids": IDS}], show_progress_bar=False)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05


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


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("qwen2", {"use_dora": True, "bias": "all"})], ids=["LoRA", "DoRA, biases"]
)
def test_gradients_are_those_of_the_dense_model(make_checkpoint, family, options):
    folder = make_checkpoint(family, dtype=torch.float32).folder
    quantized = adapted(folder, **options)
    torch.manual_seed(0)
    dense = peft.get_peft_model(load(folder).dequantize(), quantized.peft_config["default"])
    for model in (quantized, dense):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        model(IDS, labels=IDS).loss.backward()
    trained = [{n: p.grad for n, p in model.named_parameters() if p.requires_grad} for model in (quantized, dense)]
    assert trained[0].keys() == trained[1].keys()
    for name, grad in trained[0].items():
        torch.testing.assert_close(grad, trained[1][name], msg=lambda m, name=name: f"{name}: {m}")


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
