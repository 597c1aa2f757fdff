"""`nafnet cluster preflight`: what a cluster must be able to do, tried on every node."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from nafnet_core.errors import CapabilityError, InputError
from pipelines import console
from pipelines.cli.shared import JsonOption, WorkspaceOption, output_to, print_lines
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from cluster.preflight import Check

_COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}

app = typer.Typer()


@app.command(
    "preflight",
    epilog="Examples: nafnet cluster preflight; from outside: nafnet cluster submit --follow -- "
    "cluster preflight --config gopro_width64 --data s3://bucket/gopro",
)
def preflight(
    config: Annotated[str | None, typer.Option(help="The recipe that is to run; adds what it needs.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Its stores; repeatable.")] = None,
    val: Annotated[str | None, typer.Option(help="Its validation store.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override, as in `train`; repeatable.")
    ] = None,
    workspace: WorkspaceOption = None,
    address: Annotated[
        str,
        typer.Option("--address", help="Ray cluster: auto or ray://HOST:PORT.", envvar="RAY_ADDRESS"),
    ] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Try out a cluster: versions, GPUs, disks, clocks, network, storage, tracking."""
    from pipelines.config import load_config

    settings = None
    if config is None and (data or val or overrides):
        raise InputError("--data, --val and --set are of a recipe", fix="Name it with --config")
    if config is not None:
        settings = load_config(config, overrides or (), train=data or (), val=val)
    with output_to(as_json) as output:
        from cluster.connect import connect
        from pipelines.preflight import run

        place = Workspace.find(workspace)
        with connect(address):
            report = run(settings, place, on_check=(lambda check: None) if as_json else _print)
        failed = [check for check in report if check.verdict == "fail"]
        if output.as_json:
            output.print_json([check.__dict__ for check in report])
    if failed:
        console.say(f"nafnet: {len(failed)} of {len(report)} lines failed")
        sys.exit(CapabilityError.exit_code)


def _print(check: Check) -> None:
    verdict = typer.style(f"{check.verdict:5}", fg=_COLOURS[check.verdict], bold=check.verdict != "ok")
    print_lines(f"{verdict} {check.name}: {check.found}")
    if check.fix:
        print_lines(textwrap.indent(f"→ {check.fix}", " " * 6))
