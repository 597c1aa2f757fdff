"""Commands that run elsewhere, parsed here as they would be there: a fault costs nothing yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from nafnet_core.errors import InputError
from pipelines.urls import is_url


def options_of(words: Sequence[str]) -> dict[str, Any]:
    """The values of a command's options and arguments; nothing is run.

    Raises:
        Typer's own usage error, as the command itself would.
    """
    from pipelines.cli import app as nafnet

    group: Any = typer.main.get_command(nafnet)
    context = group.make_context("nafnet", list(words))
    rest = list(words)
    while hasattr(group, "commands"):
        _, group, rest = group.resolve_command(context, rest)
        context = group.make_context(group.name, rest, parent=context)
    return dict(context.params)


def refuse_lost_output(options: Mapping[str, Any]) -> None:
    """Raise `InputError` where a command would write into a folder that goes with its job."""
    out = options.get("out")
    if out is not None and not is_url(out) and not Path(out).is_absolute():
        raise InputError(
            "what a job writes is a place on the cluster",
            file=out,
            fix="Name a folder that its nodes share in full, or a URL; a relative one is gone with the job",
        )
