"""Zero-shot tasks against log likelihoods computed here."""

import copy
import math
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import vptq
from vptq.errors import ConfigError, VPTQError
from vptq.progress import ProgressEvent


@pytest.fixture
def other_model(tiny_model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return other


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, choices: list[str]
) -> torch.Tensor:
    """log P(choice | question) of each, float64; a word is a token here, so tokens are counted by splitting."""
    found = []
    for choice in choices:
        ids = torch.tensor(tokenizer(f"{question} {choice}")["input_ids"])
        log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        first = len(ids) - len(choice.split())
        found.append(sum(log_p[position - 1, ids[position]] for position in range(first, len(ids))))
    return torch.stack(found)


def direct_accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[dict[str, Any]]
) -> tuple[float, float]:
    """Share of questions whose likeliest choice is right: by likelihood, and by likelihood per character."""
    right, right_per_character = 0, 0
    for question in questions:
        scores = log_likelihoods(model, tokenizer, question["question"], question["choices"])
        lengths = torch.tensor([len(choice) for choice in question["choices"]])
        right += int(scores.argmax()) == question["label"]
        right_per_character += int((scores / lengths).argmax()) == question["label"]
    return right / len(questions), right_per_character / len(questions)


def test_accuracies_are_those_of_log_likelihoods_computed_directly(
    tiny_model: PreTrainedModel,
    other_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_tasks: list[dict[str, Any]],
    tiny_task_dir: Path,
) -> None:
    result = vptq.evaluate(
        tiny_model, other_model, tasks="tiny_choices", task_dir=tiny_task_dir, tokenizer=tiny_tokenizer
    )
    (scores,) = result.tasks
    assert (scores.task, scores.examples) == ("tiny_choices", len(tiny_tasks))
    assert scores.reference_metrics is not None
    expected = direct_accuracies(tiny_model, tiny_tokenizer, tiny_tasks)
    reference = direct_accuracies(other_model, tiny_tokenizer, tiny_tasks)
    assert len({*expected, *reference}) > 2, "this test could not tell one figure from another"
    for metrics, accuracies in ((scores.metrics, expected), (scores.reference_metrics, reference)):
        assert list(metrics) == ["acc", "acc_norm"]
        for estimate, accuracy in zip(metrics.values(), accuracies, strict=True):
            assert estimate.value == pytest.approx(accuracy)
            assert estimate.stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (len(tiny_tasks) - 1)))
    assert (result.text, result.perplexity, result.texts) == (None, None, ()), "no text was asked for"
    assert tiny_tokenizer.pad_token is None, "the tokenizer was given a padding token"


def test_a_limit_takes_the_first_examples_and_progress_counts_requests_of_both_models(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_tasks: list[dict[str, Any]],
    tiny_task_dir: Path,
) -> None:
    seen: list[ProgressEvent] = []
    options: dict[str, Any] = {"tasks": ["tiny_choices", "tiny_last_word"], "task_dir": tiny_task_dir, "limit": 7}
    result = vptq.evaluate(
        *(tiny_model, tiny_model),
        **(options | {"tokenizer": tiny_tokenizer, "progress": seen.append}),
    )
    choices, last_word = result.tasks
    assert (choices.examples, last_word.examples) == (7, 7)
    assert choices.metrics["acc"].value == pytest.approx(
        direct_accuracies(tiny_model, tiny_tokenizer, tiny_tasks[:7])[0]
    )
    assert choices.metrics == choices.reference_metrics
    total = 2 * 7 * (4 + 1)
    assert seen == [ProgressEvent("reading tasks"), *(ProgressEvent("tasks", n, total) for n in range(1, total + 1))]


def test_both_models_see_the_same_examples_in_their_prompts_every_time(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_task_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval.models.huggingface import HFLM

    prompts: list[list[str]] = []
    answer = HFLM.loglikelihood

    def spy(lm: Any, requests: list[Any], *arguments: Any, **options: Any) -> Any:
        prompts.append([request.args[0] for request in requests])
        return answer(lm, requests, *arguments, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", spy)
    options: dict[str, Any] = {"tasks": ["tiny_examples"], "task_dir": tiny_task_dir, "limit": 3}
    vptq.evaluate(tiny_model, tiny_model, **options, tokenizer=tiny_tokenizer)
    vptq.evaluate(tiny_model, **options, tokenizer=tiny_tokenizer)
    assert all(prompt.count("\n\n") == 2 for prompt in prompts[0]), "two examples, then the question"
    assert prompts[0] == prompts[1] == prompts[2]


def test_it_is_quiet_and_leaves_the_network_the_random_state_and_the_logs_alone(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tiny_task_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import logging

    from tqdm import tqdm

    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"the network was asked for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = torch.get_rng_state(), logging.getLogger("lm_eval").level, tqdm.__init__
    options: dict[str, Any] = {"task_dir": tiny_task_dir, "tokenizer": tiny_tokenizer}
    result = vptq.evaluate(tiny_model, tasks=["tiny_last_word"], **options)
    stderr = result.tasks[0].metrics["perplexity"].stderr
    assert stderr is not None, "this figure's error is the one that lm-eval prints about"
    assert stderr > 0
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (logging.getLogger("lm_eval").level, tqdm.__init__) == before[1:]


def test_a_text_beside_tasks_is_measured_too(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tiny_task_dir: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ba de fi go ku " * 8)
    options: dict[str, Any] = {"seqlen": 10, "tokenizer": tiny_tokenizer}
    both = vptq.evaluate(tiny_model, None, text, tasks=["tiny_choices"], task_dir=tiny_task_dir, limit=2, **options)
    assert both.perplexity == vptq.evaluate(tiny_model, None, text, **options).perplexity
    assert [scores.task for scores in both.tasks] == ["tiny_choices"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 3}, "limit is 3, but there are no tasks"),
        ({"task_dir": "somewhere"}, "task_dir is somewhere, but there are no tasks"),
        ({"text": []}, "nothing to evaluate on"),
        ({"tasks": ["tiny_choices"], "limit": 0}, "at least 1 example"),
        ({"tasks": ["tiny_choices"], "batch_size": 0}, "at least 1 request"),
        ({"tasks": ["tiny_choices"], "windows": 3}, "only tasks are measured"),
        ({"tasks": ["tiny_choices"], "task_dir": "./missing"}, "no folder missing"),
        ({"tasks": ["empty"], "task_dir": "TASKS"}, "task 'empty' cannot be loaded"),
    ],
)
def test_what_cannot_be_run_is_refused_before_a_model_is_loaded(
    options: dict[str, Any], message: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "model")  # no weights: an error of its own, had it come to loading
    (tmp_path / "empty.yaml").write_text(f"task: empty\ndataset_path: {tmp_path / 'nothing'}\n")
    if options.get("task_dir") == "TASKS":
        options = options | {"task_dir": tmp_path}
    with pytest.raises(ConfigError, match=message) as caught:
        vptq.evaluate(tmp_path / "model", **options)
    assert "\n" not in str(caught.value)


def test_without_lm_eval_the_error_says_how_to_get_it(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"lm_eval, which is not installed: pip install 'vptq\[eval\]'"):
        vptq.evaluate(tiny_model, tasks=["piqa"], tokenizer=tiny_tokenizer)


def test_logits_that_are_not_finite_are_an_error_and_no_accuracy(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tiny_task_dir: Path
) -> None:
    with torch.no_grad():
        tiny_model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(VPTQError, match="not finite"):
        vptq.evaluate(tiny_model, tasks=["tiny_choices"], task_dir=tiny_task_dir, tokenizer=tiny_tokenizer)
