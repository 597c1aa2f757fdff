"""`nafnet serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pipelines import console
from pipelines.cli.shared import AddressOption, TrainPatchOption, WorkspaceOption
from pipelines.workspace import Workspace

app = typer.Typer()


@app.command(epilog="Example: nafnet serve --port 8000")
def serve(
    model: Annotated[
        str | None,
        typer.Option(
            help="Weights, run, models:/… or exported file.  [default: the champion, followed; until there "
            "is one, mobile-v1]"
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's want a token.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients must send. [default: NAFNET_TOKEN]")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Processes with a network each.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each. [default: cores / replicas]")
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Requests at a time in a replica; more get 429.")
    ] = 32,
    max_mib: Annotated[float, typer.Option(help="Largest upload.")] = 32.0,
    max_megapixels: Annotated[float, typer.Option(help="Largest image.")] = 50.0,
    timeout_s: Annotated[float, typer.Option(help="From the end of the upload to the answer.")] = 120.0,
    backend: Annotated[
        str | None,
        typer.Option(
            help="torch, onnxruntime or openvino, of what `nafnet export --keep` kept; a version without one "
            "is refused. auto: the fastest at the start, kept to. [default: torch; an exported file's own]"
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, as reports are made in, or bf16; of exports also fp16, int8. [default: fp32; an "
            "exported file's own]"
        ),
    ] = None,
    tile_batch: Annotated[
        int | None, typer.Option(min=1, help="Equal tiles in one pass. [default: 1 on a CPU, 8 on a GPU]")
    ] = None,
    train_patch: TrainPatchOption = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
) -> None:
    """Deblur photos over HTTP, with a page for browsers. The champion is followed."""
    from pipelines import serve as stage

    stage.check_installed()
    from pipelines.models import CHAMPION, is_exported
    from pipelines.serve.settings import ServeSettings, read_token

    settings = ServeSettings(
        model=_absolute(model) if model is not None else CHAMPION,
        workspace=Workspace.find(workspace).root,
        host=host,
        port=port,
        token_digest=read_token(token_file, os.environ.get("NAFNET_TOKEN")),
        replicas=replicas,
        threads=threads,
        max_queue=max_queue,
        max_mib=max_mib,
        max_megapixels=max_megapixels,
        timeout_s=timeout_s,
        backend=backend,
        precision=precision or ("auto" if is_exported(model) else "fp32"),  # type: ignore[arg-type]  # checked
        tile_batch=tile_batch,
        train_patch_px=train_patch,
    )

    def on_ready(label: str) -> None:
        console.say(f"Model: {label}")
        console.say(f"Serving at {settings.address}: the page at /, the interface at /docs. Ctrl-C ends it.")

    console.say(f"Starting Ray and the service with {settings.model}: some 20 s")
    stage.run(settings, address=address, on_ready=on_ready, on_change=console.say)


def _absolute(model: str) -> str:
    """Replicas run in another folder."""
    return str(Path(model).absolute()) if Path(model).exists() else model
