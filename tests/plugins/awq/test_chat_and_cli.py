"""Chat with a cache that stays, perplexity, and the awq commands on a model with a tokenizer."""

import json

import pytest
import torch
from tests.models import tiny_model
from tests.plugins.conftest import TEMPLATE
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pronghorn.awq.bench import ContextSpeed, FollowUpSpeed, rehearse
from pronghorn.awq.chat import Chat
from pronghorn.awq.cli import app
from pronghorn.awq.evaluate import perplexity


@pytest.mark.parametrize("capacity", [None, 256])
def test_follow_ups_prefill_new_tokens_only(letters, capacity):
    model = AutoModelForCausalLM.from_pretrained(letters, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(letters)
    chat = Chat(model, tokenizer, max_new_tokens=8, capacity=capacity, do_sample=False)
    widths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    pieces = []
    first = chat.ask("hello there", pieces.append)
    assert first.reused_tokens == 0
    assert widths[0] == first.prompt_tokens
    assert "".join(pieces).strip() == first.text.strip()
    widths.clear()
    second = chat.ask("and again")
    assert second.reused_tokens >= first.prompt_tokens - 1
    assert widths[0] == second.prompt_tokens - second.reused_tokens
    assert second.first_token_seconds > 0

    fresh = Chat(model, tokenizer, max_new_tokens=8, do_sample=False)
    fresh.messages = chat.messages[:2]
    assert fresh.ask("and again").text == second.text


@pytest.mark.parametrize("capacity", [None, 256])
@pytest.mark.parametrize("rewritten", [0, 20])
def test_a_history_that_was_rewritten_is_prefilled_from_there(letters, capacity, rewritten):
    model = AutoModelForCausalLM.from_pretrained(letters, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(letters)
    chat = Chat(model, tokenizer, max_new_tokens=8, capacity=capacity, do_sample=False)
    chat.ask("hello there, what is the time?")
    question = chat.messages[0]["content"]
    chat.messages[0]["content"] = question[:rewritten] + "?" + question[rewritten:]
    chat.messages[0]["role"] = "user" if rewritten else "person"
    found = chat.ask("and again")
    assert found.reused_tokens == (len("<u>") + rewritten if rewritten else 1)
    fresh = Chat(model, tokenizer, max_new_tokens=8, do_sample=False)
    fresh.messages = chat.messages[:2]
    assert fresh.ask("and again").text == found.text


@pytest.mark.parametrize("capacity", [None, 256])
def test_an_interrupted_turn_leaves_nothing_in_the_cache(letters, capacity):
    model = AutoModelForCausalLM.from_pretrained(letters, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(letters)

    def interrupt(text):
        raise KeyboardInterrupt

    chat = Chat(model, tokenizer, max_new_tokens=8, capacity=capacity, do_sample=False)
    chat.ask("hello there")
    with pytest.raises(KeyboardInterrupt):
        chat.ask("something else entirely", interrupt)
    fresh = Chat(model, tokenizer, max_new_tokens=8, do_sample=False)
    fresh.messages = list(chat.messages)
    assert chat.ask("and again").text == fresh.ask("and again").text


def test_a_chat_that_outgrows_its_cache_says_so(letters):
    model = AutoModelForCausalLM.from_pretrained(letters, dtype=torch.float32)
    chat = Chat(model, AutoTokenizer.from_pretrained(letters), max_new_tokens=8, capacity=30, do_sample=False)
    chat.ask("hello")
    with pytest.raises(ValueError, match="capacity is 30"):
        chat.ask("this is a longer question")


def test_a_chat_needs_a_template_and_a_message(letters):
    model, tokenizer = tiny_model("llama"), AutoTokenizer.from_pretrained(letters)
    with pytest.raises(ValueError, match="message: empty"):
        Chat(model, tokenizer).ask("  ")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Chat(model, tokenizer)


def test_perplexity_of_a_uniform_model(letters):
    model, tokenizer = tiny_model("llama"), AutoTokenizer.from_pretrained(letters)
    model.lm_head.weight.data.zero_()
    found = perplexity(model, tokenizer, "some text of letters " * 9, window=32, progress=False)
    assert found.perplexity == pytest.approx(128, rel=1e-4)  # every token of the vocabulary equally likely
    assert found.tokens == 189 - 6
    with pytest.raises(ValueError, match="too few"):
        perplexity(model, tokenizer, "x", progress=False)


def call(*arguments, **options):
    found = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


def test_commands_from_search_to_chat(letters, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    how = ["--group-size", 32, "--data", data, "--samples", 4, "--seq-len", 64, "--device", "cpu", "--dtype", "float32"]
    dry = call("search", letters, tmp_path / "awq.pt", *how, "--dry-run")
    assert "peak memory" in dry.output
    assert not (tmp_path / "awq.pt").exists()
    assert "scales" in call("search", letters, tmp_path / "awq.pt", *how).output

    packing = ["--group-size", 32, "--device", "cpu", "--dtype", "float32"]
    call("pack", letters, tmp_path / "awq.pt", tmp_path / "packed", *packing)
    call("quantize", letters, tmp_path / "quantized", *how, "--state", tmp_path / "state")
    packed, quantized = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("packed", "quantized"))
    assert all(
        torch.equal(a, b) for a, b in zip(packed.state_dict().values(), quantized.state_dict().values(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "packed").chat_template == TEMPLATE

    with pytest.raises(FileExistsError):
        call("quantize", letters, tmp_path / "quantized", *how)
    call("convert", tmp_path / "packed", tmp_path / "v2", "--to", "gemv")
    written = json.loads((tmp_path / "v2" / "config.json").read_text())
    assert written["quantization_config"]["version"] == "gemv"
    assert (
        "perplexity"
        in call("eval", tmp_path / "v2", "--text", data, "--windows", 2, "--window", 64, "--device", "cpu").output
    )

    spoken = call(
        "chat", tmp_path / "v2", "--greedy", "--max-new-tokens", 5, "--device", "cpu", input="hello\nmore\n\n"
    )
    assert spoken.output.count("tokens/s]") == 2
    assert ", 0 of them cached" in spoken.output


@pytest.mark.fault(9)
def test_the_progress_of_another_run_is_refused_or_given_up(letters, tmp_path):
    data, out = tmp_path / "data.txt", tmp_path / "awq.pt"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 4)
    how = ["--group-size", 32, "--data", data, "--samples", 1, "--seq-len", 32, "--no-clip", "--state", tmp_path / "s"]
    call("search", letters, out, *how, "--device", "cpu")
    with pytest.raises(ValueError, match=r"differ: awq\.bits\. .*--force"):
        call("search", letters, out, *how, "--device", "cpu", "--bits", 3)
    assert "scales" in call("search", letters, out, *how, "--device", "cpu", "--bits", 3, "--force").output


@pytest.mark.fault(8, 9)
@pytest.mark.parametrize("command", ["search", "quantize"])
def test_force_gives_nothing_up_before_the_work(letters, tmp_path, command):
    data, state, out = tmp_path / "data.txt", tmp_path / "state", tmp_path / "out"
    data.write_text("the quick brown fox jumps over the lazy dog. " * 4)
    how = ["--group-size", 32, "--data", data, "--samples", 1, "--seq-len", 32, "--no-clip", "--device", "cpu",
           "--state", state]  # fmt: skip
    call("search", letters, tmp_path / "awq.pt", *how)
    held = {path.name: path.read_bytes() for path in state.iterdir()}
    for model, changes in ((tmp_path / "nothing", ()), (tmp_path / "nothing", ["--dry-run"]),
                           (letters, ["--bits", 5]), (letters, ["--dtype", "float12"]),
                           (letters, ["--group-size", 48])):  # fmt: skip
        with pytest.raises((OSError, ValueError)):
            call(command, model, out, *how, "--force", *changes)
    assert "peak memory" in call(command, letters, out, *how, "--bits", 3, "--force", "--dry-run").output
    assert {path.name: path.read_bytes() for path in state.iterdir()} == held


def test_three_bits_by_default_in_our_own_format(letters, tmp_path):
    how = ["--bits", 3, "--group-size", 32, "--rtn", "--device", "cpu", "--dtype", "float32"]
    assert "version natural" in call("quantize", letters, tmp_path / "q", *how).output
    with pytest.raises(ValueError, match="bits"):
        call("quantize", letters, tmp_path / "r", "--bits", 5, "--device", "cpu")
    assert not (tmp_path / "r").exists()


def test_bench_measures_contexts_and_follow_ups(letters, tmp_path):
    out = tmp_path / "speeds.json"
    folder = tmp_path / "packed"
    runner = CliRunner()
    made = runner.invoke(app, ["quantize", str(letters), str(folder), "--rtn", "--group-size", "32"])
    assert made.exit_code == 0, made.output
    how = ["--contexts", "8,16", "--histories", "40", "--new-tokens", "4", "--repeats", "2", "--json", str(out)]
    result = runner.invoke(app, ["bench", str(folder), *how])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [row["context"] for row in found["contexts"]] == [8, 16]
    for row in found["contexts"]:
        for name in ("tokens_per_second", "first_token_seconds"):
            assert len(row[name]) == 2
            assert min(row[name]) > 0
    assert found["follow_ups"][0]["history"] == 40
    assert "history     40" in result.output
    out.unlink()
    assert "one of 2 repeats" in call("bench", folder, *how, "--dry-run").output
    assert not out.exists()
    refused = runner.invoke(app, ["bench", str(folder), "--contexts", "100000"])
    assert refused.exit_code != 0
    assert "lengths" in str(refused.exception) + refused.output
    assert runner.invoke(app, ["bench", str(folder), "--contexts", "8,many"]).exit_code == 2


def test_a_rehearsal_of_the_bench_counts_all_repeats(monkeypatch):
    """A repeat is a first token, and a first token with those after it; of histories, with the cache and without."""
    speeds, turns = [ContextSpeed(8, [1.0], [0.5])], [FollowUpSpeed(40, [1.0], [2.0])]
    monkeypatch.setattr("pronghorn.awq.bench.context_speeds", lambda *_, new_tokens, repeats: speeds * repeats)
    monkeypatch.setattr("pronghorn.awq.bench.follow_up_speeds", lambda *_, repeats: turns * repeats)
    said = rehearse(tiny_model("llama"), [8], [40], new_tokens=4, repeats=11)
    assert said.seconds == pytest.approx(10 * (1 + (1 + 3 / 0.5) + 1 + 2), abs=1)
    assert said.memory_bytes > 0
