"""`nafnet export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nafnet_core.errors import InputError
from pipelines import console
from pipelines.cli.shared import (
    JsonOption,
    TrainPatchOption,
    WorkspaceOption,
    on_a_disk,
    output_to,
    print_lines,
)
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.export import ExportResult

app = typer.Typer()


@app.command(
    epilog="Examples: nafnet export mobile-v1 --to onnx --out mobile-v1.onnx; "
    "nafnet export models:/nafnet-deblur@champion --to openvino --precision bf16 --on store --keep"
)
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Weights, run, models:/… or mobile-v1.")],
    to: Annotated[str, typer.Option("--to", help="onnx, openvino, tensorrt, torch, executorch or tvm.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="File to write. [default: MODEL with the format's suffix]",
            parser=on_a_disk,
            metavar="FILE",
        ),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Not to a file of yours: into the workspace, and beside a registered version, where "
            "--backend finds it.",
        ),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16, what the format has. [default: its first; int8 of int8]"),
    ] = None,
    as_bytes: Annotated[
        bool, typer.Option("--bytes", help="Images are N×H×W×3 bytes, in and out: for other programs.")
    ] = False,
    on: Annotated[
        str | None, typer.Option(help="Store of pairs to compare on. [default: photos of scikit-image]")
    ] = None,
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            help="Of executorch and tvm, height and width of all images, from 64 px on: `--size 720 1280`. "
            "[default: 256 256]",
            metavar="H W",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Of tvm, the processor to compile for, in its JSON. [default: this machine's]"),
    ] = None,
    trials: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of tvm, candidates to measure for each loop of the network: with 16, some ten minutes.",
        ),
    ] = 0,
    train_patch: TrainPatchOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model for another runtime; nothing where that computes something else than torch."""
    with output_to(as_json) as output:
        from pipelines import export as stage
        from pipelines.models import open_model

        place = Workspace.find(workspace)
        if keep and (out is not None or as_bytes):
            raise InputError(
                "what is kept lies in the workspace, for our own commands",
                got=f"--keep {'--bytes' if as_bytes else '--out'}",
                fix="Leave one of the two out",
            )
        suffix = stage.form_of(to, target=target).suffix
        config = stage.ExportConfig(
            to=to,
            out=(out or Path(_stem(model) + suffix)) if not keep else place.exports / f"model{suffix}",
            precision=precision,  # type: ignore[arg-type]
            takes_bytes=as_bytes,
            on=on,
            size_px=size,
            target=target,
            num_trials=trials,
        )
        if keep:
            stage.check_kept(config)
        loaded = open_model(model, place, train_patch_px=train_patch)
        console.say(f"Model: {loaded.label}")
        if loaded.train_patch_px is None and train_patch is None:
            console.say(
                "Local statistics are off, since the file does not say its training patch: --train-patch"
            )
        stage.precision_of(config, loaded)  # refused before anything is built
        console.say(
            "Measuring loops for minutes, then comparing with torch"
            if trials
            else "Building, and comparing with torch: a minute or two for a small network"
        )
        with console.progress("tune", "candidates") as update:
            result = stage.keep(config, loaded, place) if keep else stage.run(config, loaded, on_trial=update)
        taken = stage.choose(loaded, place, backend="auto") if keep else None
        if output.as_json:
            chosen = {} if taken is None else {"auto": taken.backend}
            output.print_json({**result.to_dict(), **chosen})
            return
    _print(result)
    if to == "tvm" and not trials:
        print_lines("Its loops are plain ones; --trials 16 measures faster ones on this machine.")
    if taken is not None:
        precision_told = f", {taken.fixed_precision}" if taken.fixed_precision else ""
        print_lines(
            f"With --backend auto, as `restore` has it, this machine takes {taken.backend}{precision_told}."
        )


def _stem(model: str) -> str:
    """What the file is called where no name is given."""
    from pipelines.models import WEIGHT_SUFFIXES

    registered = model.removeprefix("models:/")
    if registered != model:
        return registered.replace("@", "-").replace("/", "-")
    path = Path(model)
    return (path.stem if path.suffix in WEIGHT_SUFFIXES else path.name) or "model"


def _print(result: ExportResult) -> None:
    parity = result.parity
    in_torch = "imitated in torch" if result.precision == "int8" else "in torch fp32"
    rows = [
        ["largest difference", f"{parity.difference:.2g} of the range"],
        [
            "PSNR, dB",
            f"{parity.psnr_db:.3f}; torch {parity.psnr_torch_db:.3f}, blurred {parity.psnr_blurred_db:.3f}",
        ],
        [
            "{}×{}".format(*parity.timed_px),
            f"{parity.seconds * 1e3:.0f} ms, {in_torch} {parity.seconds_torch * 1e3:.0f} ms",
        ],
        ["MiB", f"{result.num_bytes / 2**20:.2f}"],
    ]
    title = f"Against torch, on {parity.num_crops} crops of {parity.data}"
    console.table(title, ["", result.precision], rows)
    print_lines(*(f"Written: {file}" for file in result.files))
