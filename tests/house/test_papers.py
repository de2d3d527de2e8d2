"""README, documentation, Makefile and examples say what is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.versions import SUPPORTED

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What the code allows; nothing was measured.
LIMITS = {"docs/methods/vlash.md: 64 MiB at most", "docs/check.md: 256 MiB of memo"}
TARGETS = ("demo", "test", "lint", "docs", "bench", "nightly")


@pytest.mark.parametrize("target", TARGETS)
def test_make_target(target):
    done = subprocess.run([str(shutil.which("make")), "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"nox --no-error-on-missing-interpreters -s {target}" in done.stdout


def test_ci_runs_lint_and_the_readme_test_command():
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make lint", "make test"]
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_changelog_has_an_unreleased_section():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## Unreleased\n+(### \w+\n+)?- \S", text, re.MULTILINE)


def test_license_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("ecosystem", SUPPORTED)
def test_docs_state_the_supported_versions(ecosystem):
    assert SUPPORTED[ecosystem] in (ROOT / "docs/install.md").read_text()
    assert SUPPORTED[ecosystem] in (ROOT / f"docs/ecosystems/{ecosystem}.md").read_text()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page not in navigation] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs/methods").glob("*.md")), ids=lambda page: page.stem)
def test_every_method_says_when_it_gains_nothing(page):
    assert "\n## When it will not be faster\n" in page.read_text()


def test_generated_tables_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def claims(page):
    """Numbers with the unit of something that was measured, outside of what is generated and of code."""
    unit = (
        r"(\u00d7|x\b|%|percent\b|dB\b|(tokens?|images?|samples?)/s\b|TFLOP|[KMGT]i?B\b|(ms|us|\u00b5s|s|seconds?)\b)"
    )
    number = r"(?<![\w.])\d[\d.,]*\s*"
    text = re.sub(r"<!-- (\w+):begin.*?<!-- \1:end -->", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [match.group() + text[match.end() : match.end() + 8] for match in re.finditer(number + unit, text)]


def test_a_measured_number_is_found(tmp_path):
    """What the next test looks for."""
    page = tmp_path / "page.md"
    page.write_text(
        "3.2x, 45 tokens/s, 20 % more, 12 ms, 1.4 GiB, 28 dB; <!-- figure:begin a -->7x<!-- figure:end -->, K = 3"
    )
    assert [claim.split()[0].rstrip(",") for claim in claims(page)] == ["3.2x", "45", "20", "12", "1.4", "28"]


def test_measured_numbers_come_from_results():
    """A figure such as 3.2x, 45 tokens/s or 12 ms comes from a results file, never from a keyboard."""
    found = {f"{page.relative_to(ROOT)}: {claim}" for page in PAGES for claim in claims(page)}
    assert found == LIMITS


def test_figures_in_sentences_are_up_to_date():
    done = subprocess.run(
        [sys.executable, "benchmarks/figures.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_outside_of_the_site_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:|mailto:)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example(example, tmp_path):
    assert len(example.read_text().splitlines()) <= 60
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
