"""Needles, pass codes, LongBench and pictures; the model is a function that answers."""

import json

import pytest
import torch

from pronghorn.duoattention import metrics
from pronghorn.duoattention.longbench import METRICS, NEW_TOKENS, evaluate_file, load_prompts
from pronghorn.duoattention.niah import NEEDLE, NeedleGrid, needle_prompt, run_grid
from pronghorn.duoattention.pass_codes import pass_codes, retrieved
from pronghorn.duoattention.plot import plot_gates, plot_needles

TEXT = ["The fox ran. The owl slept. The river was wide. " * 40]
PNG = b"\x89PNG"


class Bytes:
    """A tokenizer of single bytes."""

    def encode(self, text, add_special_tokens=True):
        return [256] * add_special_tokens + list(text.encode())

    def decode(self, ids, skip_special_tokens=True):
        return bytes(int(token) for token in ids if token < 256).decode()


def says(text):
    return lambda ids, new_tokens, simulated=0: torch.tensor(list(text.encode()))


def test_a_needle_stands_after_a_sentence():
    text = Bytes().encode(TEXT[0], add_special_tokens=False)
    for depth in (0.0, 0.33, 1.0):
        prompt = Bytes().decode(needle_prompt(Bytes(), text, 1000, depth)[0])
        before, after = prompt.split("<book> ")[1].split(NEEDLE)
        assert not before or before.endswith(".") or depth == 1.0
        assert abs(len(before) / (len(before) + len(after.split(" </book>")[0])) - depth) < 0.05
        assert len(prompt.split("<book> ")[1].split(" </book>")[0]) == 800


@pytest.mark.fault(8)
def test_a_grid_is_scored_and_resumed(tmp_path):
    grid = NeedleGrid.between(400, 900, 3, 4)
    assert (grid.lengths, grid.depths[0], grid.depths[-1]) == ([400, 650, 900], 0.0, 1.0)
    asked = []

    def answer(ids, new_tokens):
        asked.append(ids.shape[1])
        if len(asked) == 5:
            raise KeyboardInterrupt
        return says(NEEDLE if len(asked) % 2 else "I do not know")(ids, new_tokens)

    options = {"path": tmp_path / "niah.json", "settings": {"sparsity": 0.5}}
    with pytest.raises(KeyboardInterrupt):
        run_grid(answer, Bytes(), TEXT, grid, **options)
    scores = run_grid(answer, Bytes(), TEXT, grid, **options)
    assert len(asked) == 3 * 4 + 1  # what was answered is not asked again
    assert scores[0][0] == 10.0
    assert scores[1][0] < 2
    assert (len(scores), len(scores[0])) == (4, 3)
    with pytest.raises(ValueError, match="sparsity"):
        run_grid(answer, Bytes(), TEXT, grid, **{**options, "settings": {"sparsity": 0.25}})
    (tmp_path / "niah.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        run_grid(answer, Bytes(), TEXT, grid, **options)
    with pytest.raises(ValueError, match="haystack"):
        run_grid(answer, Bytes(), [], grid, path=tmp_path / "other.json", settings={})


@pytest.mark.parametrize("numbers", [(100, 900, 3, 4), (900, 400, 3, 4), (400, 900, 0, 4)])
def test_what_is_no_grid(numbers):
    with pytest.raises(ValueError, match="lengths"):
        NeedleGrid.between(*numbers)


def test_pass_codes():
    cases = pass_codes(5, before=2, after=3)
    assert cases == pass_codes(5, before=2, after=3)
    assert all(case.prompt.count(case.code) == 1 for case in cases)
    assert retrieved(says(f" {cases[2].code}."), Bytes(), cases) == 1


def test_scores_of_answers():
    assert metrics.qa_f1("The Eiffel Tower!", "eiffel tower") == 1
    assert metrics.qa_f1("in Paris", "Paris") == pytest.approx(2 / 3)
    assert metrics.qa_f1("", "Paris") == 0
    assert metrics.rouge_l("a b c d", "a x c d") == pytest.approx(3 / 4)
    assert metrics.rouge_l("d c b a", "a b c d") == pytest.approx(1 / 4)
    assert metrics.rouge_1("Sit in the park.", "sit in a park") == pytest.approx(3 / 4)
    assert metrics.classification("it is animal or plant", "animal", ["animal", "plant", "city"]) == 0.5
    assert metrics.classification("football player", "football player", ["football", "football player"]) == 1
    assert metrics.classification("city", "animal", ["animal", "city"]) == 0
    assert metrics.count("3, or maybe 4 or 3", "3") == pytest.approx(2 / 3)
    assert metrics.retrieval("Paragraph 12", "Paragraph 12") == 1
    assert metrics.retrieval_zh("12", "段落12") == 1
    assert metrics.code_similarity("# note\nreturn x", "return x") == 1
    with pytest.raises(ValueError, match="reference"):
        metrics.retrieval("1", "none")


def test_chinese_texts_need_jieba(monkeypatch):
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "jieba", SimpleNamespace(cut=lambda text, cut_all: list(text)))
    assert metrics.qa_f1_zh("北京。", "北京") == 1
    assert metrics.rouge_l_zh("北京", "南京") == 0.5
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ModuleNotFoundError, match="jieba"):
        metrics.qa_f1_zh("北京", "北京")


def samples(path, count=3, **changes):
    line = {"input": "Who?", "context": "x" * 300, "answers": ["Ada", "Ada Lovelace"], **changes}
    path.write_text("".join(json.dumps(line) + "\n" for _ in range(count)))
    return path


def test_a_data_set_is_answered_and_scored(tmp_path):
    path, asked = samples(tmp_path / "qasper.jsonl"), []

    def answer(ids, new_tokens, simulated):
        asked.append((Bytes().decode(ids[0]), new_tokens, simulated))
        return says("Ada Byron")(ids, new_tokens)

    options = {"max_length": 100, "answers": tmp_path / "answers.json", "settings": {}}
    prompts = {"qasper": "Read: {context} Question: {input} {}"}
    found = evaluate_file(answer, Bytes(), path, prompts, **options)
    assert (found.dataset, found.metric, found.samples) == ("qasper", "qa_f1", 3)
    assert found.score == pytest.approx(100 * 2 / 3)
    prompt, new_tokens, simulated = asked[0]
    assert (new_tokens, simulated) == (128, 50)
    assert prompt.startswith("Read: xxx")  # the middle is cut out
    assert prompt.endswith("xxx Question: Who? {}")
    evaluate_file(answer, Bytes(), path, prompts, **options)
    assert len(asked) == 3
    with pytest.raises(ValueError, match="max_length"):
        evaluate_file(answer, Bytes(), path, prompts, **{**options, "max_length": 90})


def test_only_the_first_line_of_some_answers_counts(tmp_path):
    path = samples(tmp_path / "data.jsonl", 1, dataset="trec", answers=["city"], all_classes=["city", "animal"])
    options = {"max_length": 1000, "answers": tmp_path / "answers.json", "settings": {}}
    assert evaluate_file(says("\ncity\nanimal"), Bytes(), path, {}, **options).score == 100


def test_every_data_set_has_a_length_and_a_metric():
    assert NEW_TOKENS.keys() == METRICS.keys()
    assert len(METRICS) == 21


@pytest.mark.parametrize(("content", "message"), [
    ("", "no samples"), ("{", "line 1"), ('{"input": "a"}', "context, answers"),
    ('{"input": "a", "context": "b", "answers": ["c"]}', "unknown data set"),
])  # fmt: skip
def test_bad_data_are_refused(tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate_file(says("a"), Bytes(), path, {}, max_length=10, answers=tmp_path / "a.json", settings={})


def test_prompts_are_a_file_of_templates(tmp_path):
    assert load_prompts(None) == {}
    (tmp_path / "prompts.json").write_text('{"trec": 3}')
    with pytest.raises(ValueError, match="templates"):
        load_prompts(tmp_path / "prompts.json")


def test_pictures(tmp_path):
    plot_gates([[0.1, 0.9], [1.2, -0.1], [0.5, 0.5]], tmp_path / "gates.png")
    plot_needles([[10.0, 3.0]], [1000, 2000], [50.0], tmp_path / "niah.png")
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in ("gates.png", "niah.png"))
