"""The static gates: what no shipped source does, save where it is named here with its reason."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path for folder in ("kernels", "integrations", "plugins") for path in (ROOT / folder).rglob("*.py"))
BARRED = {
    "torch.load": r"\btorch\.load\(",
    "pickle": r"\bpickle\b|\bdill\b|\bjoblib\b|\bmarshal\b|allow_pickle\s*=\s*True",
    "accelerate's unpickling": r"register_for_checkpointing\(",
    "unpickling what other processes send": (
        r"_object\(|_object_list\(|\bmultiprocessing\b|\brecv_pyobj\b|\bshelve\b|num_workers\s*=(?!\s*0\b)"
    ),
    "eval": r"(?<![\w.])eval\(",
    "exec": r"(?<![\w.])exec\(",
    "trust_remote_code": r"trust_remote_code\s*=\s*True",
    "all interfaces": r"0\.0\.0\.0",
    "a shell": r"shell\s*=\s*True|\bos\.system\(|\bos\.popen\(",
}
# (what, file, what must stand in that line): the reason.
ALLOWED = (
    {
        ("torch.load", file, "weights_only=True"): reason
        for file, reason in {
            "integrations/pronghorn/transformers/quantizer.py": "checkpoints of AutoAWQ's time come as .bin, too",
            "plugins/pronghorn/awq/search.py": "llm-awq publishes its search results so",
            "plugins/pronghorn/dcae/diffusers/autoencoder.py": "some autoencoders are published so",
        }.items()
    }
    | {
        ("pickle", "integrations/pronghorn/checkpoint/files.py", mention): "it names what it refuses"
        for mention in ("no pickle", "PICKLES =")
    }
    | {
        (
            "unpickling what other processes send",
            "plugins/pronghorn/dcae/diffusers/training/loop.py",
            "config.workers",
        ): ("a DataLoader's workers are children of the process that they send batches to")
    }
)

pytestmark = pytest.mark.fault("gates")


def found(what, text):
    """Lines that do it; a mention in prose, between quotes of code, does not."""
    pattern = re.compile(BARRED[what])
    return [
        (number, line.strip())
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(re.sub(r"`[^`]*`", "", line))
    ]


@pytest.mark.parametrize("what", BARRED)
def test_no_source_does_it(what):
    used, seen = set(), []
    for path in SHIPPED:
        for number, line in found(what, path.read_text()):
            name = str(path.relative_to(ROOT))
            exceptions = [key for key in ALLOWED if key[:2] == (what, name) and key[2] in line]
            used.update(exceptions)
            if not exceptions:
                seen.append(f"{name}:{number}: {line}")
    assert seen == []
    assert used == {key for key in ALLOWED if key[0] == what}, "an exception that nothing needs any more"


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("torch.load", "state = torch.load(path)"),
        ("pickle", "import pickle"),
        ("pickle", "np.load(path, allow_pickle=True)"),
        ("accelerate's unpickling", "accelerator.register_for_checkpointing(ema)"),
        ("unpickling what other processes send", "dist.scatter_object_list(found, shares, src=0)"),
        ("unpickling what other processes send", "dist.all_gather_object(found, rows)"),
        ("unpickling what other processes send", "import torch.multiprocessing as mp"),
        ("eval", "value = eval(text)"),
        ("exec", "exec(code)"),
        ("trust_remote_code", "from_pretrained(name, trust_remote_code=True)"),
        ("all interfaces", 'host: str = "0.0.0.0"'),
        ("a shell", "subprocess.run(command, shell=True)"),
    ],
)
def test_the_gate_would_see_it(what, line):
    assert found(what, f"x = 1\n{line}\n") == [(2, line)]
    assert found(what, "model.eval()\nre.compile(pattern).exec(text)\nThe format is `pickle`.\n") == []


def test_the_linter_has_its_security_rules():
    import tomllib

    selected = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert {"S", "BLE001"} <= {*selected["select"]}  # S110, an exception passed over, is one of S
    assert not [rule for rule in selected["ignore"] if rule.startswith(("S", "BLE"))]
    for pattern, rules in selected["per-file-ignores"].items():
        shipped = not pattern.startswith(("tests", "examples", "benchmarks", "noxfile"))
        assert not (shipped and [rule for rule in rules if rule.startswith(("S", "BLE"))]), pattern


def test_what_security_md_promises_is_gated():
    text = (ROOT / "SECURITY.md").read_text()
    for promise in ("weights_only=True", "trust_remote_code", "127.0.0.1", "within seven days"):
        assert promise in text
