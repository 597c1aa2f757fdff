"""The `nafnet` command: arguments in, one stage called, a table or JSON out.

Stages are imported inside their commands, so that `--help` needs neither torch nor Ray nor MLflow.
Exit codes: 0 done, 2 wrong input, 3 a gate refused, 4 the environment cannot do it, 130 and 143 stopped,
1 our bug.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer

from nafnet_core.errors import CapabilityError, InputError, NAFNetError, StoppedError
from pipelines import console, openmp
from pipelines.cli import (
    cluster,
    compressing,
    data,
    evaluating,
    exporting,
    inspecting,
    jobs,
    preflight,
    registry,
    restoring,
    serving,
    synth,
    training,
    tuning,
)

app = typer.Typer(
    name="nafnet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for part in (training, tuning, synth, data, inspecting, evaluating, restoring, exporting, serving):
    app.registered_commands += part.app.registered_commands
app.add_typer(registry.app, name="registry")
app.add_typer(compressing.app, name="compress")
for part in (preflight, jobs):
    cluster.app.registered_commands += part.app.registered_commands
app.add_typer(cluster.app, name="cluster")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"nafnet-ray {version('nafnet-ray')}")
        except PackageNotFoundError:
            typer.echo("nafnet-ray, a checkout that is not installed")
        raise typer.Exit


@app.callback(epilog="Start with: nafnet demo. Every command has --help with an example.")
def _global(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train, tune, promote and run NAFNet image-deblurring models."""


# Recent Typer carries its own Click: take the base class from there, whichever it is.
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Entry point: run a command, and turn what it raises into one line and an exit code."""
    console.warn_on_stderr()
    openmp.spin_briefly()
    try:
        code = app(standalone_mode=False)
    except NAFNetError as error:
        _fail(str(error), error.exit_code)
    except _USAGE_ERROR as error:
        if not error.format_message():  # no command at all: the help has been printed
            sys.exit(InputError.exit_code)
        _fail(error.format_message(), InputError.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped", StoppedError.exit_code)
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        # A full disk, a vanished mount: nothing that our own checks could have foreseen.
        _fail(f"{error.strerror or error}: {error.filename or 'no file named'}", CapabilityError.exit_code)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        if os.environ.get("NAFNET_DEBUG"):
            raise
        _fail(
            f"this is a bug of ours: {type(error).__name__}: {error} ({place.filename}:{place.lineno}). "
            "Set NAFNET_DEBUG=1 to see all of it",
            1,
        )
    else:
        if code == StoppedError.exit_code:  # Typer's own answer to Ctrl-C
            _fail("stopped", code)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> None:
    console.say(f"nafnet: {line}")
    sys.exit(code)
