"""The site as a reader has it: built strictly, then looked at in a browser, at a desk's and at a phone's width."""

import functools
import http.server
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
NAMES = sorted(
    page.relative_to(ROOT / "docs").with_suffix("").as_posix().removesuffix("index")
    for page in (ROOT / "docs").rglob("*.md")
)
LOOK = """() => ({
    title: document.title,
    headings: [...document.querySelectorAll('article :is(h1, h2, h3, h4, h5, h6)')].map(part => +part.tagName[1]),
    wide: document.documentElement.scrollWidth - innerWidth,
    broken: [...document.images].filter(part => !part.complete || !part.naturalWidth).map(part => part.src),
    small: [...document.querySelectorAll('article p, article li, article td')].filter(
        part => part.textContent.trim() && parseFloat(getComputedStyle(part).fontSize) < 11).length,
    links: [...document.querySelectorAll('a[href]')].map(part => part.href),
})"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(site):
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=BROWSER, args=FLAGS)


@functools.cache
def anchors(file):
    """What a page's links may point at."""
    found = {""}

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.update(value for name, value in attributes if name in ("id", "name") and value)

    Reader().feed(file.read_text())
    return found


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("name", NAMES)
def test_a_page(name, width, site, address, browser):
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(address) else route.abort())
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(address + (f"{name}/" if name and not name.endswith("/") else name))
    page.wait_for_load_state("networkidle")
    seen = page.evaluate(LOOK)
    page.close()
    assert errors == []
    assert seen["wide"] <= 0, "the page scrolls sideways"
    assert "Pronghorn" in seen["title"]
    levels = seen["headings"]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert [pair for pair in pairwise(levels) if pair[1] > pair[0] + 1] == []
    assert seen["broken"] == []
    assert seen["small"] == 0
    for link in seen["links"]:
        if link.startswith(address):
            there = urlsplit(link)
            file = site / unquote(there.path).lstrip("/")
            file = file / "index.html" if file.is_dir() else file
            assert file.exists(), link
            assert unquote(there.fragment) in anchors(file) or file.suffix != ".html", link
