"""`nafnet registry promote`, `rollback` and `delete`: what goes into the history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines import console
from pipelines.cli.shared import JsonOption, WorkspaceOption, number, output_to, print_lines
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.gate import Check

ReasonOption = Annotated[str, typer.Option(help="For the history.")]

app = typer.Typer()


@app.command("promote", epilog="Example: nafnet registry promote --on test-store")
def registry_promote(
    on: Annotated[str, typer.Option(help="Store that both models are scored on.")],
    version: Annotated[int | None, typer.Argument(help="Version. [default: the candidate]")] = None,
    min_gain_db: Annotated[float, typer.Option(help="PSNR over the champion's, at least.")] = 0.05,
    max_ssim_drop: Annotated[float, typer.Option(help="SSIM below the champion's, at most.")] = 0.002,
    max_latency_ratio: Annotated[
        float, typer.Option(help="Time an image over the champion's, at most.")
    ] = 1.2,
    max_image_drop_db: Annotated[
        float, typer.Option(help="PSNR below the champion's that makes an image count as worse.")
    ] = 0.5,
    max_regressed_share: Annotated[
        float, typer.Option(help="Share of images that may be worse by more than that.")
    ] = 0.1,
    reason: ReasonOption = "",
    force: Annotated[
        bool, typer.Option("--force", help="Promote though the gate refuses; needs --reason.")
    ] = False,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion, if it passes the gate."""
    with output_to(as_json) as output:
        from pipelines import registry as stage
        from pipelines.gate import GateSettings, PromotionRefusedError

        settings = GateSettings(
            min_gain_db=min_gain_db,
            max_ssim_drop=max_ssim_drop,
            max_latency_ratio=max_latency_ratio,
            max_regressed_share=max_regressed_share,
            max_image_drop_db=max_image_drop_db,
        )
        with console.progress("evaluate", "images") as update:
            try:
                moved = stage.promote(
                    Workspace.find(workspace).make(),
                    version=version,
                    on=on,
                    settings=settings,
                    reason=reason,
                    force=force,
                    on_progress=update,
                )
            except PromotionRefusedError as refused:
                if output.as_json:
                    output.print_json({"refused": True, **refused.to_dict()})
                else:
                    _gate_table(refused.version, refused.before, refused.checks)
                raise
        if output.as_json:
            output.print_json(moved.to_dict())
            return
    if moved.before == moved.version:
        print_lines(f"Version {moved.version} is the champion already.")
        return
    _gate_table(moved.version, moved.before, moved.checks)
    forced = " The gate had refused it; that is in the history, with the reason." if moved.forced else ""
    print_lines(
        f"Version {moved.version} is the champion: models:/nafnet-deblur@champion.{forced}",
        "Next: nafnet restore PHOTO_OR_FOLDER",
    )


@app.command("rollback", epilog='Example: nafnet registry rollback --reason "worse on faces"')
def registry_rollback(
    reason: ReasonOption = "", workspace: WorkspaceOption = None, as_json: JsonOption = False
) -> None:
    """Make the champion before this one champion again; twice goes two back."""
    with output_to(as_json) as output:
        from pipelines import registry as stage

        moved = stage.rollback(Workspace.find(workspace).make(), reason=reason)
        if output.as_json:
            output.print_json(moved.to_dict())
            return
    print_lines(f"Version {moved.version} is the champion again, after version {moved.before}.")


@app.command("delete", epilog="Example: nafnet registry delete 3")
def registry_delete(
    version: Annotated[str, typer.Argument(help="Number of a version, or candidate.")],
    force: Annotated[bool, typer.Option("--force", help="Even one that a rollback would come to.")] = False,
    reason: ReasonOption = "",
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete a version, never the champion. Its files go with the next `mlflow gc`."""
    with output_to(as_json) as output:
        from pipelines import registry as stage

        move = stage.delete(version, Workspace.find(workspace).make(), force=force, reason=reason)
        if output.as_json:
            output.print_json(move.to_dict())
            return
    print_lines(f"Version {move.before} is deleted.")


def _gate_table(version: int, before: int | None, checks: Sequence[Check]) -> None:
    rows = [
        [c.name, number(c.champion), number(c.candidate), c.limit, "yes" if c.passed else "no"]
        for c in checks
    ]
    base = "blurred input" if before is None else f"champion {before}"
    console.table("The gate", ["", base, f"version {version}", "limit", "passed"], rows)
