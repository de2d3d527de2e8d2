"""`pytest --reliability FILE`: keeps what tests of faults proved and measured, for docs/reliability.md.

FILE is merged into, so that a part of the tests can be run anew, and LeRobot's in their own environment. All cases of a
test are replaced together, and tests that are gone are forgotten.
"""

import datetime
import json
import os
import platform
import re
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS, FIGURE = "fault rows", "figure: "  # names of a report's properties
WRITE_SECONDS = 60
PACKAGES = ("torch", "triton", "transformers", "vllm", "diffusers", "trl", "lerobot")


def pytest_addoption(parser):
    parser.addoption("--reliability", metavar="FILE", help="merge what tests of faults proved into this JSON file")


def pytest_configure(config):
    path = config.getoption("--reliability")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(path)), "reliability")


def pytest_collection_modifyitems(items):
    for item in items:
        rows = sorted({row for mark in item.iter_markers("fault") for row in mark.args})
        if rows:
            # Properties are what a report carries from a worker to where it is written.
            item.user_properties.append((ROWS, rows))


class Recorder:
    """Collects the reports of tests that bear `fault`, and writes them at the end.

    Before it they go to a file beside it, lest a run be killed: tests of the run itself read the pages made from FILE.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unfinished = path.with_suffix(".unfinished")
        self.run = run_of_now()
        self.written = time.monotonic()
        self.tests: dict[str, dict] = {}
        self.finished: set[str] = set()  # torn down; what an interrupted run had begun proves nothing

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if ROWS not in properties:
            return
        name = re.sub(r"@[^\]]*$", "", report.nodeid)  # xdist adds the group
        test = self.tests.setdefault(name, {"rows": properties[ROWS], "outcome": "passed", "seconds": 0.0})
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        test["figures"] = {key.removeprefix(FIGURE): value for key, value in properties.items() if FIGURE in key}
        if report.outcome != "passed" and test["outcome"] != "failed":
            test["outcome"] = report.outcome
            if report.outcome == "skipped":
                test["reason"] = skip_reason(report)
        if report.when == "teardown":
            self.finished.add(name)
        if time.monotonic() - self.written > WRITE_SECONDS:
            self.written = time.monotonic()
            merge(self.path, self.run, self.proved(), self.unfinished)

    def pytest_sessionfinish(self):
        if self.finished:
            merge(self.path, self.run, self.proved())
        self.unfinished.unlink(missing_ok=True)

    def proved(self) -> dict[str, dict]:
        """Tests that ran to their end."""
        return {name: test for name, test in self.tests.items() if name in self.finished}


def skip_reason(report) -> str:
    """Why a test was skipped, or is known to fail."""
    if hasattr(report, "wasxfail"):
        return f"fails, as is known: {report.wasxfail}"
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def function_of(name: str) -> str:
    """A test's id without its case."""
    return name.split("[")[0]


def is_there(name: str) -> bool:
    """Whether the function of a recorded test still exists."""
    file, *_, function = function_of(name).split("::")
    path = ROOT / file
    return path.exists() and f"def {function}(" in path.read_text()


def merge(path: Path, run: dict, tests: dict[str, dict], into: Path | None = None) -> None:
    """Write tests of a run, and those of others that a file holds, into that file or another."""
    into = into or path
    content = json.loads(path.read_text()) if path.exists() else {"topic": "reliability", "runs": {}, "tests": {}}
    ran = {function_of(name) for name in tests}
    kept = {name: test for name, test in content["tests"].items() if function_of(name) not in ran and is_there(name)}
    found = dict(sorted({**kept, **{name: {**test, "run": run["date"]} for name, test in tests.items()}}.items()))
    needed = {test["run"] for test in found.values()}
    runs = {date: entry for date, entry in {**content["runs"], run["date"]: run}.items() if date in needed}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(test)}" for name, test in found.items())
    head = json.dumps({"topic": "reliability", "runs": runs}, indent=1)[:-2]
    part = into.with_suffix(".part")
    part.write_text(f'{head},\n "tests": {{\n{lines}\n}}}}\n')
    part.replace(into)


def run_of_now() -> dict:
    """When, where and of what a run is; `dirty` if tracked files differ from the commit, results apart."""
    import torch

    from pronghorn.checkpoint.provenance import git
    from pronghorn.versions import versions

    gpu = torch.cuda.is_available()
    changed = git(ROOT, "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results", ":!docs")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()}-core {platform.machine()} CPU",
        "commit": os.environ.get("PRONGHORN_COMMIT") or git(ROOT, "rev-parse", "HEAD"),
        "dirty": os.environ.get("PRONGHORN_DIRTY", str(bool(changed))) == "True",
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
    }
