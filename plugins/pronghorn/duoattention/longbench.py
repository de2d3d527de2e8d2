"""LongBench on data that the user has: prompts, answers and scores by data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pronghorn.duoattention import metrics
from pronghorn.duoattention.kept_answers import KeptAnswers, rehearse
from pronghorn.estimate import Estimate

SIMULATED = 50  # last tokens of a prompt that are read one by one, so that streaming heads are asked to decode
PLAIN = "{context}\n\n{input}"
NEW_TOKENS = {
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
    **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
    **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"), 64),
    **dict.fromkeys(
        ("hotpotqa", "2wikimqa", "musique", "triviaqa", "passage_count", "passage_retrieval_en",
         "passage_retrieval_zh"), 32,
    ),
}  # fmt: skip
METRICS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(
        ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"), metrics.qa_f1
    ),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), metrics.rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), metrics.rouge_l_zh),
    **dict.fromkeys(("trec", "lsht"), metrics.classification),
    **dict.fromkeys(("lcc", "repobench-p"), metrics.code_similarity),
    "multifieldqa_zh": metrics.qa_f1_zh,
    "passage_count": metrics.count,
    "passage_retrieval_en": metrics.retrieval,
    "passage_retrieval_zh": metrics.retrieval_zh,
}
ONE_LINE = ("trec", "triviaqa", "samsum", "lsht")  # of whose answers only the first line counts


@dataclass(frozen=True)
class DatasetScore:
    """The score of one data set.

    Attributes:
        dataset: its name.
        metric: how it is scored.
        score: mean over the samples of the best reference's, in percent.
        samples: how many.
    """

    dataset: str
    metric: str
    score: float
    samples: int


def load_prompts(path: Path | None) -> dict[str, str]:
    """LongBench's `dataset2prompt.json`: templates with {context} and {input}; without it a plain one is taken.

    Raises:
        ValueError: the file is not such an object.
    """
    if path is None:
        return {}
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ValueError(f"{path}: wanted an object of templates by data set")
    return content


def evaluate_file(
    answer: Callable[[Tensor, int, int], Tensor],
    tokenizer: Any,
    path: Path,
    prompts: dict[str, str],
    *,
    max_length: int,
    answers: Path,
    settings: dict[str, Any],
    limit: int | None = None,
) -> DatasetScore:
    """Answer and score one data set.

    Args:
        answer: prompt ids [1, tokens], a number of new tokens, and how many of the prompt's last tokens are read one
            by one, to new ids; such as `Answer`.
        tokenizer: of the model.
        path: JSONL with LongBench's fields `input`, `context`, `answers`, `all_classes` and maybe `dataset`, which the
            file's name stands for otherwise.
        prompts: from `load_prompts`.
        max_length: tokens of a prompt; longer ones lose their middle.
        answers: JSON file that keeps the answers; the same call goes on where it was.
        settings: what the answers depend on, for that file.
        limit: samples to take.

    Raises:
        ValueError: an unknown data set, a line that lacks a field, no samples, or a file of other settings.

    Source: Bai et al., LongBench (arXiv 2308.14508). ROUGE-L is that of all words, not joined from sentences.
    """
    name, samples = _samples(path, limit)
    template, metric = prompts.get(name, PLAIN), METRICS[name]
    kept = KeptAnswers(answers, {**settings, "max_length": max_length, "template": template, "data": path.name})
    scores = []
    for index, sample in enumerate(tqdm(samples, desc=name, disable=None)):
        found = kept.get(str(index))
        if found is None:
            ids = _prompt(tokenizer, template, sample, max_length)
            found = tokenizer.decode(answer(ids, NEW_TOKENS[name], SIMULATED), skip_special_tokens=True)
            kept.keep(str(index), found)
        scores.append(_score(metric, name, found, sample))
    return DatasetScore(name, metric.__name__, 100 * sum(scores) / len(scores), len(scores))


def rehearse_file(
    answer: Callable[[Tensor, int, int], Tensor],
    tokenizer: Any,
    path: Path,
    prompts: dict[str, str],
    *,
    max_length: int,
    settings: dict[str, Any],
    device: torch.device,
    limit: int | None = None,
) -> Estimate:
    """What the answers to a data set take, from those to a few of its samples.

    Args:
        answer: as for `evaluate_file`, as all others are.
        tokenizer: likewise.
        path: likewise.
        prompts: likewise.
        max_length: likewise.
        settings: likewise.
        device: of the model.
        limit: as for `evaluate_file`.

    Raises:
        ValueError: as there.
    """
    name, samples = _samples(path, limit)
    template = prompts.get(name, PLAIN)
    settings = {**settings, "max_length": max_length, "template": template, "data": path.name}
    lengths = [_prompt(tokenizer, template, sample, max_length).shape[1] for sample in samples]

    def ask(index: int) -> str:
        ids = _prompt(tokenizer, template, samples[index], max_length)
        return str(tokenizer.decode(answer(ids, NEW_TOKENS[name], SIMULATED), skip_special_tokens=True))

    return rehearse(lengths, ask, settings, device, f"samples of {name}")


def _prompt(tokenizer: Any, template: str, sample: dict[str, Any], max_length: int) -> Tensor:
    # Not str.format: contexts and templates may hold braces of their own.
    prompt = template.replace("{input}", sample["input"]).replace("{context}", sample["context"])
    return torch.tensor([_shortened(tokenizer.encode(prompt), max_length)])


def _score(metric: Callable[..., float], name: str, found: str, sample: dict[str, Any]) -> float:
    if name in ONE_LINE:
        found = found.lstrip("\n").split("\n")[0]
    more = (sample.get("all_classes") or [],) if metric is metrics.classification else ()
    return max((metric(found, reference, *more) for reference in sample["answers"]), default=0.0)


def _samples(path: Path, limit: int | None) -> tuple[str, list[dict[str, Any]]]:
    """A data set's name and its samples."""
    found = []
    for number, line in enumerate(path.read_text().splitlines()[:limit], 1):
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: is not JSON: {error}") from None
        missing = [name for name in ("input", "context", "answers") if name not in sample]
        if missing:
            raise ValueError(f"{path}, line {number}: lacks {', '.join(missing)}")
        found.append(sample)
    if not found:
        raise ValueError(f"{path}: holds no samples")
    name = str(found[0].get("dataset") or path.stem)
    if name not in METRICS:
        raise ValueError(f"{path}: unknown data set {name!r}; known are {', '.join(sorted(METRICS))}")
    return name, found


def _shortened(ids: list[int], limit: int) -> list[int]:
    half = limit // 2
    return ids if len(ids) <= limit else ids[:half] + ids[-half:]
