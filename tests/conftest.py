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
from tiny_llama import WORDS, save_llama, word_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Before anything imports Triton, which looks once: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# How long an example takes says nothing on a machine that others use too.
settings.register_profile("vptq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vptq")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: begun last, it would keep one worker while the others are idle."""
    items.sort(key=lambda item: item.path.name != "test_real_model.py")


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests measure is neither taken from the user's cache nor left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def exact_products() -> Iterator[None]:
    """Models compute the same in tests whatever instructions the processor has; `test_precision.py` is about those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vptq.quantize.precision.multiplies_bfloat16", lambda device: False)
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """`tiny_llama.word_tokenizer`, made once."""
    return word_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random two-block Llama with its tokenizer, in a folder that tests only read."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    save_llama(folder, tiny_tokenizer)
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
