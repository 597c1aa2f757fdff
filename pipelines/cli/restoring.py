"""`nafnet restore`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from nafnet_core.errors import InputError
from pipelines import console
from pipelines.cli.shared import (
    AddressOption,
    JsonOption,
    TrainPatchOption,
    WorkspaceOption,
    output_to,
    print_lines,
    stoppable,
)
from pipelines.counting import counted
from pipelines.urls import public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.restore import RestoreConfig, Restored, RestoreResult

app = typer.Typer()
_STRAYED_LEVELS = 2.0  # of colour, in the mean of a photo: about where two patches side by side differ
_NAMED = 3


@app.command(
    epilog="Examples: nafnet restore holiday --out restored; nafnet restore 'scans/*.tif' clip.mp4 --tta; "
    "nafnet restore s3://bucket/photos --out s3://bucket/restored --address auto"
)
def restore(
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Photos, videos, folders, globs, or their URLs.")
    ],
    out: Annotated[str, typer.Option("--out", help="Folder to write, or its URL.")] = "restored",
    model: Annotated[
        str | None,
        typer.Option(
            help="Weights, run, models:/… or exported file.  [default: the champion, else mobile-v1]"
        ),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="jpg, png, tif, webp or bmp. [default: each as it is]")
    ] = "",
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")] = 95,
    tile: Annotated[int | None, typer.Option(min=64, help="Side of a tile, px. [default: by memory]")] = None,
    tile_batch: Annotated[
        int, typer.Option(min=1, help="Equal tiles at a time; more than 1 is for GPUs.")
    ] = 1,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    backend: Annotated[
        str,
        typer.Option(
            help="torch, onnxruntime or openvino, of what `nafnet export --keep` kept; auto: the fastest of "
            "these on this machine."
        ),
    ] = "auto",
    scale: Annotated[
        float,
        typer.Option(min=0.1, max=1.0, help="Restore a smaller image, and add its gain: for large blur."),
    ] = 1.0,
    tta: Annotated[
        bool, typer.Option("--tta", help="Mean over eight flips and turns, in eight times the time.")
    ] = False,
    keep_colour: Annotated[
        bool, typer.Option("--keep-colour", help="Keep the photo's low frequencies, as its colours.")
    ] = False,
    on_error: Annotated[str, typer.Option(help="skip or stop.")] = "skip",
    train_patch: TrainPatchOption = None,
    address: AddressOption = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Ray workers, here or on the cluster. [default: one a GPU, or a CPU]"),
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deblur photos and videos. Those that were done before with the same model are skipped."""
    if on_error not in ("skip", "stop"):
        raise InputError("unknown --on-error", got=on_error, expected="skip, stop")
    with output_to(as_json) as output:
        from pipelines import restore as stage
        from pipelines.export.running import open_runnable
        from pipelines.restorer import RestoreSettings

        config = stage.RestoreConfig(
            inputs=inputs,
            out=out,
            settings=RestoreSettings(
                tile_px=tile,
                tile_batch=tile_batch,
                precision=precision,  # type: ignore[arg-type]
                scale=scale,
                ensemble=tta,
                keep_colour=keep_colour,
            ),
            suffix=f".{format.lower().lstrip('.')}" if format else None,
            quality=quality,
            stop_on_error=on_error == "stop",
            use_ray=address is not None or workers is not None,
            num_workers=workers,
        )
        config.items()
        loaded = open_runnable(
            model,
            Workspace.find(workspace),
            backend=None if backend == "auto" and config.use_ray else backend,
            precision=precision,
            train_patch_px=train_patch,
        )
        if config.use_ray:
            loaded.check_travels()
        console.say(f"Model: {loaded.label}")
        if loaded.train_patch_px is None and train_patch is None and "export" not in loaded.metadata:
            console.say(
                "Local statistics are off, since the file does not say its training patch: --train-patch"
            )
        # In this order: `ray.init` sets a SIGTERM handler of its own.
        with (
            _ray(config, address),
            stoppable("what is done is kept", fix="The same command goes on"),
            console.progress("restore", "files") as update,
        ):
            result = stage.run(config, loaded, on_progress=update)
        for line in _remarks(result, keep_colour):
            console.say(line)
        counts = {status: result.count(status) for status in ("restored", "skipped", "failed")}
        record = f"{public(out).rstrip('/')}/{stage.RECORD}"
        if output.as_json:
            rate = {"seconds": result.seconds, "images_per_s": result.images_per_s}
            places = {"out": public(out), "record": record, "model": loaded.label, "backend": loaded.backend}
            output.print_json({**counts, **rate, **places})
        else:
            rate = f"{result.images_per_s:.3g} images/s" if counts["restored"] else ""
            summary = ", ".join(
                [*(f"{count} {status}" for status, count in counts.items()), *filter(None, [rate])]
            )
            print_lines(f"{summary}, by {loaded.backend}. In {public(out)}, what was done in {record}")
    if counts["failed"]:
        raise typer.Exit(InputError.exit_code)


@contextmanager
def _ray(config: RestoreConfig, address: str | None) -> Iterator[None]:
    """The cluster, or Ray on this machine, where it is to be used."""
    if not config.use_ray:
        yield
        return
    from cluster.connect import connect
    from pipelines.preflight import in_brief
    from pipelines.storage import folder

    with connect(address):
        if address is not None:
            place = folder(config.out)
            place.make()
            in_brief(None, place)
        yield


def _remarks(result: RestoreResult, keep_colour: bool) -> list[str]:
    """What a person should know of single photos: failures one by one, the rest by number."""
    lines = [f"failed: {file.error}" for file in result.files if file.error]

    def named(what: str, files: list[Restored], fix: str) -> None:
        if files:
            names = ", ".join(repr(file.input) for file in files[:_NAMED])
            rest = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
            lines.append(f"{what} in {counted(len(files), 'file')}: {names}{rest}. {fix}")

    done = [file for file in result.files if file.status == "restored"]
    named(
        "the network failed, and tiles were done again without local statistics",
        [file for file in done if file.tiles_redone and not file.tiles_kept],
        "Look at these",
    )
    named(
        "the network failed, and tiles were left as they were",
        [file for file in done if file.tiles_kept],
        "The record says how many",
    )
    if not keep_colour:
        named(
            f"colours moved by more than {_STRAYED_LEVELS:g} levels",
            [
                file
                for file in done
                if file.colour_shift and max(map(abs, file.colour_shift)) > _STRAYED_LEVELS
            ],
            "--keep-colour keeps them",
        )
    notes: dict[str, int] = {}
    for note in (note for file in done for note in file.notes):
        notes[note] = notes.get(note, 0) + 1
    lines += [f"{note}, in {counted(number, 'file')}" for note, number in notes.items()]
    return lines
