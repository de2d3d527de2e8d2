"""A chat in the browser; every visitor has a conversation, and a cache, of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr

from pronghorn.awq.chat import Chat, Turn

Shown = list[dict[str, str]]


def build_demo(model: Any, tokenizer: Any, **chat: Any) -> gr.Blocks:
    """The page; `launch()` serves it.

    Args:
        model: the language model. One conversation runs at a time.
        tokenizer: its tokenizer, which needs a chat template.
        chat: further arguments of `Chat`.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    Chat(model, tokenizer, **chat)  # what cannot work is said now and not to the first visitor

    def answer(message: str, shown: Shown, session: Chat | None) -> Iterator[tuple[Shown, Chat, str, str]]:
        session = session or Chat(model, tokenizer, **chat)
        shown = [*shown, {"role": "user", "content": message}, {"role": "assistant", "content": ""}]
        for piece in _pieces(session, message):
            if isinstance(piece, Turn):
                shown[-1]["content"] = piece.text
                yield shown, session, "", _report(piece)
            else:
                shown[-1]["content"] += piece
                yield shown, session, "", ""

    with gr.Blocks(title="Pronghorn chat", analytics_enabled=False) as page:
        session = gr.State(None)
        conversation = gr.Chatbot(label="Conversation", height=480)
        report = gr.Markdown(elem_id="report")
        box = gr.Textbox(label="Message", placeholder="Ask something and press Enter", autofocus=True)
        box.submit(answer, [box, conversation, session], [conversation, session, box, report], concurrency_limit=1)
        anew = gr.Button("New conversation")
        anew.click(lambda: ([], None, "", ""), None, [conversation, session, box, report])
    return page


def _pieces(session: Chat, message: str) -> Iterator[str | Turn]:
    """The answer piece by piece as it comes, and at last what it cost."""
    pieces: queue.SimpleQueue[str | Turn | Exception] = queue.SimpleQueue()

    def work() -> None:
        try:
            pieces.put(session.ask(message, pieces.put))
        except Exception as error:  # noqa: BLE001 - the page shows it; the server goes on
            pieces.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        piece = pieces.get()
        if isinstance(piece, Exception):
            raise gr.Error(str(piece)) from piece
        yield piece
        if isinstance(piece, Turn):
            return


def _report(turn: Turn) -> str:
    return (
        f"{turn.prompt_tokens} tokens, {turn.reused_tokens} of them cached; first token after "
        f"{turn.first_token_seconds:.2f} s, then {turn.tokens_per_second:.1f} tokens/s"
    )
