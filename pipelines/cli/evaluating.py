"""`nafnet evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines import console
from pipelines.cli.shared import (
    JsonOption,
    TrainPatchOption,
    WorkspaceOption,
    output_to,
    print_lines,
    score_table,
)
from pipelines.workspace import Workspace

app = typer.Typer()


@app.command(epilog="Example: nafnet evaluate mine test-store")
def evaluate(
    model: Annotated[str, typer.Argument(help="Weights file, run, or models:/NAME@ALIAS.")],
    data: Annotated[
        str, typer.Argument(help="Store, folder of pairs, or folder of blurred images; or its URL.")
    ],
    gt: Annotated[
        str | None, typer.Argument(help="Folder of sharp images, to a folder of blurred ones.")
    ] = None,
    train_patch: TrainPatchOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on pairs that it was not trained on: PSNR, SSIM, latency."""
    with output_to(as_json) as output:
        from pipelines import evaluate as stage
        from pipelines.models import open_model

        place = Workspace.find(workspace)
        loaded = open_model(model, place, train_patch_px=train_patch)
        pairs = stage.Pairs(data, gt)
        with console.progress("evaluate", "images") as update:
            result = stage.run(loaded, pairs, place.make(), on_progress=update)
        if output.as_json:
            output.print_json(result.report.model_dump())
            return
    statistics = "off" if loaded.train_patch_px is None else f"on, patch {loaded.train_patch_px} px"
    score_table(f"{result.report.model} on {result.report.num_images} images", result.report)
    print_lines(f"Local statistics: {statistics}")
    print_lines(f"Report: {result.path}", f"Picture: {result.picture}")
    if gt is None and not model.startswith("models:/"):
        print_lines(f"Next: nafnet registry register {model} --on {pairs.label}")
