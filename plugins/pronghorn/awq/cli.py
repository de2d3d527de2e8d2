"""`pronghorn awq …`: search, quantize, pack, convert, eval, chat, bench and demo."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pronghorn.awq.chat import Chat
    from pronghorn.awq.config import AwqConfig
    from pronghorn.awq.report import AwqReport
    from pronghorn.estimate import Estimate

app = typer.Typer(no_args_is_help=True, help="AWQ: 4-bit (and 2-, 3-, 8-bit) weights for language models.")

Model = Annotated[str, typer.Argument(help="Folder or hub name of the full-precision model.")]
Bits = Annotated[int, typer.Option(help="2, 3, 4 or 8.")]
GroupSize = Annotated[int, typer.Option(help="Input channels a scale; -1 for whole rows.")]
Version = Annotated[str | None, typer.Option(help="gemm, gemv, gemv_fast, llm-awq, exllama, marlin or natural.")]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="No zero points.")]
Duo = Annotated[bool, typer.Option("--duo-scaling", help="AutoAWQ's rule for the scales.")]
NoClip = Annotated[bool, typer.Option("--no-clip", help="Search scales only.")]
Skip = Annotated[list[str] | None, typer.Option(help="Leave linears with this name in 16 bits; repeatable.")]
Data = Annotated[Path | None, typer.Option(help="Text file for calibration; Python's own documentation by default.")]
Samples = Annotated[int, typer.Option(help="Calibration sequences.")]
SeqLen = Annotated[int, typer.Option(help="Tokens a sequence.")]
State = Annotated[Path | None, typer.Option(help="Folder that keeps progress; the same call then resumes.")]
Force = Annotated[bool, typer.Option("--force", help="Begin anew, whatever run --state holds the progress of.")]
Fuse = Annotated[bool, typer.Option("--fuse/--no-fuse", help="Run packed linears in their fast form.")]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Let torch.compile fuse what is between the linears: slow to start, then faster."),
]
Dtype = Annotated[str, typer.Option(help="float16, bfloat16, float32 or auto.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu …; the GPU if there is one.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Do not compare with MODEL, write no model card.")]
BaseModel = Annotated[str | None, typer.Option(help="MODEL's hub name for the card, where MODEL is a folder.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Try a piece of it, print peak memory, time and disk, and stop.")
]


def _config(
    bits: int, group_size: int, version: str | None, symmetric: bool, duo: bool, no_clip: bool, skip: list[str] | None
) -> AwqConfig:
    from pronghorn.awq.config import AwqConfig

    return AwqConfig(
        bits=bits,
        group_size=group_size,
        version=version or ("gemm" if bits == 4 else "natural"),
        zero_point=not symmetric,
        duo_scaling=duo,
        clip=not no_clip,
        modules_to_not_convert=skip or None,
    )


def _load(model: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pronghorn.transformers  # noqa: F401 - registers the quantizer

    if dtype not in ("float16", "bfloat16", "float32", "auto"):
        raise ValueError(f"dtype: got {dtype!r}, accepted are float16, bfloat16, float32 and auto")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    loaded.to(where).eval()
    return loaded, AutoTokenizer.from_pretrained(model)


def _search(
    loaded: Any,
    tokenizer: Any,
    config: AwqConfig,
    data: Path | None,
    samples: int,
    seq_len: int,
    state: Path | None,
    force: bool,
) -> Any:
    """The search and its samples, with the linears looked at before it begins."""
    from pronghorn.awq.quantize import check_linear, decoder_linears
    from pronghorn.awq.search import AwqSearch
    from pronghorn.transformers.calibration_data import calibration_samples

    texts: Any = "builtin" if data is None else [data.read_text()]
    ids = calibration_samples(
        texts, tokenizer, n_samples=samples, seq_len=seq_len, vocab_size=loaded.config.get_text_config().vocab_size
    )
    for name, linear in decoder_linears(loaded, config):
        check_linear(name, linear, config)
    return AwqSearch(config, state_dir=state, anew=force), ids


def _packing(loaded: Any, tokenizer: Any, model: str, config: AwqConfig, no_report: bool) -> list[Estimate]:
    """What packing, saving and reporting take."""
    from pronghorn.awq.quantize import packing_estimate
    from pronghorn.awq.report import report_estimate

    parts = [packing_estimate(loaded, config)]
    if not no_report:
        parts.append(report_estimate(loaded, tokenizer, model, config))
    return parts


def _save(model: Any, tokenizer: Any, config: AwqConfig, out: Path, report: AwqReport | None) -> None:
    from pronghorn.awq.quantize import quantize_model
    from pronghorn.awq.transformers import mark_quantized
    from pronghorn.checkpoint.written import write_checkpoint
    from pronghorn.estimate import tensor_bytes
    from pronghorn.transformers.quality import UNMEASURED

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    quantize_model(model, config)
    mark_quantized(model, config)
    said = write_checkpoint(
        out, save, needed=tensor_bytes(list(model.state_dict().values())),
        report=None if report is None else lambda folder: report.write(folder, model, config, out.name),
        in_spite_of=UNMEASURED,
    )  # fmt: skip
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    typer.echo(f"{out}: {size / 2**20:.1f} MiB of weights, {config.bits} bits, version {config.version}")
    if said is not None:
        typer.echo(f"{out}: {said}")


def _check_new(out: Path) -> None:
    from pronghorn.files.room import check_target

    if out.exists():
        raise FileExistsError(f"{out} exists; choose another name or remove it")
    check_target(out)


def _check_room(out: Path, loaded: Any, config: AwqConfig) -> None:
    """Before the work, as soon as the model tells how much it will be."""
    from pronghorn.awq.quantize import packed_bytes
    from pronghorn.files.room import check_target

    check_target(out, packed_bytes(loaded, config))


@app.command()
def search(
    model: Model,
    out: Annotated[Path, typer.Argument(help="File for the result, llm-awq's format (.pt).")],
    bits: Bits = 4,
    group_size: GroupSize = 128,
    symmetric: Symmetric = False,
    duo_scaling: Duo = False,
    no_clip: NoClip = False,
    skip: Skip = None,
    data: Data = None,
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    state: State = None,
    force: Force = False,
    dtype: Dtype = "auto",
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Search scales and clipping of MODEL and save them; `pack` applies them."""
    from pronghorn.files.room import check_target

    if out.is_dir():
        raise IsADirectoryError(f"out: got the folder {out}, wanted a file")
    check_target(out)
    config = _config(bits, group_size, None, symmetric, duo_scaling, no_clip, skip)
    loaded, tokenizer = _load(model, dtype, device)
    search, ids = _search(loaded, tokenizer, config, data, samples, seq_len, state, force)
    if dry_run:
        found, written = search.rehearse(loaded, ids)
        typer.echo(str(replace(found, disk_bytes=found.disk_bytes + written)))
        return
    result = search.run(loaded, ids)
    result.save(out)
    typer.echo(f"{out}: {len(result.scale)} scales, {len(result.clip)} clip maxima")


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder for the quantized checkpoint.")],
    bits: Bits = 4,
    group_size: GroupSize = 128,
    version: Version = None,
    symmetric: Symmetric = False,
    duo_scaling: Duo = False,
    no_clip: NoClip = False,
    skip: Skip = None,
    data: Data = None,
    samples: Samples = 128,
    seq_len: SeqLen = 512,
    state: State = None,
    force: Force = False,
    dtype: Dtype = "auto",
    device: Device = None,
    dry_run: DryRun = False,
    rtn: Annotated[bool, typer.Option("--rtn", help="Only round to nearest, without a search.")] = False,
    no_report: NoReport = False,
    base_model: BaseModel = None,
) -> None:
    """Search, scale, clip and pack MODEL into a checkpoint that transformers and vLLM load."""
    from pronghorn.awq.report import AwqReport
    from pronghorn.estimate import in_turn

    _check_new(out)
    config = _config(bits, group_size, version, symmetric, duo_scaling, no_clip, skip)
    loaded, tokenizer = _load(model, dtype, device)
    search, ids = (None, None) if rtn else _search(loaded, tokenizer, config, data, samples, seq_len, state, force)
    _check_room(out, loaded, config)
    if dry_run:
        searching = [] if search is None else [search.rehearse(loaded, ids)[0]]
        typer.echo(str(in_turn([*searching, *_packing(loaded, tokenizer, model, config, no_report)])))
        return
    found = None if search is None else search.run(loaded, ids)
    how: dict[str, Any] = {"method": "rtn"} if rtn else {
        "method": "awq", "n_samples": samples, "seq_len": seq_len, "text": data.name if data else "builtin",
        "grid": config.grid, "clip": config.clip, "duo_scaling": config.duo_scaling,
    }  # fmt: skip
    report = None if no_report else AwqReport(loaded, tokenizer, model, base_model, how)
    if found is not None:
        found.apply(loaded)
    _save(loaded, tokenizer, config, out, report)


@app.command()
def pack(
    model: Model,
    result: Annotated[Path, typer.Argument(help="Result of `search`, or of llm-awq's --dump_awq.")],
    out: Annotated[Path, typer.Argument(help="Folder for the quantized checkpoint.")],
    bits: Bits = 4,
    group_size: GroupSize = 128,
    version: Version = None,
    symmetric: Symmetric = False,
    skip: Skip = None,
    dtype: Dtype = "auto",
    device: Device = None,
    no_report: NoReport = False,
    base_model: BaseModel = None,
    dry_run: DryRun = False,
) -> None:
    """Apply a saved search to MODEL and pack it."""
    from pronghorn.awq.report import AwqReport
    from pronghorn.awq.search import SearchResult
    from pronghorn.estimate import in_turn
    from pronghorn.transformers.experts import unfuse_experts

    _check_new(out)
    config = _config(bits, group_size, version, symmetric, False, False, skip)
    found = SearchResult.load(result)
    loaded, tokenizer = _load(model, dtype, device)
    unfuse_experts(loaded)
    _check_room(out, loaded, config)
    if dry_run:
        typer.echo(str(in_turn(_packing(loaded, tokenizer, model, config, no_report))))
        return
    report = None if no_report else AwqReport(loaded, tokenizer, model, base_model, {"saved in": result.name})
    found.apply(loaded)
    _save(loaded, tokenizer, config, out, report)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    to: Annotated[str, typer.Option(help="gemm, gemv, gemv_fast, llm-awq, exllama, marlin or natural.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Full-precision model's hub name for the card; by default as in SOURCE's card.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Change a checkpoint's format without loss."""
    from pronghorn.awq.convert import check_conversion, conversion_estimate, convert_checkpoint
    from pronghorn.awq.report import write_conversion_report

    if dry_run:
        check_conversion(source, out, overwrite)
        typer.echo(str(conversion_estimate(source, to)))
        return
    said: list[str] = []
    convert_checkpoint(
        source, out, to, overwrite=overwrite,
        report=lambda folder: said.append(write_conversion_report(source, folder, base_model, out.name)),
    )  # fmt: skip
    typer.echo(f"{out}: version {to}, {said[0]}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub name, quantized or not.")],
    text: Annotated[Path | None, typer.Option(help="Text file; by default held-out Python documentation.")] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    windows: Annotated[int | None, typer.Option(help="Stop after so many windows.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Perplexity and bits per byte of MODEL on a text."""
    from pronghorn.awq.evaluate import perplexity, perplexity_estimate
    from pronghorn.transformers.calibration_data import builtin_text

    loaded, tokenizer = _load(model, dtype, device)
    content = builtin_text("evaluation") if text is None else text.read_text()
    if dry_run:
        typer.echo(str(perplexity_estimate(loaded, tokenizer, content, window=window, max_windows=windows)))
        return
    found = perplexity(loaded, tokenizer, content, window=window, max_windows=windows)
    typer.echo(
        f"perplexity {found.perplexity:.3f}  bits/byte {found.bits_per_byte:.4f}  "
        f"({found.tokens} tokens in {found.seconds:.1f} s)"
    )


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Folder or hub name, quantized or not.")],
    contexts: Annotated[str, typer.Option(help="Lengths of prompts, with commas.")] = "16,512,2048,4096",
    histories: Annotated[str, typer.Option(help="Lengths of histories before a question.")] = "16,128,1024",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate for the decoding speed.")] = 256,
    repeats: Annotated[int, typer.Option(help="Repeats of each measurement.")] = 10,
    fused: Fuse = True,
    compiled: Compile = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    dry_run: DryRun = False,
) -> None:
    """Time to the first token and decoding speed by context, and of a question after a history."""
    from statistics import mean

    from pronghorn.awq.bench import context_speeds, follow_up_speeds, rehearse
    from pronghorn.files.outputs import check_output

    check_output("json", out)
    prompts, before = _lengths(contexts), _lengths(histories)
    loaded, _ = _load(model, dtype, device)
    found: dict[str, list[dict[str, Any]]] = {"contexts": [], "follow_ups": []}
    if fused:
        _fuse(loaded, compiled)
    if dry_run:
        typer.echo(rehearse(loaded, prompts, before, new_tokens=new_tokens, repeats=repeats))
        return
    for speed in context_speeds(loaded, prompts, new_tokens=new_tokens, repeats=repeats):
        found["contexts"].append(asdict(speed))
        typer.echo(
            f"context {speed.context:6}: first token {mean(speed.first_token_seconds) * 1e3:8.1f} ms, "
            f"then {mean(speed.tokens_per_second):7.1f} tokens/s"
        )
    for turn in follow_up_speeds(loaded, before, repeats=repeats):
        found["follow_ups"].append(asdict(turn))
        typer.echo(
            f"history {turn.history:6}: first token {mean(turn.kept_seconds) * 1e3:8.1f} ms, "
            f"{mean(turn.recomputed_seconds) * 1e3:8.1f} ms without the cache"
        )
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="Folder or hub name of an instruct model, quantized or not.")],
    host: Annotated[str, typer.Option(help="Address to serve at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve at.")] = 7860,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    fused: Fuse = True,
    compiled: Compile = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Serve a page to chat with MODEL in the browser; needs the extra `demo`."""
    try:
        from pronghorn.awq.demo import build_demo
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"{error}; pip install 'pronghorn[demo]'") from None

    loaded, tokenizer = _load(model, dtype, device)
    if fused:
        _fuse(loaded, compiled)
    page = build_demo(loaded, tokenizer, system=system, max_new_tokens=max_new_tokens)
    page.launch(server_name=host, server_port=port)


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"wanted numbers with commas, got {text!r}") from None


def _fuse(model: Any, compiled: bool) -> None:
    """Give a model with packed linears its fast form, for good; others run as they are."""
    from pronghorn.awq.fused import fuse
    from pronghorn.awq.layers import AwqLinear

    if any(isinstance(module, AwqLinear) for module in model.modules()):
        fuse(model, compile=compiled)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Folder or hub name of an instruct model, quantized or not.")],
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token, instead of sampling.")] = False,
    capacity: Annotated[
        int | None, typer.Option(help="Tokens of a static cache: on a GPU, steps are then CUDA graphs.")
    ] = None,
    fused: Fuse = True,
    compiled: Compile = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Chat in the terminal; the history stays in the cache. An empty line ends it."""
    from pronghorn.awq.chat import Chat

    loaded, tokenizer = _load(model, dtype, device)
    generation = {"do_sample": False} if greedy else {}
    session = Chat(loaded, tokenizer, system=system, max_new_tokens=max_new_tokens, capacity=capacity, **generation)
    if fused:
        _fuse(loaded, compiled)
    _converse(session)


def _converse(session: Chat) -> None:
    while True:
        try:
            message = input("> ")
        except EOFError:
            return
        if not message.strip():
            return
        turn = session.ask(message, lambda text: typer.echo(text, nl=False))
        typer.echo(
            f"\n[{turn.prompt_tokens} tokens, {turn.reused_tokens} of them cached; first token after "
            f"{turn.first_token_seconds:.2f} s, then {turn.tokens_per_second:.1f} tokens/s]"
        )
