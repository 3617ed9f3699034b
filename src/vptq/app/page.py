"""The page: one model or two side by side, settings, and live charts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import gradio as gr
import pandas as pd

from vptq.app.chat import Chat
from vptq.app.models import Choice
from vptq.app.monitor import SECONDS, Monitor
from vptq.engine import Engine
from vptq.sampling import Sampling

MOST_CHARACTERS = 20_000
MOST_TOKENS = 4096
CHART_SECONDS = 2.0

History = list[dict[str, Any]]


def make_page(choices: Sequence[Choice], engine: Engine, chat: Chat, monitor: Monitor) -> gr.Blocks:
    """The whole page.

    Args:
        choices: Models to choose from, the one shown first in front.
        engine: Whose speed is charted.
        chat: Who answers.
        monitor: Where the charts come from.
    """
    named = [(choice.label, choice.model) for choice in choices]
    with gr.Blocks(title="vptq", analytics_enabled=False, fill_height=True) as page:
        with gr.Row():
            left_model = gr.Dropdown(named, value=named[0][1], label="Model", elem_id="model")
            right_model = gr.Dropdown(
                named, value=named[-1][1], label="Beside it", visible=False, elem_id="other-model"
            )
            beside = gr.Checkbox(label="Two models side by side", elem_id="beside", scale=0, min_width=220)
        with gr.Row():
            with gr.Column():
                left, left_status = _conversation("left")
            with gr.Column(visible=False) as right_column:
                right, right_status = _conversation("right")
        with gr.Row():
            question = gr.Textbox(
                placeholder="Ask something", show_label=False, max_length=MOST_CHARACTERS, scale=8, elem_id="question"
            )
            send = gr.Button("Send", variant="primary", min_width=80, elem_id="send")
            stop = gr.Button("Stop", variant="stop", min_width=80, elem_id="stop")
            clear = gr.Button("Clear", min_width=80, elem_id="clear")
        with gr.Accordion("Settings", open=False):
            system = gr.Textbox(label="System message", max_length=MOST_CHARACTERS, elem_id="system")
            with gr.Row():
                tokens = gr.Slider(1, MOST_TOKENS, 500, step=1, label="Most tokens of an answer", elem_id="tokens")
                temperature = gr.Slider(
                    0, 2, 0.7, step=0.05, label="Temperature (0: always the likeliest token)", elem_id="temperature"
                )
                top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top-p")
        with gr.Row():
            charts = [
                gr.LinePlot(
                    x="seconds",
                    y=name,
                    title=name,
                    height=170,
                    x_lim=[-SECONDS, 0],
                    y_lim=[0, 100 if name.endswith("(%)") else None],
                    elem_id=f"chart-{number}",
                )
                for number, name in enumerate(_chart_names(monitor))
            ]
        settings = [left_model, right_model, beside, system, tokens, temperature, top_p]
        shown = [left, left_status, right, right_status]

        async def ask(
            question: str, left_model: str, right_model: str, beside: bool, system: str, tokens: float,
            temperature: float, top_p: float, left: History, right: History,
        ) -> AsyncIterator[Any]:  # fmt: skip
            if not question.strip():
                return
            turn = {"role": "user", "content": question[:MOST_CHARACTERS]}
            left, right = [*left, turn], [*right, turn] if beside else right
            done = [left, "", right, ""]
            sampling = Sampling(int(tokens), temperature, top_p)
            told = [{"role": "system", "content": system}] if system else []
            for side, (model, history) in enumerate([(left_model, left), (right_model, right)][: 2 if beside else 1]):
                with chat.asking(model, [*told, *history], sampling) as answer:
                    if side == 0:
                        yield "", *done  # shown while the model reads it
                    async for text, status in answer:
                        reply = [{"role": "assistant", "content": text}] if text else []
                        done[2 * side : 2 * side + 2] = [*history, *reply], status
                        yield gr.skip(), *done  # the next question may be being written

        # One event for the question and its answer: each event takes the way to the server and back.
        answering = gr.on(
            [question.submit, send.click],
            ask,
            [question, *settings, left, right],
            [question, *shown],
            show_progress="hidden",
        )
        stop.click(None, cancels=[answering])
        clear.click(lambda: ([], "", [], ""), None, shown, queue=False, cancels=[answering])
        beside.change(
            lambda on: (gr.update(visible=on), gr.update(visible=on)),
            beside,
            [right_model, right_column],
            queue=False,
            show_progress="hidden",
        )
        left_model.change(lambda: ([], ""), None, [left, left_status], queue=False, cancels=[answering])
        right_model.change(lambda: ([], ""), None, [right, right_status], queue=False, cancels=[answering])

        # A coroutine, so that it always runs in the same thread: see Monitor.
        async def draw() -> list[pd.DataFrame]:
            monitor.sample(engine.tokens)
            return _charts(monitor)

        gr.Timer(CHART_SECONDS).tick(draw, None, charts, show_progress="hidden", concurrency_limit=None)
    return page


def _conversation(side: str) -> tuple[gr.Chatbot, gr.Markdown]:
    chatbot = gr.Chatbot(show_label=False, height=380, buttons=["copy"], elem_id=side, allow_file_downloads=False)
    return chatbot, gr.Markdown(elem_id=f"{side}-status")


def _chart_names(monitor: Monitor) -> tuple[str, str, str]:
    return f"{monitor.device} use (%)", f"{monitor.device} memory (GB)", "tokens/s"


def _charts(monitor: Monitor) -> list[pd.DataFrame]:
    """The samples as Gradio's plots take them: seconds before now, and one figure each."""
    samples = list(monitor.samples)
    seconds = [sample.when - samples[-1].when for sample in samples]
    figures = ([s.busy for s in samples], [s.memory for s in samples], [s.speed for s in samples])
    return [
        pd.DataFrame({"seconds": seconds, name: values})
        for name, values in zip(_chart_names(monitor), figures, strict=True)
    ]
