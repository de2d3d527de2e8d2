"""`pronghorn duoattention …`: find, apply, plan, bench, niah and longbench."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pronghorn.duoattention.config import DuoAttentionConfig
    from pronghorn.duoattention.transformers.answer import Answer

app = typer.Typer(no_args_is_help=True, help="DuoAttention: only retrieval heads keep the whole cache.")

Model = Annotated[str, typer.Argument(help="Folder or hub name of a causal language model.")]
OptionalPattern = Annotated[
    str | None, typer.Option("--pattern", help="Folder of a pattern, or the name of a published one; none is dense.")
]
Sparsity = Annotated[float | None, typer.Option(help="Share of heads that stream; 0.5 by default.")]
Threshold = Annotated[float | None, typer.Option(help="Or: heads with gates below it stream.")]
Balance = Annotated[str, typer.Option(help="global, or per_layer for as many full heads in every layer.")]
Sink = Annotated[int, typer.Option(help="First tokens that streaming heads keep.")]
Recent = Annotated[int, typer.Option(help="Last tokens that they keep.")]
Bits = Annotated[int, typer.Option(help="Of the cache: 16, 8 or 4.")]
Prefill = Annotated[str, typer.Option(help="dense_first, or streaming to mask the first chunk too.")]
Chunk = Annotated[int, typer.Option(help="Tokens of a prompt that are read at once.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for results and pictures.")]
Text = Annotated[list[Path] | None, typer.Option(help="Text file, repeatable; Python's documentation by default.")]
Dtype = Annotated[str, typer.Option(help="float16, bfloat16, float32 or auto.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Try some of it, print peak memory, time and disk, and stop.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu …; the GPU if there is one.")]


def _load(model: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pronghorn.transformers  # noqa: F401 - registers the attention

    if dtype not in ("float16", "bfloat16", "float32", "auto"):
        raise ValueError(f"dtype: got {dtype!r}, accepted are float16, bfloat16, float32 and auto")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return loaded.to(where).eval(), AutoTokenizer.from_pretrained(model)


def _config(
    pattern: str | None, sparsity: float | None, threshold: float | None, balance: str, sink: int, recent: int,
    bits: int, prefill: str,
) -> DuoAttentionConfig:  # fmt: skip
    from pronghorn.duoattention.config import DuoAttentionConfig

    options: dict[str, Any] = {
        "sparsity": sparsity, "threshold": threshold, "balance": balance, "sink_size": sink, "recent_size": recent,
        "kv_bits": bits, "prefill": prefill,
    }  # fmt: skip
    return DuoAttentionConfig(**options) if pattern is None else DuoAttentionConfig.from_pattern(pattern, **options)


def _answer(loaded: Any, config: DuoAttentionConfig, chunk: int) -> Answer:
    from pronghorn.duoattention.transformers import apply_duo
    from pronghorn.duoattention.transformers.answer import Answer

    return Answer(loaded, apply_duo(loaded, config), prefill_chunk_size=chunk)


def _texts(files: list[Path] | None) -> list[str]:
    from pronghorn.transformers.calibration_data import builtin_text

    return [path.read_text() for path in files] if files else [builtin_text("calibration")]


@app.command()
def find(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the pattern.")],
    method: Annotated[
        str, typer.Option(help="optimise (hours for a large model) or on_the_fly (seconds).")
    ] = "optimise",
    text: Text = None,
    steps: Annotated[int, typer.Option(help="Of the optimization.")] = 2000,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.02,
    reg_weight: Annotated[float, typer.Option(help="Weight of the gates' size in the loss.")] = 0.05,
    sink: Sink = 128,
    recent: Recent = 256,
    block: Annotated[int, typer.Option(help="Granularity of the mask; 1 for tokens.")] = 128,
    dense_branch: Annotated[str, typer.Option(help="teacher, as published, or student.")] = "teacher",
    gate_dtype: Annotated[str, typer.Option(help="float32, or bfloat16 as published.")] = "float32",
    context_min: Annotated[int, typer.Option(help="Tokens of the shortest text.")] = 1000,
    context_max: Annotated[int, typer.Option(help="Tokens of the longest sample.")] = 32000,
    passkeys: Annotated[int, typer.Option(help="In each sample.")] = 10,
    passkey_length: Annotated[int, typer.Option(help="Words of each.")] = 32,
    samples: Annotated[int, typer.Option(help="That on_the_fly looks at.")] = 8,
    checkpointing: Annotated[bool, typer.Option(help="Compute layers twice, to save memory.")] = True,
    seed: Annotated[int, typer.Option(help="Of the data.")] = 42,
    state: Annotated[Path | None, typer.Option(help="Folder that keeps progress; the same call then resumes.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Begin anew, whatever run --state holds the progress of.")
    ] = False,
    save_steps: Annotated[int, typer.Option(help="How often.")] = 50,
    dtype: Dtype = "auto",
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Find the retrieval heads of MODEL; under `accelerate launch` its processes share each sequence."""
    import torch

    from pronghorn.duoattention.find import find_heads, rehearse
    from pronghorn.duoattention.passkey import MultiPasskeyDataset
    from pronghorn.duoattention.pattern import save_pattern
    from pronghorn.duoattention.plot import plot_gates
    from pronghorn.duoattention.sequence_parallel import launched

    if gate_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"gate_dtype: got {gate_dtype!r}, accepted are float32 and bfloat16")
    if dry_run and method != "optimise":
        raise ValueError(f"dry_run: got method={method!r}, which takes seconds; only 'optimise' is long")
    parallel = launched()
    loaded, tokenizer = _load(model, dtype, device)
    torch.manual_seed(seed)  # the data set draws a passkey to know how long they are
    data = MultiPasskeyDataset(
        tokenizer, _texts(text), context_length_min=context_min, context_length_max=context_max,
        num_passkeys=passkeys, passkey_length=passkey_length,
    )  # fmt: skip
    options: dict[str, Any] = {
        "lr": lr, "reg_weight": reg_weight, "sink_size": sink, "recent_size": recent,
        "block_size": None if block == 1 else block, "dense_branch": dense_branch,
        "gate_dtype": getattr(torch, gate_dtype), "gradient_checkpointing": checkpointing, "seed": seed,
        "parallel": parallel,
    }  # fmt: skip
    if dry_run:
        typer.echo(rehearse(loaded, data, num_steps=steps, **options))  # type: ignore[arg-type]
        return
    found = find_heads(
        loaded, data, method=method, num_steps=steps, samples=samples, state_dir=state, save_steps=save_steps,  # type: ignore[arg-type]
        anew=force, **options,
    )  # fmt: skip
    if parallel.rank == 0:
        save_pattern(found, out)
        plot_gates(found.gates, out / "gates.png")
        gates = torch.tensor(found.gates)
        typer.echo(f"{out}: mean gate {gates.mean():.3f}, {(gates > 0.5).float().mean():.1%} above 0.5")
    parallel.close()


@app.command()
def apply(
    model: Model,
    pattern: Annotated[str, typer.Argument(help="Folder of a pattern, or the name of a published one.")],
    out: Annotated[Path, typer.Argument(help="Folder for the model, its heads reordered, and the pattern.")],
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    balance: Balance = "global",
    sink: Sink = 64,
    recent: Recent = 256,
    bits: Bits = 16,
    prefill: Prefill = "dense_first",
    dtype: Dtype = "auto",
    no_report: Annotated[bool, typer.Option("--no-report", help="Do not compare with MODEL, write no card.")] = False,
    base_model: Annotated[str | None, typer.Option(help="MODEL's hub name for the card, where it is a folder.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Save MODEL with its full heads first in every layer, and the pattern for that order in OUT/duoattention."""
    from pronghorn.checkpoint.written import write_checkpoint
    from pronghorn.duoattention.report import DuoReport, application_estimate
    from pronghorn.duoattention.transformers import apply_duo
    from pronghorn.estimate import tensor_bytes
    from pronghorn.files.room import check_target
    from pronghorn.files.sealed import SEALED
    from pronghorn.transformers.quality import UNMEASURED

    if out.exists():
        raise FileExistsError(f"{out} exists; choose another name or remove it")
    check_target(out)
    config = _config(pattern, sparsity, threshold, balance, sink, recent, bits, prefill)
    loaded, tokenizer = _load(model, dtype, "cpu")
    needed = tensor_bytes(list(loaded.state_dict().values()))
    check_target(out, needed)
    if dry_run:
        typer.echo(application_estimate(loaded, tokenizer, config, model, with_report=not no_report))
        return
    report = None if no_report else DuoReport(loaded, tokenizer, config, model, base_model)
    duo = apply_duo(loaded, config, reorder=True)
    fixed = {**config.to_dict(), "gates": [[float(full) for full in row] for row in duo.full_heads]}

    def save(folder: Path) -> None:
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        type(config).from_dict({**fixed, "sparsity": None, "threshold": 0.5}).save_pretrained(folder / "duoattention")

    said = write_checkpoint(
        out, save, needed=needed, sealed=(*SEALED, "duoattention/*"),
        report=None if report is None else lambda folder: report.write(folder, duo, out.name),
        in_spite_of=UNMEASURED,
    )  # fmt: skip
    kept = sum(map(sum, duo.full_heads))
    typer.echo(f"{out}: {kept} of {len(duo.full_heads) * len(duo.full_heads[0])} key/value heads are full")
    if said is not None:
        typer.echo(f"{out}: {said}")


@app.command()
def plan(
    model: Model,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")],
    pattern: OptionalPattern = None,
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    balance: Balance = "global",
    sink: Sink = 64,
    recent: Recent = 256,
    bits: Bits = 16,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    budget: Annotated[float | None, typer.Option(help="GiB for keys and values.")] = None,
) -> None:
    """Memory of the cache of MODEL, of which only the configuration is read, and the largest context that fits."""
    from transformers import AutoConfig

    from pronghorn.duoattention.memory import plan

    config = _config(pattern, sparsity, threshold, balance, sink, recent, bits, "dense_first")
    limit = None if budget is None else int(budget * 2**30)
    typer.echo(plan(AutoConfig.from_pretrained(model), config, context=context, batch_size=batch, budget_bytes=limit))


@app.command()
def bench(
    model: Model,
    pattern: OptionalPattern = None,
    contexts: Annotated[str, typer.Option(help="Lengths of prompts, with commas.")] = "4096,16384,65536",
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    balance: Balance = "global",
    sink: Sink = 64,
    recent: Recent = 256,
    bits: Bits = 16,
    prefill: Prefill = "dense_first",
    chunk: Chunk = 32000,
    steps: Annotated[int, typer.Option(help="Tokens to decode.")] = 20,
    graphs: Annotated[bool | None, typer.Option(help="Decode with CUDA graphs; by default on a GPU.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Time of prompts and of decoding, and memory of the cache: as transformers has it, then with DuoAttention.

    With CUDA graphs also with all heads full, to tell what graphs do from what streaming heads do.
    """
    from transformers import DynamicCache

    from pronghorn.duoattention import DuoAttentionConfig
    from pronghorn.duoattention.bench import measure
    from pronghorn.duoattention.transformers import apply_duo
    from pronghorn.files.outputs import check_output

    check_output("json", out)
    config = _config(pattern, sparsity, threshold, balance, sink, recent, bits, prefill)
    lengths = _numbers(contexts)
    loaded, _ = _load(model, dtype, device)
    on_gpu = loaded.device.type == "cuda"
    if graphs and not on_gpu:
        raise ValueError(f"graphs: the model is on {loaded.device.type}; CUDA graphs need a GPU")
    graphs = on_gpu if graphs is None else graphs
    found = []
    for name, given in {"dense": None, **({"full": DuoAttentionConfig()} if graphs else {}), "duo": config}.items():
        duo = None if given is None else apply_duo(loaded, given)

        def cache(room: int, duo: Any = duo) -> Any:
            if duo is None:
                return DynamicCache(config=loaded.config)
            return duo.make_cache(static=True, max_len=room) if graphs else duo.make_cache()

        replayed = graphs and duo is not None
        for length in lengths:
            speed = measure(loaded, cache, length, prefill_chunk_size=chunk, decode_steps=steps, graphs=replayed)
            found.append({"cache": name, **asdict(speed)})
            typer.echo(
                f"{name:5} {length:8} tokens: read in {speed.prefill_seconds:8.3f} s, then "
                f"{speed.decode_seconds * 1e3:8.2f} ms a token, cache {speed.cache_bytes / 2**20:9.1f} MiB"
            )
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


@app.command()
def niah(
    model: Model,
    out: Out,
    pattern: OptionalPattern = None,
    lengths: Annotated[str, typer.Option(help="Shortest, longest and number of contexts.")] = "1000,32000,13",
    depths: Annotated[int, typer.Option(help="Depths of the needle.")] = 10,
    text: Text = None,
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    balance: Balance = "global",
    sink: Sink = 64,
    recent: Recent = 256,
    bits: Bits = 16,
    prefill: Prefill = "dense_first",
    chunk: Chunk = 32000,
    dtype: Dtype = "auto",
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Needle in a haystack: a grid of lengths and depths, as JSON and as a picture; the same call resumes."""
    from pronghorn.duoattention.niah import NeedleGrid, rehearse, run_grid
    from pronghorn.duoattention.plot import plot_needles

    config = _config(pattern, sparsity, threshold, balance, sink, recent, bits, prefill)
    shortest, longest, count = _numbers(lengths, 3)
    grid = NeedleGrid.between(shortest, longest, count, depths)
    loaded, tokenizer = _load(model, dtype, device)
    settings = {"model": model, "prefill_chunk_size": chunk, **config.to_dict()}
    answer, haystack = _answer(loaded, config, chunk), _texts(text)
    if dry_run:
        typer.echo(rehearse(answer, tokenizer, haystack, grid, settings=settings, device=loaded.device))
        return
    out.mkdir(parents=True, exist_ok=True)
    scores = run_grid(answer, tokenizer, haystack, grid, path=out / "niah.json", settings=settings)
    plot_needles(scores, grid.lengths, [100 * depth for depth in grid.depths], out / "niah.png")
    mean = sum(map(sum, scores)) / (len(scores) * len(scores[0]))
    typer.echo(f"{out / 'niah.png'}: mean score {mean:.2f} of 10")


@app.command()
def longbench(
    model: Model,
    data: Annotated[list[Path], typer.Argument(help="LongBench's JSONL files.")],
    out: Out,
    pattern: OptionalPattern = None,
    prompts: Annotated[Path | None, typer.Option(help="LongBench's dataset2prompt.json.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of a prompt; longer ones lose their middle.")] = 31500,
    limit: Annotated[int | None, typer.Option(help="Samples of each file.")] = None,
    sparsity: Sparsity = None,
    threshold: Threshold = None,
    balance: Balance = "global",
    sink: Sink = 64,
    recent: Recent = 256,
    bits: Bits = 16,
    prefill: Prefill = "dense_first",
    chunk: Chunk = 32000,
    dtype: Dtype = "auto",
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """LongBench's scores on files of yours; answers are kept in OUT, and the same call resumes."""
    from pronghorn.duoattention.longbench import evaluate_file, load_prompts, rehearse_file
    from pronghorn.estimate import in_turn

    config = _config(pattern, sparsity, threshold, balance, sink, recent, bits, prefill)
    templates = load_prompts(prompts)
    loaded, tokenizer = _load(model, dtype, device)
    answer = _answer(loaded, config, chunk)
    settings = {"model": model, "prefill_chunk_size": chunk, "max_length": max_length, **config.to_dict()}
    if dry_run:
        one_by_one = [
            rehearse_file(
                answer, tokenizer, path, templates, max_length=max_length, limit=limit, settings=settings,
                device=loaded.device,
            )
            for path in data
        ]  # fmt: skip
        found = in_turn(one_by_one)
        results = _results(settings, {path.stem: 0.0 for path in data})
        typer.echo(replace(found, disk_bytes=found.disk_bytes + len(results)))
        return
    out.mkdir(parents=True, exist_ok=True)
    scores = {}
    for path in data:
        result = evaluate_file(
            answer, tokenizer, path, templates, max_length=max_length, limit=limit,
            answers=out / f"{path.stem}.answers.json", settings=settings,
        )  # fmt: skip
        scores[result.dataset] = result.score
        typer.echo(f"{result.dataset:24} {result.score:6.2f}  ({result.metric}, {result.samples} samples)")
    (out / "longbench.json").write_text(_results(settings, scores))


def _results(settings: dict[str, Any], scores: dict[str, float]) -> str:
    return json.dumps({"settings": settings, "scores": scores}, indent=1) + "\n"


def _numbers(text: str, count: int | None = None) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or (count is not None and len(found) != count):
        raise typer.BadParameter(f"wanted {count or 'some'} numbers with commas, got {text!r}")
    return found
