"""A whole engine of vLLM from a folder's config.json alone, beside transformers. Needs vLLM, and minutes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers

pytest.importorskip("vllm")

# Heads of 32: vLLM has no attention on CPUs for smaller ones.
GROUPED = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
FAMILIES = {"llama": GROUPED, "qwen2": GROUPED, "gpt_neox": {"num_attention_heads": 2}}
PROMPTS = [[1, 5, 9, 13, 20, 33, 40], [1, 60, 3, 4]]
TOKENS = 8
# An engine starts processes, and these import the script again.
SCRIPT = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    sampling = SamplingParams(temperature=0, max_tokens={tokens}, logprobs=3, ignore_eos=True, detokenize=False)
    engine = LLM({folder!r}, enforce_eager=True, max_model_len=64, dtype="float32", skip_tokenizer_init=True)
    outputs = engine.generate([{{"prompt_token_ids": ids}} for ids in {prompts}], sampling, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    logprobs = [[{{token: p.logprob for token, p in some.items()}} for some in answer.logprobs] for answer in answers]
    with open(sys.argv[1], "w") as file:
        json.dump([(some, list(answer.token_ids)) for some, answer in zip(logprobs, answers)], file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_generates_what_transformers_does(family, make_checkpoint, tmp_path):
    """Every kind of layer; stacked, with biases, and through vLLM's transformers backend."""
    folder = make_checkpoint(family, dtype=torch.float32, **FAMILIES[family]).folder
    script, answers = tmp_path / "engine.py", tmp_path / "answers.json"
    script.write_text(SCRIPT.format(folder=str(folder), prompts=PROMPTS, tokens=TOKENS))
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    quiet |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    engine = subprocess.Popen(
        [sys.executable, str(script), str(answers)],
        **{"env": os.environ | quiet, "start_new_session": True, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    try:
        said, _ = engine.communicate(timeout=1200)
    finally:
        if engine.poll() is None:
            os.killpg(engine.pid, signal.SIGKILL)
    assert engine.returncode == 0, said[-4000:]

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for prompt, (logprobs, tokens) in zip(PROMPTS, json.loads(answers.read_text()), strict=True):
        arguments = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert model.generate(torch.tensor([prompt]), **arguments)[0, len(prompt) :].tolist() == tokens
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        for position, some in enumerate(logprobs):
            for token, logprob in some.items():
                assert logprob == pytest.approx(expected[position, int(token)].item(), abs=1e-3)
