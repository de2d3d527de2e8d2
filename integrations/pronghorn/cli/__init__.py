"""The `pronghorn` command; methods add theirs by the entry point `pronghorn.cli`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pronghorn.methods import DISABLE, entry_points, is_disabled
from pronghorn.out_of_memory import REMEDY, is_out_of_memory


class _WithMethods(TyperGroup):
    """Our own commands and those of the methods, which are loaded when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        own = super().list_commands(ctx)
        return [*own, *(e.name for e in entry_points("cli") if e.name not in own and not is_disabled(e.name))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name; a method's that cannot be loaded is one that says why."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        for entry in entry_points("cli"):
            if entry.name == cmd_name:
                if is_disabled(cmd_name):
                    return _broken(cmd_name, f"{DISABLE} names it")
                try:
                    command = typer.main.get_command(entry.load())
                except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken method must not take the others along
                    command = _broken(cmd_name, f"{type(error).__name__}: {error}")
                command.name = cmd_name
                return command
        return None


def _broken(name: str, reason: str) -> Any:
    app = typer.Typer(help=f"(not available: {reason})")

    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def unavailable() -> None:
        typer.echo(f"{name} is not available: {reason}", err=True)
        raise typer.Exit(1)

    return typer.main.get_command(app)


app = typer.Typer(
    cls=_WithMethods, no_args_is_help=True, help="Efficient AI methods as plugins for the libraries you already run."
)


@app.command("list")
def list_methods() -> None:
    """Methods and ecosystems: what can be used here, and why not."""
    from pronghorn.cli.report import print_methods

    print_methods()


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, devices, and which plugins loaded; for those that did not, the reason and what mends it."""
    from pronghorn.cli.report import print_info

    print_info(as_json)


@app.command()
def seal(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that is complete, or was changed on purpose.")],
) -> None:
    """Write the digests of a checkpoint's files beside them; it is then loaded only as it is now."""
    from pronghorn.files.sealed import INDEX
    from pronghorn.files.sealed import seal as run

    run(folder)
    typer.echo(f"{folder / INDEX}: written")


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Operations or methods; all of them by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check operations and methods on this device: error against the reference, speed against the hardware's limit.

    Exits with 1 where a check fails. Methods whose reference data or libraries are not here are skipped, unless they
    are named.
    """
    from pronghorn.cli.verify import verify as run

    if not run(names or [], as_json):
        raise typer.Exit(1)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    ecosystem: Annotated[str, typer.Option("--for", help="transformers, vllm, diffusers or lerobot.")],
    source: Annotated[
        str | None, typer.Option(help="Folder or hub name of what it was made from: answers are compared.")
    ] = None,
    min_agreement: Annotated[float, typer.Option(help="Least share of tokens answered as the source does.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove that a checkpoint is safe to load, loads whole and answers, before you ship it; exit code 1 if not."""
    from pronghorn.cli.check import print_check

    if not print_check(folder, ecosystem, source, min_agreement, as_json):
        raise typer.Exit(1)


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Benchmarks; all of them by default.")] = None,
    seconds: Annotated[float, typer.Option(help="Most that one may take; longer ones are ended, and listed.")] = 120.0,
    out: Annotated[Path, typer.Option(help="File for the results.")] = Path("bench.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", "--list", help="Say what there is, what can run here and how long it may, and stop."),
    ] = False,
) -> None:
    """Run the benchmarks that can run here: every operation, and in a clone those of its folder.

    Exits with 1 where one fails.
    """
    from pronghorn.cli.bench import bench as run

    if not run(names or [], seconds=seconds, out=out, as_json=as_json, dry_run=dry_run):
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the method and its package: small letters, digits, underscores.")],
    ecosystem: Annotated[
        str, typer.Option(help="Where it ships to: transformers, vllm, diffusers, lerobot, trl, or torch for none.")
    ],
    into: Annotated[Path, typer.Option(help="A clone of Pronghorn, or where a distribution is to be made.")] = Path(),
) -> None:
    """Write a small method that works and passes its tests, as a start for yours."""
    from pronghorn.cli.new import is_clone, write_method

    for path in write_method(name, ecosystem, into):
        typer.echo(path)
    if is_clone(into):
        typer.echo(
            f"next: python -m pytest tests/plugins/{name}; then make test, which asks for what only you can say:"
        )
        typer.echo("its pairs with the other methods, in tests/plugins/pairs/rows.py (and make tables)")
        if ecosystem == "vllm":
            typer.echo("how it is served, in METHODS of tests/faults/serving.py")
    else:
        typer.echo(f"next: pip install -e {into / f'pronghorn-{name}'}; then pytest there, and pronghorn {name}")


def own_commands() -> set[str]:
    """Names of the commands that are no method's."""
    return {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}


def main() -> None:
    """Run the command; what a user can mend is one line that says how, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        _end(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _end(" ".join(str(error).split()) or f"out of memory: {REMEDY}")


def _end(said: str) -> None:
    typer.echo(f"Error: {said}", err=True)
    sys.exit(1)
