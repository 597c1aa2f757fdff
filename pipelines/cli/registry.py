"""`nafnet registry …`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines import console
from pipelines.cli.shared import JsonOption, TrainPatchOption, WorkspaceOption, number, output_to, print_lines
from pipelines.urls import public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.gate import Check
    from pipelines.registry import Version

app = typer.Typer(
    help="The model registry: versions, candidate, champion.",
    epilog="Example: nafnet registry register mine, then nafnet registry promote --on test-store",
    no_args_is_help=True,
)


@app.command("register", epilog="Example: nafnet registry register mine --on test-store")
def registry_register(
    model: Annotated[str, typer.Argument(help="Weights file or run.")],
    on: Annotated[str | None, typer.Option(help="Store to score it on.")] = None,
    train_patch: TrainPatchOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a model as a new version; it becomes the candidate."""
    with output_to(as_json) as output:
        from pipelines import registry as stage

        with console.progress("evaluate", "images") as update:
            version = stage.register(
                model, Workspace.find(workspace), on=on, train_patch_px=train_patch, on_progress=update
            )
        if output.as_json:
            output.print_json(version.to_dict())
            return
    if version.psnr_db is not None and version.gain_db is not None:
        print_lines(f"{version.psnr_db:.2f} dB, {version.gain_db:+.2f} against the blurred input.")
        if version.gain_db <= 0:
            print_lines("That is no gain: the gate will refuse it.")
    print_lines(
        f"Version {version.version} is the candidate.",
        f"Next: nafnet registry promote --on {public(on) if on else 'TEST_STORE'}",
    )


@app.command("promote", epilog="Example: nafnet registry promote --on test-store")
def registry_promote(
    on: Annotated[str, typer.Option(help="Store that both models are scored on.")],
    version: Annotated[int | None, typer.Argument(help="Version. [default: the candidate]")] = None,
    min_gain_db: Annotated[float, typer.Option(help="PSNR over the champion's, at least.")] = 0.05,
    max_ssim_drop: Annotated[float, typer.Option(help="SSIM below the champion's, at most.")] = 0.002,
    max_latency_ratio: Annotated[
        float, typer.Option(help="Time an image over the champion's, at most.")
    ] = 1.2,
    reason: Annotated[str, typer.Option(help="For the history.")] = "",
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion, if it passes the gate."""
    with output_to(as_json) as output:
        from pipelines import registry as stage
        from pipelines.gate import GateSettings, PromotionRefusedError

        settings = GateSettings(
            min_gain_db=min_gain_db, max_ssim_drop=max_ssim_drop, max_latency_ratio=max_latency_ratio
        )
        with console.progress("evaluate", "images") as update:
            try:
                moved = stage.promote(
                    Workspace.find(workspace),
                    version=version,
                    on=on,
                    settings=settings,
                    reason=reason,
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
    print_lines(
        f"Version {moved.version} is the champion: models:/nafnet-deblur@champion",
        "Next: nafnet restore PHOTO_OR_FOLDER",
    )


def _gate_table(version: int, before: int | None, checks: Sequence[Check]) -> None:
    rows = [
        [c.name, number(c.champion), number(c.candidate), c.limit, "yes" if c.passed else "no"]
        for c in checks
    ]
    base = "blurred input" if before is None else f"champion {before}"
    console.table("The gate", ["", base, f"version {version}", "limit", "passed"], rows)


@app.command("list", epilog="Example: nafnet registry list")
def registry_list(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Show the registered versions, newest first."""
    with output_to(as_json) as output:
        from pipelines import registry as stage

        found: list[Version] = stage.versions(Workspace.find(workspace).make())
        if output.as_json:
            output.print_json([version.to_dict() for version in found])
            return
    rows = [
        [v.version, ", ".join(v.aliases), v.model, number(v.psnr_db), number(v.gain_db), v.created[:10]]
        for v in found
    ]
    console.table("nafnet-deblur", ["version", "alias", "model", "PSNR, dB", "gain, dB", "registered"], rows)
