"""What tests of several kinds share: a model and a tokenizer small enough to make on the spot."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Before anything imports Triton, which looks once: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says nothing on a machine that others use too.
settings.register_profile("vptq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vptq")

WORDS = tuple(first + second for first in "bdfgklmnprst" for second in "aeiou")
SPECIAL = ("<unk>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is neither taken from the user's cache nor left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token a word over `WORDS`; adds a BOS token unless told not to, as most tokenizers do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random two-block Llama with its tokenizer, in a folder that tests only read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,  # far enough from uniform that predictions differ between models
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_model_folder: Path) -> PreTrainedModel:
    """The model in `tiny_model_folder`, float32, free to be changed."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
  cache_dir: {cache}
validation_split: validation
doc_to_text: "{{{{question}}}}"
metadata: {{version: 1.0}}
"""
CHOICES = """
output_type: multiple_choice
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LAST_WORD = """
output_type: loglikelihood
doc_to_target: " {{choices[label]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]
"""


@pytest.fixture(scope="session")
def tiny_tasks() -> list[dict[str, Any]]:
    """Multiple-choice questions over `WORDS`, with choices of one to three words."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))

    return [
        {
            "question": words(draw.randint(2, 9)),
            "choices": [words(draw.randint(1, 3)) for _ in range(4)],
            "label": draw.randrange(4),
        }
        for _ in range(30)
    ]


@pytest.fixture(scope="session")
def tiny_task_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tasks: list[dict[str, Any]]) -> Path:
    """lm-eval task files over `tiny_tasks`: tiny_choices, tiny_examples (two in every prompt), and tiny_last_word."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in tiny_tasks))
    kinds = {
        "tiny_choices": CHOICES,
        "tiny_examples": CHOICES + "num_fewshot: 2\nfewshot_split: validation\n",
        "tiny_last_word": LAST_WORD,
    }
    for name, kind in kinds.items():
        head = TASK.format(name=name, data=data, cache=folder / "cache")
        (folder / f"{name}.yaml").write_text(head + kind)
    return folder
