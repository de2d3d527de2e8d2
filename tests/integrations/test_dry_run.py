"""What `--dry-run` says, against what then happens: memory, disk and time of the same command, within 15 %.

On a GPU the work is more, so that the seconds in which a process starts are few of all.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from tests.own_methods import own_methods
from tests.plugins.conftest import letters_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pronghorn.cli import app, own_commands
from pronghorn.duoattention import DuoAttentionConfig
from pronghorn.transformers.calibration_data import builtin_text

pytestmark = pytest.mark.fault("dry run")

NEAR = 0.15
TRIES = 3
ON_GPU = torch.cuda.is_available()
# Where there is a GPU, torch's memory on it is what is compared, and a process takes seconds to start on it.
works_on_cpu = pytest.mark.skipif(ON_GPU, reason="the command works on the CPU, whatever else there is")
too_short = pytest.mark.skipif(ON_GPU, reason="on a GPU its work is too little to be compared")
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "seconds": 1.0, "minutes": 60.0}
# On a CPU of the process, so that other processes do not matter: the clock counts its own work, and the peak is that
# above what it takes to import the libraries.
CHILD = """
import ctypes, importlib, json, sys, time
from pathlib import Path
import torch
on_gpu = torch.cuda.is_available()
if not on_gpu:
    ctypes.CDLL(None).mlockall(1 | 2 | 4)  # where it may: pages of libraries that the system takes back lower a peak
    time.perf_counter = time.process_time
from pronghorn.estimate import now
libraries, works, arguments = json.loads(sys.argv[1])
for library in libraries:
    importlib.import_module(library)
device = torch.device("cuda" if on_gpu else "cpu")
def peak():
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
seconds, depth = [0.0], [0]
def timed(owner, name):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        started = now(device)
        depth[0] += 1
        try:
            return real(*args, **kwargs)
        finally:
            depth[0] -= 1
            if not depth[0]:
                seconds[0] += now(device) - started
    setattr(owner, name, wrapped)
for work in works:
    room, *path = work.split(":")[0], *work.split(":")[1].split(".")
    owner = importlib.import_module(room)
    for part in path[:-1]:
        owner = getattr(owner, part)
    timed(owner, path[-1])
before = peak()
from pronghorn.cli import app
app(arguments, standalone_mode=False)
print(json.dumps({"before": before, "peak": peak(), "seconds": seconds[0]}))
"""


@dataclass
class Case:
    """A command, where it writes, and which functions are its work."""

    arguments: list
    outputs: list
    works: list
    libraries: tuple = ("torch", "transformers", "pronghorn.transformers")


def run(case, *more):
    given = json.dumps([case.libraries, case.works, [str(argument) for argument in (*case.arguments, *more)]])
    # Whether malloc keeps what is freed depends on what it met before, which moves peaks by a sixth from run to run.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", CHILD, given], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    *said, last = done.stdout.splitlines()
    return " ".join(said), json.loads(last)


def written(folders):
    files = [path for folder in folders for path in ([folder] if folder.is_file() else folder.rglob("*"))]
    return sum(path.stat().st_size for path in files if path.is_file())


def amount(said, what):
    number, unit = re.search(rf"{what} ([\d.e+]+) (\w+)", said).groups()
    return float(number) * UNITS[unit]


def assert_as_said(case, figure, time):
    """What a machine does besides moves times by more than what is allowed, so these have `TRIES`; the last counts."""
    for tries in range(1, TRIES + 1):
        said, trial = run(case, "--dry-run")
        assert not any(output.exists() for output in case.outputs), "a dry run leaves nothing"
        _, real = run(case)
        if tries == TRIES or not time or amount(said, "about") == pytest.approx(real["seconds"], rel=NEAR):
            break
        for output in case.outputs:
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    figures = {
        "memory": (amount(said, "peak memory") - trial["before"], real["peak"] - real["before"]),
        "disk": (amount(said, "disk"), written(case.outputs)),
        **({"time": (amount(said, "about"), real["seconds"])} if time else {}),
    }
    if not case.outputs:
        figures.pop("disk")
    for name, (expected, found) in figures.items():
        figure(f"{case.arguments[0]} {case.arguments[1]}: {name} said / happened", round(expected / found, 3))
    if time:
        figure(f"{case.arguments[0]} {case.arguments[1]}: tries", tries)
    for name, (expected, found) in figures.items():
        assert expected == pytest.approx(found, rel=NEAR), name


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Its weights are much more than what else a process holds."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 6}
    if ON_GPU:
        sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16}
    config = LlamaConfig(vocab_size=8192, max_position_embeddings=8192, **sizes)
    LlamaForCausalLM(config).to(torch.float16 if ON_GPU else torch.float32).save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for index in range(24):
        pixels = np.random.default_rng(index).integers(0, 255, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    from pronghorn.dcae.config import EVIT, RES, DCAEConfig
    from pronghorn.dcae.diffusers import AutoencoderDC

    kinds, widths = (RES, RES, EVIT), (64, 128, 256)
    config = DCAEConfig(
        latent_channels=8, scaling_factor=0.5, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=(1, 1, 2),
        decoder_layers_per_block=(1, 1, 2), encoder_qkv_multiscales=((),) * 3, decoder_qkv_multiscales=((),) * 3,
        decoder_norm_types=("rms_norm",) * 3, decoder_act_fns=("silu",) * 3,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    AutoencoderDC(**config.to_dict()).save_pretrained(folder)
    return folder


DIFFUSERS = ("torch", "diffusers", "accelerate", "pronghorn.dcae.diffusers.training")
TRAINING = "pronghorn.dcae.diffusers.training"


def encode(autoencoder, photos, folder):
    arguments = ["dcae", "dump", autoencoder, photos, folder / "latents", "--size", 128, "--batch-size", 8]
    return Case(arguments, [folder / "latents"], ["pronghorn.dcae.latents:dump_latents"], DIFFUSERS)


def statistics(autoencoder, photos, folder):
    arguments = ["dcae", "stats", autoencoder, photos, "--size", 128, "--batch-size", 4]
    return Case(arguments, [], ["pronghorn.dcae.latents:statistics_of_images"], DIFFUSERS)


def reconstruct(autoencoder, photos, folder):
    arguments = ["dcae", "reconstruct", autoencoder, photos, folder / "pictures"]
    return Case(arguments, [folder / "pictures"], ["pronghorn.dcae.reconstruct:reconstruct"], DIFFUSERS)


def compare(autoencoder, photos, folder):
    arguments = ["dcae", "compare", autoencoder, photos, folder / "pictures", "--size", 192, "--batch-size", 4]
    return Case(arguments, [folder / "pictures"], ["pronghorn.dcae.compare:compare"], DIFFUSERS)


def sample(autoencoder, folder):
    """The last of its batches is half of one."""
    run(train_diffusion(folder), "--steps", "1")
    arguments = [
        "dcae", "sample", autoencoder, folder / "out", folder / "pictures", "--classes", "0,1", "--each", 14,
        "--batch-size", 8,
    ]  # fmt: skip
    return Case(arguments, [folder / "pictures"], ["pronghorn.dcae.sampling:write_samples"], DIFFUSERS)


def train_autoencoder(autoencoder, photos, folder):
    """Evaluations are a part of it."""
    arguments = [
        "dcae", "train", autoencoder, photos, folder / "out", "--phase", 1, "--resolution", 32, "--steps", 10,
        "--batch-size", 4, "--save-every", 5, "--evaluate-every", 3, "--held-out", photos, "--warmup-steps", 2,
        "--workers", 0,
    ]  # fmt: skip
    return Case(arguments, [folder / "out"], [f"{TRAINING}:AutoencoderTrainer.fit"], DIFFUSERS)


def train_diffusion(folder):
    for label in range(2):
        (folder / "latents" / str(label)).mkdir(parents=True)
        for index in range(4):
            np.save(
                folder / "latents" / str(label) / f"{index}.npy",
                np.random.default_rng(index).normal(size=(8, 8, 8)).astype("f4"),
            )
    sizes = {"hidden-size": 384, "depth": 5, "heads": 6, "batch-size": 8, "steps": 20, "save-every": 10}
    if ON_GPU:
        sizes = {"hidden-size": 768, "depth": 12, "heads": 12, "batch-size": 128, "steps": 300, "save-every": 150}
    arguments = [
        "dcae", "train-diffusion", folder / "latents", folder / "out", "--warmup-steps", 2, "--workers", 0,
        *(part for name, size in sizes.items() for part in (f"--{name}", size)),
    ]  # fmt: skip
    return Case(arguments, [folder / "out"], [f"{TRAINING}:DiffusionTrainer.fit"], DIFFUSERS)


def test_memory_and_disk_of_a_training(tmp_path, figure):
    assert_as_said(train_diffusion(tmp_path), figure, time=False)


@pytest.mark.slow
@pytest.mark.alone
def test_training_a_diffusion_model(tmp_path, figure):
    assert_as_said(train_diffusion(tmp_path), figure, time=True)


@too_short
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    "work", [train_autoencoder, encode, statistics, reconstruct, compare], ids=lambda work: work.__name__
)
def test_autoencoders_at_work(work, autoencoder, photos, tmp_path, figure):
    assert_as_said(work(autoencoder, photos, tmp_path), figure, time=True)


@too_short
@pytest.mark.slow
@pytest.mark.alone
def test_samples(autoencoder, tmp_path, figure):
    assert_as_said(sample(autoencoder, tmp_path), figure, time=True)


@pytest.mark.slow
@pytest.mark.alone
def test_finding_heads(language_model, tmp_path, figure):
    """Of a short text: what malloc keeps of a long one that was tokenized moves both memory and time."""
    (tmp_path / "text.txt").write_text(builtin_text("calibration")[:3000])
    arguments = [
        "duoattention", "find", language_model, tmp_path / "pattern", "--steps", 250 if ON_GPU else 16,
        "--context-min", 300, "--context-max", 1200, "--passkeys", 2, "--passkey-length", 4, "--block", 1,
        "--sink", 16, "--recent", 64, "--state", tmp_path / "state", "--text", tmp_path / "text.txt",
    ]  # fmt: skip
    outputs = [tmp_path / "pattern", tmp_path / "state"]
    assert_as_said(Case(arguments, outputs, ["pronghorn.duoattention.find:find_heads"]), figure, time=True)


@pytest.mark.slow
@pytest.mark.alone
def test_quantizing(language_model, tmp_path, figure):
    samples = ["--samples", 128, "--seq-len", 512] if ON_GPU else ["--samples", 2, "--seq-len", 128]
    arguments = ["awq", "quantize", language_model, tmp_path / "out", *samples]
    works = ["pronghorn.awq.search:AwqSearch.run", "pronghorn.awq.quantize:quantize_model",
             "pronghorn.awq.report:AwqReport.__init__", "pronghorn.awq.report:AwqReport.write"]  # fmt: skip
    assert_as_said(Case(arguments, [tmp_path / "out"], works), figure, time=True)


@pytest.mark.slow
@pytest.mark.alone
def test_packing_what_was_searched(language_model, tmp_path, figure):
    how = ["--samples", 1, "--seq-len", 32, "--no-clip"]
    run(Case(["awq", "search", language_model, tmp_path / "found.pt", *how], [], []))
    arguments = ["awq", "pack", language_model, tmp_path / "found.pt", tmp_path / "out"]
    works = ["pronghorn.awq.quantize:quantize_model", "pronghorn.awq.report:AwqReport.__init__",
             "pronghorn.awq.report:AwqReport.write"]  # fmt: skip
    assert_as_said(Case(arguments, [tmp_path / "out"], works), figure, time=not ON_GPU)


@works_on_cpu
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("to", ["gemv", "marlin"])
def test_converting_what_was_quantized(language_model, tmp_path, figure, to):
    how = ["--rtn", "--no-report", *(["--symmetric"] if to == "marlin" else [])]
    run(Case(["awq", "quantize", language_model, tmp_path / "source", *how], [], []))
    arguments = ["awq", "convert", tmp_path / "source", tmp_path / "out", "--to", to]
    case = Case(arguments, [tmp_path / "out"], ["pronghorn.awq.convert:convert_checkpoint"])
    assert_as_said(case, figure, time=True)


@works_on_cpu
@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("no_report", [[], ["--no-report"]], ids=["with a report", "without"])
def test_applying_a_pattern(language_model, tmp_path, figure, no_report):
    """Without a report there is little work: its time is not compared."""
    DuoAttentionConfig(gates=[[0.9, 0.1, 0.2, 0.8, 0.3, 0.7]] * 3).save_pretrained(tmp_path / "pattern")
    arguments = ["duoattention", "apply", language_model, tmp_path / "pattern", tmp_path / "out", *no_report]
    works = ["pronghorn.duoattention.report:DuoReport.__init__", "pronghorn.duoattention.report:DuoReport.write",
             "pronghorn.duoattention.transformers:apply_duo"]  # fmt: skip
    assert_as_said(Case(arguments, [tmp_path / "out"], works), figure, time=not no_report)


@pytest.mark.slow
@pytest.mark.alone
def test_benchmark_of_a_language_model(language_model, figure):
    lengths = "4000,8000" if ON_GPU else "64,512"
    arguments = [
        "awq", "bench", language_model, "--contexts", lengths, "--histories", lengths, "--new-tokens", 2,
        "--repeats", 40 if ON_GPU else 10,
    ]  # fmt: skip
    assert_as_said(Case(arguments, [], ["pronghorn.awq.bench:_seconds"]), figure, time=True)


@too_short
@pytest.mark.slow
@pytest.mark.alone
def test_benchmark_of_an_autoencoder(autoencoder, figure):
    sizes = ["--sizes", 64, "--batch-sizes", "1,4", "--repeats", 12]
    arguments = ["dcae", "bench", autoencoder, *sizes, "--forms", "stock,accelerated"]
    assert_as_said(Case(arguments, [], ["pronghorn.dcae.bench:timed"], DIFFUSERS), figure, time=True)


@pytest.mark.slow
@pytest.mark.alone
def test_a_perplexity(language_model, tmp_path, figure):
    (tmp_path / "text.txt").write_text((20 if ON_GPU else 1) * builtin_text("evaluation"))
    windows = ["--window", 512, "--windows", 2500] if ON_GPU else ["--window", 256, "--windows", 20]
    arguments = ["awq", "eval", language_model, "--text", tmp_path / "text.txt", *windows]
    assert_as_said(Case(arguments, [], ["pronghorn.awq.evaluate:perplexity"]), figure, time=True)


@pytest.mark.slow
@pytest.mark.alone
def test_needles_in_haystacks(language_model, tmp_path, figure):
    arguments = [
        "duoattention", "niah", language_model, "--out", tmp_path / "out",
        "--lengths", "500,4000,6" if ON_GPU else "300,1500,4", "--depths", 5 if ON_GPU else 4,
        "--sink", 16, "--recent", 64, "--chunk", 400,
    ]  # fmt: skip
    assert_as_said(Case(arguments, [tmp_path / "out"], ["pronghorn.duoattention.niah:run_grid"]), figure, time=True)


@too_short
@pytest.mark.slow
@pytest.mark.alone
def test_long_questions(language_model, tmp_path, figure):
    """Two data sets, whose answers are of different lengths."""
    drawn = np.random.default_rng(0)
    for name, longest in (("hotpotqa", 120), ("lcc", 60)):
        rows = [
            {"input": "Why?", "context": "so it is " * int(times), "answers": ["so it is"]}
            for times in drawn.integers(10, longest, 9)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [tmp_path / "hotpotqa.jsonl", tmp_path / "lcc.jsonl"]
    arguments = [
        "duoattention", "longbench", language_model, *files, "--out", tmp_path / "out", "--sink", 16, "--recent", 64,
        "--max-length", 1500,
    ]  # fmt: skip
    works = ["pronghorn.duoattention.longbench:evaluate_file"]
    assert_as_said(Case(arguments, [tmp_path / "out"], works), figure, time=True)


@works_on_cpu
@pytest.mark.slow
@pytest.mark.alone
def test_sweeping_a_task(tmp_path, figure):
    """Its memory is that of the libraries, and its files are small: time alone is compared."""
    arguments = [
        "vlash", "sweep", "--modes", "sync,vlash", "--delays", "0:1", "--seeds", 2, "--train-steps", 400,
        "--environments", 64, "--json", tmp_path / "rows.json",
    ]  # fmt: skip
    works = ["pronghorn.vlash.tracking:train", "pronghorn.vlash.sweep:rollout"]
    case = Case(arguments, [tmp_path / "rows.json"], works, ("torch", "pronghorn.vlash.tracking"))
    said, _ = run(case, "--dry-run")
    assert not (tmp_path / "rows.json").exists()
    _, real = run(case)
    figure("vlash sweep: time said / happened", round(amount(said, "about") / real["seconds"], 3))
    assert amount(said, "about") == pytest.approx(real["seconds"], rel=NEAR)


SHORT, ENDLESS = "it takes seconds", "it goes on until it is stopped"
# Commands that have none, and why.
WITHOUT = {
    "list": SHORT,
    "info": SHORT,
    "seal": "it reads each file once, which is what a trial would have to do",
    "verify": "minutes, also where kernels compile first; names make it less",
    "check": "it loads a checkpoint once, and nothing is written",
    "new": SHORT,
    "awq demo": ENDLESS,
    "awq chat": ENDLESS,
    "dcae convert": "it reads a checkpoint once and writes it once",
    "duoattention plan": "it is the estimate: of a cache's memory, from the configuration alone",
    "duoattention bench": "each prompt is read once, and to try one is to measure it; `plan` tells the memory before",
    "vcpo report": SHORT,
    "vlash bench": "some 26 calls of a policy, of which each is a fraction of a second",
    "vlash profile": "a few calls of a policy",
    "vlash serve": ENDLESS,
}


def commands(group, context, path=()):
    """All commands below a group, by what a user types."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from commands(command, typer.Context(command, info_name=name, parent=context), (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_every_command_has_a_dry_run_or_a_reason():
    root = typer.main.get_command(app)
    ours, options = {*own_commands(), *own_methods()}, {}
    for name, command in commands(root, typer.Context(root)):
        if name.split()[0] in ours:
            options[name] = {option for parameter in command.params for option in parameter.opts}
    assert {"bench", "awq bench", "dcae train-diffusion"} <= options.keys()
    assert {name for name, given in options.items() if "--dry-run" not in given} == WITHOUT.keys()
