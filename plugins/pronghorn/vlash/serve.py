"""`pronghorn vlash serve`: a policy for robots on other machines."""

from __future__ import annotations

from typing import Annotated

import typer

from pronghorn.vlash.config import CHOICES
from pronghorn.vlash.lookup import check_checkpoint, is_function, named_pair, renamed


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
    names = None if rename_map is None else renamed(rename_map)
    if mode is not None and mode not in CHOICES["async_mode"]:
        raise ValueError(f"mode: got {mode!r}, accepted are {', '.join(CHOICES['async_mode'])}")
    named = is_function(policy)
    for option, given in (("mode", mode), ("rename_map", rename_map)):
        if named and given is not None:
            raise ValueError(f"{option}: got {given!r} with policy={policy!r}, whose Description says it; wanted none")
    import torch

    from pronghorn.vlash.remote import Description, PolicyServer

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if named:
        computes, description = named_pair("policy", policy, where, "(policy, Description)", Description)
    else:
        check_checkpoint("policy", policy)
        from pronghorn.vlash.lerobot.remote import load_served

        computes, description = load_served(policy, where, mode, names)
    with PolicyServer(computes, description, host, port, token, largest_message * 2**20) as server:
        typer.echo(f"{description.policy} on {where}, for {description.settings.async_mode}: {server.address}")
        try:
            server.wait()
        except KeyboardInterrupt:
            typer.echo("stopped")
