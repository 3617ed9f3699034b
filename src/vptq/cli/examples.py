"""What the help of each command ends with: command lines to begin from, in the order a user would need them."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        'python -m vptq --model DIR --prompt "Once upon a time"',
        "python -m vptq --model DIR --chat",
        "vptq quantize MODEL -o DIR --bits 2.25",
        "vptq --install-completion",
    ),
    "quantize": (
        "vptq quantize MODEL -o DIR --bits 2.25",
        "vptq quantize MODEL -o DIR --spec v8-k65536-256 --calibration wikitext2",
        "vptq quantize MODEL -o DIR --size 1.2GiB --finetune e2e",
        "vptq quantize MODEL -o DIR --bits 2.25 --ray auto    # on a node of a Ray cluster",
        "vptq quantize MODEL -o DIR --bits 2.25 --resume --progress json 2> progress.jsonl",
    ),
    "plan": ("vptq plan MODEL --bits 2.25", "vptq plan MODEL --size 1.2GiB --json plan.json"),
    "finetune": (
        "vptq finetune DIR MODEL -o OUT --calibration mine.txt",
        "vptq finetune DIR MODEL -o OUT --move-indices 0.01",
    ),
    "chat": ('vptq chat DIR --system "Answer in one sentence."', "vptq chat DIR < questions.txt > answers.txt"),
    "eval": (
        "vptq eval DIR --reference MODEL --text wikitext2 --text mine.txt --windows 20",
        "vptq eval DIR --reference MODEL --tasks hellaswag,piqa,arc_easy --limit 500",
        "vptq eval DIR --reference MODEL --json DIR/eval.json    # where `vptq compare` and `vptq push` look",
    ),
    "bench": (
        "vptq bench DIR --reference MODEL",
        "vptq bench DIR --json DIR/bench.json    # where `vptq compare` looks",
    ),
    "compare": ("vptq compare DIR OTHER_DIR", "vptq compare DIR OTHER_DIR -o compare.png --json compare.json"),
    "serve": (
        "vptq serve DIR --name small --port 8000",
        "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\",
        '  -d \'{"model": "small", "messages": [{"role": "user", "content": "Hello!"}]}\'',
    ),
    "app": ("vptq app DIR OTHER_DIR --no-published", "SHARE_LINK=1 vptq app DIR"),
    "push": (
        "vptq push DIR me/my-model --dry-run",
        "vptq push DIR me/my-model --eval eval.json",
        "vptq push DIR me/my-model --public",
    ),
    "info": (
        "vptq info DIR",
        "vptq info DIR --indices --picture use.png",
        "vptq info Meta-Llama-3.1-70B-Instruct-v8-k65536-256-woft",
        "vptq info v8-k4096-256",
    ),
    "env": ("vptq env", "vptq env DIR"),
    "doctor": ("vptq doctor", "vptq doctor --hub --json doctor.json"),
}


def epilog(command: str) -> str | None:
    """The end of a command's help text; None where there is no example."""
    lines = "\n".join(f"  {line}" for line in EXAMPLES.get(command, ()))
    # The mark keeps click from filling the lines up.
    return f"\b\nExamples:\n{lines}" if lines else None
