"""The injectors themselves: each does what it is named after, and nothing where it is not asked to."""

import importlib.metadata
import mmap
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tests.faults.fail_at_call import FailAtCall
from tests.faults.fake_clock import FakeClock
from tests.faults.fake_distribution import fake_distribution
from tests.faults.leak_slope import leak_slope
from tests.faults.limited_disk import limited_disk
from tests.faults.memory_peak import memory_peak


def child(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_fail_at_call():
    late = FailAtCall(len, 3, ValueError("third"))
    assert [late("a"), late("ab")] == [1, 2]
    assert not late.fired
    with pytest.raises(ValueError, match="third"):
        late("abc")
    assert late.fired
    assert late("abcd") == 4


KILLED = (
    "import os; from tests.faults.kill_at import KillAt; at = KillAt({}, [(os, 'getpid'), (os, 'getppid')]);"
    "print('one', flush=True); os.getppid(); print('two', flush=True); os.getppid(); print(at.count, flush=True)"
)


def test_kill_at():
    counted, killed = child(KILLED.format(0)), child(KILLED.format(2))
    assert (counted.returncode, counted.stdout.split()) == (0, ["one", "two", "2"])
    assert (killed.returncode, killed.stdout.split()) == (-signal.SIGKILL, ["one", "two"])


def test_limited_disk(tmp_path):
    with limited_disk(1000):
        (tmp_path / "small").write_bytes(bytes(1000))
        with pytest.raises(OSError, match="too large"):
            (tmp_path / "large").write_bytes(bytes(1001))
    (tmp_path / "large").write_bytes(bytes(1001))


def test_limited_memory():
    """In a child, which without the limit gets what it asks for."""
    code = (
        "from tests.faults.limited_memory import limited_memory\n"
        "bytearray(200 << 20)\n"
        "with limited_memory(100 << 20):\n"
        "    bytearray(20 << 20)\n"
        "    try: bytearray(200 << 20)\n"
        "    except MemoryError: print('refused')\n"
        "bytearray(200 << 20)\n"
    )
    found = child(code)
    assert (found.returncode, found.stdout.strip()) == (0, "refused"), found.stderr


def test_memory_peak():
    assert len(b"x" * (200 << 20)) > 0  # an earlier peak hides nothing
    peak = memory_peak()
    assert peak() < 20 << 20
    assert len(b"x" * (100 << 20)) > 0
    assert 90 << 20 < peak() < 120 << 20


def test_fake_distribution(tmp_path, monkeypatch):
    entry_points = {"some.group": {"name": "some_module:value"}}
    fake_distribution(tmp_path, "some-thing", entry_points, {"some_module.py": "value = 7"}, version="3.1")
    monkeypatch.syspath_prepend(str(tmp_path))
    (entry,) = importlib.metadata.entry_points(group="some.group")
    assert (entry.load(), entry.dist.version, importlib.metadata.version("some-thing")) == (7, "3.1", "3.1")


def test_fake_clock():
    real = time.monotonic()
    with FakeClock(50.0).installed() as clock:
        assert time.time() == time.monotonic() == time.perf_counter() == 50.0
        time.sleep(3600)
        assert time.monotonic() == 3650.0
        clock.pass_by(-5000)
        assert time.time() == -1350.0
        assert clock.readings == 5
    assert 0 <= time.monotonic() - real < 60


def test_leak_slope_finds_each_kind_of_leak():
    kept, opened = [], []

    def leaking():
        page = mmap.mmap(-1, 1 << 18, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not what malloc has left over
        page.write(b"x" * (1 << 18))
        kept.append((page, torch.zeros(1)))
        opened.append(os.open(os.devnull, os.O_RDONLY))

    found = leak_slope(leaking, 100, warm_up=20)
    for descriptor in opened:
        os.close(descriptor)
    assert found["bytes"].low > 0.9 * (1 << 18)
    assert found["bytes"].high < 1.2 * (1 << 18)
    assert found["tensors"].value == pytest.approx(1)
    assert found["descriptors"].value == pytest.approx(1)
    assert found["threads"].value == 0


def test_leak_slope_finds_none_where_none_is():
    found = leak_slope(lambda: torch.zeros(2048).sum(), 2000, warm_up=200)
    assert found["bytes"].value < 100
    assert [found[name].value for name in ("tensors", "descriptors", "threads")] == [0, 0, 0]
