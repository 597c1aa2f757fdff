"""`nafnet compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines import console
from pipelines.cli.shared import (
    JsonOption,
    OutOption,
    TrainPatchOption,
    WorkspaceOption,
    on_a_disk,
    output_to,
    print_lines,
    stoppable,
)
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.compress import DeployTable, PruneResult, QuantizeResult

app = typer.Typer(no_args_is_help=True, help="Make models smaller and faster, and tell what that loses.")


@app.callback()
def _group() -> None:
    """Make models smaller and faster, and tell what that loses."""


@app.command(
    epilog="Example: nafnet compress prune mobile-v1 --ratio 0.2 --on store --out pruned.safetensors; "
    "then nafnet train --config pruned.yaml --data store --val test-store"
)
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Weights, run, models:/… or mobile-v1.")],
    out: Annotated[
        Path, typer.Option("--out", help="Weights file to write.", parser=on_a_disk, metavar="FILE")
    ] = Path("pruned.safetensors"),
    ratio: Annotated[
        float | None, typer.Option(help="Share of the channels behind each gate that leaves.")
    ] = None,
    macs: Annotated[
        float | None,
        typer.Option(help="Share of the multiply-accumulates that stays; the cheapest channels leave."),
    ] = None,
    on: Annotated[
        str | None, typer.Option(help="Store of pairs to judge on, and to fit what stays. Take one.")
    ] = None,
    importance: Annotated[
        str, typer.Option(help="auto, magnitude or taylor. auto: taylor with --on.")
    ] = "auto",
    multiple: Annotated[int, typer.Option(min=1, help="What stays is a multiple of this.")] = 8,
    patches: Annotated[int, typer.Option(min=1, help="Patches of the store to look at.")] = 64,
    patch: Annotated[int, typer.Option(min=16, help="Their side, px.")] = 128,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take channels out of a network. The result is an ordinary model, with a recipe to fine-tune it."""
    with output_to(as_json) as output:
        from pipelines import compress as stage
        from pipelines.models import open_model

        config = stage.PruneConfig(
            out=out,
            ratio=ratio,
            macs=macs,
            importance=importance,  # type: ignore[arg-type]
            on=on,
            multiple=multiple,
            num_patches=patches,
            patch_px=patch,
        )
        loaded = open_model(model, Workspace.find(workspace))
        with console.progress("prune", "patches") as update:
            result = stage.run_prune(config, loaded, on_patch=lambda done, total: update(done, total, ""))
        if output.as_json:
            output.print_json(result.to_dict())
        else:
            _print_pruned(loaded.label, result)


@app.command(
    epilog="Example: nafnet compress quantize mobile-v1 --calibration store --out int8.safetensors; "
    "then nafnet export int8.safetensors --to onnx"
)
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Weights, run, models:/… or mobile-v1.")],
    out: Annotated[
        Path, typer.Option("--out", help="Weights file to write.", parser=on_a_disk, metavar="FILE")
    ] = Path("int8.safetensors"),
    calibration: Annotated[
        str | None, typer.Option("--calibration", "--on", help="Store of pairs to calibrate and to judge on.")
    ] = None,
    to: Annotated[str, typer.Option(help="int8, or fp16 or bf16 for a smaller file.")] = "int8",
    max_loss: Annotated[
        float, typer.Option(help="What int8 may lose, dB; the most sensitive layers stay as they are.")
    ] = 0.1,
    patches: Annotated[int, typer.Option(min=1, help="Patches of the store to look at.")] = 48,
    patch: Annotated[int, typer.Option(min=16, help="Their side, px.")] = 128,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Round a network to int8, with a recipe to train it on that way. Then `nafnet export` it."""
    with output_to(as_json) as output:
        from pipelines import compress as stage
        from pipelines.models import open_model

        config = stage.QuantizeConfig(
            out=out,
            to=to,  # type: ignore[arg-type]
            on=calibration,
            max_loss_db=max_loss,
            num_patches=patches,
            patch_px=patch,
        )
        loaded = open_model(model, Workspace.find(workspace))
        with console.progress("quantize", "layers") as update:
            result = stage.run_quantize(config, loaded, on_step=update)
        if output.as_json:
            output.print_json(result.to_dict())
        else:
            _print_quantized(loaded.label, result)


def _print_quantized(label: str, result: QuantizeResult) -> None:
    if result.psnr_db is not None:
        before, after = result.psnr_db
        rows = [["PSNR on other patches, dB", f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]]
        console.table(f"{label}, in {result.to}", ["", "before", "after", ""], rows)
        print_lines(f"Those patches, blurred: {result.psnr_blurred_db:.2f} dB")
    print_lines(f"Weights: {result.weights}")
    if result.recipe is not None:
        left = ", ".join(result.kept) or "none"
        print_lines(
            f"{result.num_int8} convolutions round to int8; left as they are: {left}",
            "Run it in int8:",
            f"  nafnet export {result.weights} --to onnx",
            "Win back what was lost:",
            f"  nafnet train --config {result.recipe} --data STORE --val TEST_STORE",
        )


@app.command(
    epilog="Example: nafnet compress report mobile-v1 pruned.safetensors mobile-v1.onnx --on test-store"
)
def report(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Weights, run, models:/…, mobile-v1 or exported file. The first is the reference.",
        ),
    ],
    on: Annotated[str, typer.Option("--on", help="Store or folder of pairs to score on, not trained on.")],
    out: OutOption = Path("report"),
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="Of weights: fp32 or bf16; repeatable. [default: fp32, and bf16 where the processor has it]"
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Rounds of timing; each model once in each.")] = 7,
    train_patch: TrainPatchOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Models side by side: size, PSNR, SSIM, latency and memory, as Markdown, CSV and a picture."""
    with output_to(as_json) as output:
        from pipelines import compress as stage
        from pipelines.scoring.pairs import Pairs

        contenders = stage.find_contenders(
            models,
            Workspace.find(workspace),
            precisions=precision or (),  # type: ignore[arg-type]
            train_patch_px=train_patch,
        )
        if train_patch is None:
            for name in dict.fromkeys(each.name for each in contenders if each.train_patch_px is None):
                console.say(f"Local statistics of {name} are off: it does not say its training patch")
        pairs = Pairs(on)
        stage.check_out(out)
        with (
            stoppable("nothing is written", fix="The same command begins anew"),
            console.progress("report", "steps") as update,
        ):
            table = stage.measure(contenders, pairs, runs=runs, on_step=update)
        files = stage.write(out, [table])
        if output.as_json:
            output.print_json({**table.to_dict(), "files": files})
        else:
            _print_report(table)
            print_lines(*(f"Written: {file}" for file in files))


def _print_report(table: DeployTable) -> None:
    from pipelines.compress.table import front_told, score_cells, time_cells

    numbered = list(enumerate(table.rows, 1))
    # Two tables: all columns in one leave no room for names.
    console.table(
        "Size and scores",
        ["", "model", "MiB", "PSNR, dB", "loss, dB", "SSIM"],
        [[number, row.label, f"{row.file_mib:.2f}", *score_cells(row)] for number, row in numbered],
    )
    console.table(
        "Time, × against the first, and memory",
        ["", "256×256, ms", "×", "1280×720, ms", "×", "peak, MiB"],
        [[number, *time_cells(row), f"{row.peak_memory_mib:.0f}"] for number, row in numbered],
    )
    told = (table.scores_told(), table.warning(), front_told(table.rows), table.times_told())
    print_lines(*filter(None, told))


def _print_pruned(label: str, result: PruneResult) -> None:
    rows = [
        ["parameters", *(f"{number:,}" for number in result.parameters), _share(*result.parameters)],
        ["GMACs at 1280×720", *(f"{number:.2f}" for number in result.gmacs), _share(*result.gmacs)],
    ]
    if result.psnr_db is not None:
        before, after = result.psnr_db
        rows.append(["PSNR on other patches, dB", f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"])
    console.table(f"{label}, pruned by {result.importance}", ["", "before", "after", ""], rows)
    if result.psnr_blurred_db is not None:
        print_lines(f"Those patches, blurred: {result.psnr_blurred_db:.2f} dB")
    print_lines(
        f"Weights: {result.weights}",
        "Fine-tune them, for what was lost:",
        f"  nafnet train --config {result.recipe} --data STORE --val TEST_STORE",
    )


def _share(before: float, after: float) -> str:
    return f"× {after / before:.2f}"
