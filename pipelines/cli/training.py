"""`nafnet demo` and `nafnet train`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nafnet_core.errors import InputError
from pipelines import console
from pipelines.cli.shared import (
    AddressOption,
    JsonOption,
    WorkspaceOption,
    output_to,
    print_lines,
    score_table,
)
from pipelines.cli.train_tables import print_dry_run, print_result
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.tracking import Row
    from pipelines.train import TrainResult

app = typer.Typer()


@app.command(epilog="Example: nafnet demo --workspace /tmp/first-look")
def demo(
    workspace: WorkspaceOption = None,
    minutes: Annotated[float | None, typer.Option(min=0.05, help="Training time. [default: 3]")] = None,
    config: Annotated[str, typer.Option(help="Training recipe.")] = "demo",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Take the bundled model instead of training one: a minute.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Do the whole main job in minutes: synth, prepare, train, evaluate, register, promote, restore."""
    with output_to(as_json) as out:
        place = Workspace.find(workspace).make()
        console.log_to(place.root / "demo.log")
        if pretrained and (minutes is not None or config != "demo"):
            raise InputError("--pretrained trains nothing", fix="Leave out --minutes and --config, or it")
        console.say(f"Everything goes to {place.root}; the log is demo.log there.")
        from pipelines import demo as stage

        with train_progress() as on_row:
            result = stage.run(
                place,
                recipe=config,
                minutes=minutes,
                pretrained=pretrained,
                show=console.progress,
                on_row=on_row,
            )
        if out.as_json:
            out.print_json(result.to_dict())
            return
        report = result.report
        score_table("Photos that the network has not seen", report)
        console.table(
            "The run",
            ["", ""],
            [
                *_training_rows(result.train),
                ["champion", f"version {result.champion_version}"],
                ["minutes, all together", f"{result.minutes:.1f}"],
            ],
        )
        # Commands to paste: in an environment that is not activated, with their folder.
        programs = "" if shutil.which("nafnet") else f"{Path(sys.executable).parent}/"
        if result.refusal:
            print_lines(f"The champion of an earlier demo stays: {result.refusal}")
        print_lines("Pictures:", *(f"  {picture}" for picture in result.pictures))
        print_lines(
            "",
            "Look at the runs:",
            f"  {programs}mlflow ui --backend-store-uri {result.tracking_uri}",
            f"  {programs}tensorboard --logdir {place.runs}",
            "Deblur your own photos:",
            f"  {programs}nafnet restore PHOTO_OR_FOLDER --out restored --workspace {place.root}",
            "The same with your own pictures:",
            f"  {programs}nafnet synth SHARP_PHOTOS --out pairs   # or bring a folder with blur/ and sharp/",
            f"  {programs}nafnet prepare pairs --out store --crop 256 --stride 128",
            f"  {programs}nafnet train --config mobile --data store --name mine",
        )


def _training_rows(result: TrainResult | None) -> list[list[Any]]:
    if result is None:
        return []
    return [
        ["samples/s, 2 workers", f"{result.summary.samples_per_s:.1f}"],
        ["waiting for data", f"{result.summary.data_wait:.1%}"],
        ["samples", result.samples],
    ]


@app.command(
    epilog="Examples: nafnet train --config mobile --data store --val test-store --name mine; "
    "the same with --dry-run, to see what it would do; "
    "with a store of sharp photos: --data photos --set 'data.train.0.blur.kinds=\\[shake, defocus]'"
)
def train(
    config: Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")],
    data: Annotated[list[str] | None, typer.Option(help="Store to train on, or its URL; repeatable.")] = None,
    val: Annotated[str | None, typer.Option(help="Store of whole images to validate on, or its URL.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; the same name goes on with it.")] = None,
    init: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Weights to begin with: a file, a run, models:/NAME@ALIAS."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override, as optim.lr=5e-4; repeatable.")
    ] = None,
    dry: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell what the run would do, and try two steps of each stage."),
    ] = False,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network. Ctrl-C saves the state; the same command then goes on."""
    from pipelines.config import load_config
    from pipelines.store import read_manifest

    settings = load_config(config, overrides or (), name=name, train=data or (), val=val, init=init)
    # Before torch and Ray are imported, which takes seconds.
    for store in (*(store.path for store in settings.data.train), settings.data.val):
        if store is not None:
            read_manifest(store)
    with output_to(as_json) as output:
        from pipelines import train as stage

        place = Workspace.find(workspace)
        if dry:
            trial = stage.dry_run(settings, place)
            if output.as_json:
                output.print_json({"recipe": settings.model_dump(mode="json"), **trial.to_dict()})
            else:
                print_dry_run(config, settings, trial)
            return
        stage.check(settings)
        console.log_to(place.make().run_dir(settings.name) / "logs" / "driver.log")
        with train_progress() as on_row:
            result = stage.run(settings, place, address=address, on_row=on_row)
        if output.as_json:
            output.print_json(
                {
                    "run": result.run_dir,
                    "weights": result.weights,
                    "mlflow_run_id": result.mlflow_run_id,
                    "samples": result.samples,
                    "val_psnr_db": result.psnr_db,
                    "val_gain_db": result.summary.best.gain_db if result.summary.best else None,
                    "samples_per_s": result.summary.samples_per_s,
                    "data_wait": result.summary.data_wait,
                    "num_workers": result.summary.num_workers,
                    "pictures": [str(picture) for picture in result.pictures],
                    **result.summary.to_dict(),
                }
            )
            return
        print_result(settings, place, result)


@contextmanager
def train_progress() -> Iterator[Any]:
    """A progress line fed by the journal: samples of the budget, speed, PSNR, learning rate, data-wait."""
    with console.progress("train", "samples") as update:
        total, validated = 0, {}
        update(0, 0, "starting the workers")

        def on_row(row: Row) -> None:
            nonlocal total, validated
            total = int(row.metrics.get("total_samples", total))
            if "val/psnr_db" in row.metrics:
                validated = row.metrics
            if "train/samples_per_s" in row.metrics:
                update(row.samples, total, _notes(row.metrics, validated))
            elif row.metrics:  # else a mere event, which says nothing to show
                update(row.samples, total, _notes({}, validated))

        yield on_row


def _notes(step: Mapping[str, float], validated: Mapping[str, float]) -> list[str]:
    """What the progress line tells beside the samples, longest first."""
    long, short = [], []
    for metrics, name, whole, brief in (
        (step, "train/samples_per_s", "{:.1f}/s", "{:.1f}/s"),
        (step, "train/psnr_db", "patches {:.2f} dB", "{:.2f} dB"),
        (step, "train/lr", "lr {:.2g}", "lr {:.1e}"),
        (step, "train/data_wait", "data-wait {:.1%}", "wait {:.0%}"),
        (validated, "val/psnr_db", "validation {:.2f} dB", "val {:.2f}"),
        (validated, "val/gain_db", "({:+.2f})", "({:+.2f})"),
    ):
        if name in metrics:
            long.append(whole.format(metrics[name]))
            short.append(brief.format(metrics[name]))
    return [" ".join(long), *(" ".join(short[:number]) for number in range(len(short), 0, -1)), ""]
