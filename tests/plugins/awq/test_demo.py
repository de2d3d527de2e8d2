"""The chat page, used in a real browser."""

import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gradio", reason="the demo extra is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from pronghorn.awq.demo import build_demo  # noqa: E402 - after the skips

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture
def page_address(letters, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    model = AutoModelForCausalLM.from_pretrained(letters, dtype=torch.float32)
    page = build_demo(model, AutoTokenizer.from_pretrained(letters), max_new_tokens=8, capacity=120, do_sample=False)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield address
    page.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_two_turns_a_new_conversation_and_an_error(page_address):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page()
        page.goto(page_address)
        box, report = page.get_by_placeholder("Ask something"), page.locator("#report")

        def ask(text):
            box.fill(text)
            box.press("Enter")

        ask("hello there")
        playwright.expect(report).to_contain_text("0 of them cached", timeout=30_000)
        ask("and again")
        playwright.expect(report).not_to_contain_text(" 0 of them cached", timeout=30_000)
        playwright.expect(report).to_contain_text("tokens/s", timeout=30_000)
        playwright.expect(page.get_by_text("hello there")).to_be_visible()
        if folder := os.environ.get("PRONGHORN_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/awq_demo.png")
        ask("this is a question that does not fit into the cache any more, because it is much longer than all of it is")
        playwright.expect(page.get_by_text("capacity is 120")).to_be_visible(timeout=30_000)
        page.get_by_role("button", name="New conversation").click()
        playwright.expect(page.get_by_text("hello there")).not_to_be_visible(timeout=30_000)
        ask("hello")
        playwright.expect(report).to_contain_text(" 0 of them cached", timeout=30_000)
        browser.close()


def test_a_page_needs_a_template(letters):
    tokenizer = AutoTokenizer.from_pretrained(letters)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        build_demo(AutoModelForCausalLM.from_pretrained(letters), tokenizer)
