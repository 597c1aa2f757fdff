"""`nafnet restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nafnet_core.errors import InputError
from pipelines import console
from pipelines.cli.shared import (
    JsonOption,
    OutOption,
    TrainPatchOption,
    WorkspaceOption,
    output_to,
    print_lines,
)
from pipelines.workspace import Workspace

app = typer.Typer()


@app.command(epilog="Example: nafnet restore holiday --out restored")
def restore(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Photos, folders or globs.")],
    out: OutOption = Path("restored"),
    model: Annotated[
        str | None, typer.Option(help="Weights, run or models:/…  [default: the champion]")
    ] = None,
    tile: Annotated[int | None, typer.Option(min=64, help="Side of a tile, px. [default: by memory]")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    on_error: Annotated[str, typer.Option(help="skip or stop.")] = "skip",
    train_patch: TrainPatchOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deblur photos. Those that were done before with the same model are skipped."""
    for flag, value, known in (
        ("--precision", precision, ("auto", "fp32", "bf16")),
        ("--on-error", on_error, ("skip", "stop")),
    ):
        if value not in known:
            raise InputError(f"unknown {flag}", got=value, expected=", ".join(known))
    with output_to(as_json) as output:
        from pipelines import restore as stage
        from pipelines.models import open_model

        stage.find_photos(inputs, out)
        loaded = open_model(model, Workspace.find(workspace), train_patch_px=train_patch)
        console.say(f"Model: {loaded.label}")
        if loaded.train_patch_px is None and train_patch is None:
            console.say(
                "Local statistics are off, since the file does not say its training patch: --train-patch"
            )
        with console.progress("restore", "photos") as update:
            result = stage.run(
                inputs,
                loaded,
                out,
                tile_px=tile,
                precision=precision,
                stop_on_error=on_error == "stop",
                on_progress=update,
            )
        for file in result.files:
            if file.error:
                console.say(f"failed: {file.error}")
        counts = {status: result.count(status) for status in ("restored", "skipped", "failed")}
        if output.as_json:
            output.print_json({**counts, "out": out, "record": out / stage.RECORD, "model": loaded.label})
        else:
            summary = ", ".join(f"{count} {status}" for status, count in counts.items())
            print_lines(f"{summary}. In {out}, what was done in {out / stage.RECORD}")
    if counts["failed"]:
        raise typer.Exit(InputError.exit_code)
