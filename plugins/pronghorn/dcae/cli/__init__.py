"""`pronghorn dcae …`: convert, reconstruct, stats, dump, compare and bench; train, train-diffusion and sample."""

from __future__ import annotations

import typer

from pronghorn.dcae.cli import autoencoders, training

app = typer.Typer(no_args_is_help=True, help="DC-AE: autoencoders with 32 to 128 times fewer pixels on an edge.")
app.add_typer(autoencoders.app)
app.add_typer(training.app)
