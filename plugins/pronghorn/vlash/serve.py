"""`pronghorn vlash serve`: a policy for robots on other machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pronghorn.vlash.lookup import named_function


def serve(
    policy: Annotated[
        str, typer.Option(help="A LeRobot checkpoint, or package.module:function, which gives (policy, Description).")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 50061,
    token: Annotated[
        str | None, typer.Option(envvar="PRONGHORN_VLASH_TOKEN", help="What clients have to know.", show_envvar=True)
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="vlash, naive, rtc, rtc_full or sync; as configured if none.")
    ] = None,
    rename_map: Annotated[
        str | None,
        typer.Option(help="JSON of camera names, the robot's to the policy's: {\"observation.images.a\": …}."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cpu …; the GPU if there is one.")] = None,
    largest_message: Annotated[int, typer.Option(min=1, help="MiB that a request may have.")] = 64,
) -> None:
    """Compute chunks for robots that ask over the network; stop with Ctrl-C."""
    import torch

    from pronghorn.vlash.remote import PolicyServer

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if ":" in policy and not Path(policy).exists():
        computes, description = named_function("policy", policy)(where)
    else:
        from pronghorn.vlash.lerobot.remote import load_served

        computes, description = load_served(policy, where, mode, json.loads(rename_map) if rename_map else None)
    with PolicyServer(computes, description, host, port, token, largest_message * 2**20) as server:
        typer.echo(f"{description.policy} on {where}, for {description.settings.async_mode}: {server.address}")
        try:
            server.wait()
        except KeyboardInterrupt:
            typer.echo("stopped")
