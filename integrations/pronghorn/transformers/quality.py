"""The report of a language model that is changed in place: asked before, asked after, written beside the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pronghorn.checkpoint.card import Report, write_report
from pronghorn.transformers.answers import PROMPT, agreement, digest, observe, positions_of, windows

UNMEASURED = (ValueError, RuntimeError, MemoryError)  # NaN in a model's answers, or no memory for them
USAGE = """from transformers import AutoModelForCausalLM, AutoTokenizer

import pronghorn.transformers

model = AutoModelForCausalLM.from_pretrained("CHECKPOINT")
tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")"""


class QualityReport:
    """Compares a model with what it was.

    Args:
        model: a causal language model of transformers, as it is before the change; it is asked now.
        tokenizer: its tokenizer, or None.
        source: folder or hub name that it was loaded from.
        base_model: what the card calls the source, where its folder's name would not do.
        length: tokens of a window, where the usual ones are too short for the change to show.

    Raises:
        ValueError: its logits hold NaN or Inf.
    """

    def __init__(
        self, model: Any, tokenizer: Any, source: str, *, base_model: str | None = None, length: int | None = None
    ) -> None:
        text = model.config.get_text_config()
        self.tokenizer, self.source, self.base_model = tokenizer, source, base_model
        longest = positions_of(text.to_dict())
        self.ids = windows(tokenizer, text.vocab_size, longest=longest, length=length)
        self.before = observe(model, self.ids)

    def write(
        self,
        folder: Path,
        model: Any,
        *,
        method: str,
        recipe: Mapping[str, Any],
        tags: tuple[str, ...] = (),
        seed: int | None = None,
        figures: Mapping[str, Any] | None = None,
        usage: str = USAGE,
        make_cache: Callable[[], Any] | None = None,
        chunk: int | None = None,
        name: str | None = None,
    ) -> Report:
        """Ask the changed model, and write `quality.json` and `README.md` into its checkpoint's folder.

        Args:
            folder: of the checkpoint, which is complete.
            model: after the change.
            method: its name, as people read it.
            recipe: the configuration that made it.
            tags: for the Hub's search.
            seed: of what was drawn for the change.
            figures: more of them, measured by the method.
            usage: Python that loads the checkpoint.
            make_cache: see `observe`.
            chunk: see there.
            name: see `write_report`.

        Raises:
            ValueError: the changed model's logits hold NaN or Inf; no report is written.
        """
        after = observe(model, self.ids, make_cache=make_cache, chunk=chunk)
        found = asdict(agreement(self.before, after))
        layers = found.pop("layers")
        named = {
            "top-1 agreement": found["top1"], "KL divergence, nats a token": found["kl"],
            "tokens": found["tokens"], **(figures or {}), "layers": layers,
        }  # fmt: skip
        data = "random token ids" if self.tokenizer is None else "Python's language reference, topics kept for this"
        report = Report(
            method=method, source=self.source, library_name="transformers", recipe=recipe, figures=named,
            data=f"{data} ({found['tokens']} tokens, SHA-256 of the ids {digest(self.ids)[:16]})",
            usage=usage, texts=self._texts(after.generated), tags=tags, seed=seed, base_model=self.base_model,
            seconds=self.before.seconds + after.seconds,
        )  # fmt: skip
        write_report(folder, report, name)
        return report

    def _texts(self, generated: list[int]) -> dict[str, str]:
        asked = self.ids[0][0, :PROMPT].tolist()
        texts = {"Asked": asked, "The source goes on": self.before.generated, "This one goes on": generated}
        return {
            whose: str(ids) if self.tokenizer is None else self.tokenizer.decode(ids) for whose, ids in texts.items()
        }
