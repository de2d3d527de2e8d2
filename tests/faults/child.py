"""Work in processes of its own, which faults may end or change."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_as_program(file: str, *arguments: object, seconds: float = 500) -> Any:
    """Run a file of tests as a program, and read the JSON of the last line that it prints."""
    done = finished_program(file, *arguments, seconds=seconds)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def finished_program(file: str, *arguments: object, seconds: float = 500) -> subprocess.CompletedProcess[str]:
    """Run a file of tests as a program, to whatever end."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, file, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=env, check=False)


def in_a_fork(work: Callable[..., object], *arguments: Any) -> int:
    """The wait status of a forked process that does the work; fork a program with one thread, not pytest."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work(*arguments)
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    return os.waitpid(pid, 0)[1]
