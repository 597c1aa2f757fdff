"""Commands that run elsewhere, parsed here as they would be there: a fault costs nothing yet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from nafnet_core.errors import InputError
from pipelines.urls import holds_credentials, is_url, public

# They wait for somebody to look, or speak to the dashboard themselves.
_NOT_JOBS = {"serve", *(f"cluster {name}" for name in ("up", "down", "submit", "status", "logs", "stop"))}


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


def checked_command(words: Sequence[str]) -> dict[str, Any]:
    """Its options, once all is found out that can be here, not after minutes on machines that cost money.

    Raises:
        InputError: not for a cluster to run, a secret in it, a path that a job cannot see, or a recipe that
            cannot be.
        Typer's own usage error: no such command, or bad options.
    """
    if not words or {words[0], " ".join(words[:2])} & _NOT_JOBS:
        raise InputError("not a command for a cluster to run", got=" ".join(words[:2]), expected="as `train`")
    for word in words:
        place = word.partition("=")[2] if "=" in word.partition("://")[0] else word
        if holds_credentials(place):
            raise InputError(
                "an address with a password or a key in it, which every user of the cluster could read",
                file=public(place),
                fix="Leave it out; nodes take credentials from their own environment or role",
            )
    options = options_of(words)
    if options.get("address") not in (None, "auto", os.environ.get("RAY_ADDRESS")):
        raise InputError(
            "a job runs on its own cluster", got=f"--address {options['address']}", fix="Leave it out"
        )
    _refuse_lost(options)
    _check_recipe(words[0], options)
    return options


def _refuse_lost(options: Mapping[str, Any]) -> None:
    """Paths that a job would look for, or write, in a folder that goes with it."""
    for name in ("out", "data", "val"):
        given = options.get(name)
        for place in given if isinstance(given, (list, tuple)) else [given]:
            if place is None or is_url(place) or Path(place).is_absolute():
                continue
            if name == "out" or not Path(place).exists():
                raise InputError(
                    "what a job reads and writes are places on the cluster",
                    file=place,
                    got=f"--{name} with a relative path",
                    fix="Name a folder that its nodes share in full, or a URL",
                )


def _check_recipe(command: str, options: Mapping[str, Any]) -> None:
    """Read a training recipe or a search."""
    from pipelines.config import load_config, load_search

    load = {"train": load_config, "tune": load_search}.get(command)
    if load is None:
        return
    settings = load(
        options["config"],
        options.get("overrides") or (),
        name=options.get("name"),
        train=options.get("data") or (),
        val=options.get("val"),
        init=options.get("init"),
    )
    if not settings.data.train:
        raise InputError(
            "no training data", fix="Name a store with --data STORE, or in the recipe's data.train"
        )
