"""The `nafnet` command: arguments in, one stage called, a table or JSON out.

Stages are imported inside their commands, so that `--help` needs neither torch nor Ray nor MLflow.
Exit codes: 0 done, 2 wrong input, 3 a gate refused, 4 the environment cannot do it, 130 and 143 stopped,
1 our bug.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from nafnet_core.errors import InputError, NAFNetError
from pipelines import console
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.evaluate import Report
    from pipelines.registry import Version
    from pipelines.tracking import Row

app = typer.Typer(
    name="nafnet",
    help="Train, tune, promote and run NAFNet image-deblurring models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
registry_app = typer.Typer(help="The model registry: versions, candidate, champion.", no_args_is_help=True)
app.add_typer(registry_app, name="registry")

WorkspaceOption = Annotated[
    Path | None,
    typer.Option("--workspace", help="Where runs and the MLflow data base live.", envvar="NAFNET_WORKSPACE"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster: auto or ray://HOST:PORT. Default: this machine.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write.")]


@dataclass
class _Output:
    """Where results go: a table for people, or one JSON object."""

    as_json: bool
    stdout: Any

    def print_json(self, content: Any) -> None:
        print(json.dumps(content, indent=1, default=str), file=self.stdout)  # noqa: T201


@contextmanager
def _output(as_json: bool) -> Iterator[_Output]:
    """Libraries print what they like: with --json, stdout is kept for the one object."""
    stdout = sys.stdout
    if as_json:
        sys.stdout = sys.stderr
    try:
        yield _Output(as_json, stdout)
    finally:
        sys.stdout = stdout


@app.command(epilog="Example: nafnet demo --workspace /tmp/first-look")
def demo(
    workspace: WorkspaceOption = None,
    minutes: Annotated[float | None, typer.Option(min=0.05, help="Training time. [default: 3]")] = None,
    config: Annotated[str, typer.Option(help="Training recipe.")] = "demo",
    as_json: JsonOption = False,
) -> None:
    """Do the whole main job in minutes: synth, prepare, train, evaluate, register, promote, restore."""
    with _output(as_json) as out:
        place = Workspace.find(workspace).make()
        console.log_to(place.root / "demo.log")
        console.say(f"Everything goes to {place.root}; the log is demo.log there.")
        from pipelines import demo as stage

        with _train_progress() as on_row:
            result = stage.run(place, recipe=config, minutes=minutes, show=console.progress, on_row=on_row)
        if out.as_json:
            out.print_json(result.to_dict())
            return
        report = result.report
        _score_table("Photos that the network has not seen", report)
        console.table(
            "The run",
            ["", ""],
            [
                ["samples/s, 2 workers", f"{result.train.samples_per_s:.1f}"],
                ["waiting for data", f"{result.train.data_wait:.1%}"],
                ["samples", result.train.samples],
                ["champion", f"version {result.champion_version}"],
                ["minutes, all together", f"{result.minutes:.1f}"],
            ],
        )
        _print("Pictures:", *(f"  {picture}" for picture in result.pictures))
        _print(
            "",
            "Look at the runs:",
            f"  mlflow ui --backend-store-uri {result.tracking_uri}",
            f"  tensorboard --logdir {place.runs}",
            "Deblur your own photos:",
            f"  nafnet restore PHOTO_OR_FOLDER --out restored --workspace {place.root}",
            "The same with your own pictures:",
            "  nafnet synth SHARP_PHOTOS --out pairs          # or bring a folder with blur/ and sharp/",
            "  nafnet prepare pairs --out store",
            "  nafnet train --config mobile --data store --name mine",
        )


@app.command(epilog="Example: nafnet synth photos --out pairs --variants 4")
def synth(
    sharp: Annotated[list[Path], typer.Argument(help="Sharp photos, or folders of them.")],
    out: OutOption,
    variants: Annotated[int, typer.Option(min=1, help="Differently blurred copies of each photo.")] = 1,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="shake, defocus, gaussian, measured; repeatable. [default: shake]"),
    ] = None,
    min_size: Annotated[float, typer.Option(help="Smallest extent of the blur, px.")] = 3.0,
    max_size: Annotated[float, typer.Option(help="Largest extent of the blur, px.")] = 15.0,
    max_noise: Annotated[float, typer.Option(help="Read noise, linear light, 1 is white.")] = 0.004,
    max_side: Annotated[int | None, typer.Option(min=64, help="Shrink photos to this longer side.")] = None,
    kernels: Annotated[
        Path | None, typer.Option(help="Folder of measured kernels, for kind measured.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make blurred/sharp pairs from sharp photos."""
    from pipelines import synth as stage

    known = ("shake", "defocus", "gaussian", "measured")
    for name in kind or ():
        if name not in known:
            raise InputError("unknown kind of blur", got=name, expected=", ".join(known))
    settings = stage.SynthConfig(
        sharp=sharp,
        out=out,
        seed=seed,
        variants=variants,
        kinds=tuple(kind or ("shake",)),  # type: ignore[arg-type]
        min_size_px=min_size,
        max_size_px=max_size,
        max_noise=max_noise,
        max_side_px=max_side,
        kernels=kernels,
    )
    with _output(as_json) as output, console.progress("synth", "photos") as update:
        result = stage.run(settings, on_progress=update)
        for line in result.refused:
            console.say(f"refused: {line}")
        if output.as_json:
            output.print_json(
                {
                    "pairs": result.num_pairs,
                    "refused": result.refused,
                    "out": out,
                    "contact_sheet": result.contact_sheet,
                }
            )
            return
    _print(
        f"{result.num_pairs} pairs in {out}, {len(result.refused)} photos refused. "
        f"Look at {result.contact_sheet}.",
        f"Next: nafnet prepare {out} --out STORE",
    )


@app.command(epilog="Example: nafnet prepare pairs --out store --crop 512 --stride 256")
def prepare(
    out: OutOption,
    source: Annotated[
        Path | None, typer.Argument(help="Folder with blur/ and sharp/, or GOPRO_Large.")
    ] = None,
    lq: Annotated[Path | None, typer.Option(help="Folder of blurred images, instead of SOURCE.")] = None,
    gt: Annotated[Path | None, typer.Option(help="Folder of sharp images, instead of SOURCE.")] = None,
    lq_name: Annotated[str, typer.Option(help="Name of the blurred file, {} being the sharp one's.")] = "{}",
    blur: Annotated[str, typer.Option(help="GoPro: blur or blur_gamma.")] = "blur",
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    holdout: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=0.9, help="Keep this share of the scenes for --split test, and out of train."
        ),
    ] = None,
    format: Annotated[str, typer.Option(help="parquet or lmdb.")] = "parquet",
    codec: Annotated[str, typer.Option(help="png or raw (lmdb only).")] = "png",
    crop: Annotated[
        int, typer.Option(min=0, help="Side of the crops; 0 keeps whole images, to evaluate.")
    ] = 512,
    stride: Annotated[int, typer.Option(min=1, help="Distance between crops.")] = 256,
    pairs_per_shard: Annotated[int, typer.Option(min=1)] = 32,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first bad pair.")] = False,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a paired data set into a store that trains fast. Goes on where it was interrupted."""
    from pipelines import prepare as stage
    from pipelines.sources import FolderPairs, find_source, hold_out

    for name, value, known in (("--format", format, ("parquet", "lmdb")), ("--codec", codec, ("png", "raw"))):
        if value not in known:
            raise InputError(f"unknown {name}", got=value, expected=" or ".join(known))
    if lq is not None and gt is not None:
        found = FolderPairs(lq_dir=lq, gt_dir=gt, lq_name=lq_name)
    elif source is not None:
        found = find_source(source, split=split, lq_name=lq_name, blur=blur)
    else:
        raise InputError("no source", fix="Give SOURCE, or both --lq and --gt")
    refs = found.pairs()
    if holdout is not None:
        refs = hold_out(refs, holdout, test=split == "test")
    settings = stage.PrepareConfig(
        out=out.absolute(),
        split=split,
        format=format,  # type: ignore[arg-type]
        codec=codec,  # type: ignore[arg-type]
        crop_px=crop or None,
        stride_px=stride,
        pairs_per_shard=pairs_per_shard,
        strict=strict,
    )
    with _output(as_json) as output:
        needs_ray = len(refs) > pairs_per_shard
        with _connected(needs_ray, address), console.progress("prepare", "shards") as update:
            result = stage.run(found, refs, settings, on_progress=update)
        manifest = result.manifest
        if output.as_json:
            output.print_json(manifest.model_dump())
            return
    _print(
        f"{manifest.num_pairs} pairs from {len(refs)} images in {len(manifest.shards)} shards, "
        f"{manifest.num_refused} refused; digest {manifest.digest[:12]}."
    )
    if result.refused:
        _print(f"Refused, with the reasons: {out / 'quarantine.jsonl'}. First: {result.refused[0]['reason']}")
    _print(f"Next: nafnet train --config mobile --data {out}")


@app.command(epilog="Example: nafnet train --config mobile --data store --val test-store --name mine")
def train(
    config: Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")],
    data: Annotated[list[Path] | None, typer.Option(help="Store to train on; repeatable.")] = None,
    val: Annotated[Path | None, typer.Option(help="Store of whole images to validate on.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; the same name goes on with it.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override, as optim.lr=5e-4; repeatable.")
    ] = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a network. Ctrl-C saves the state; the same command then goes on."""
    from pipelines.config import load_config, parse_config

    settings = load_config(config, [*(overrides or ()), *([f"name={name}"] if name else [])])
    content = settings.model_dump(mode="json")
    if data:
        content["data"]["train"] = [{"path": str(path.absolute())} for path in data]
    if val:
        content["data"]["val"] = str(val.absolute())
    settings = parse_config(content, file=config)
    with _output(as_json) as output:
        from pipelines import train as stage

        place = Workspace.find(workspace)
        stage.check(settings)
        console.log_to(place.make().run_dir(settings.name) / "logs" / "driver.log")
        with _train_progress() as on_row:
            result = stage.run(settings, place, address=address, on_row=on_row)
        if output.as_json:
            output.print_json(
                {
                    "run": result.run_dir,
                    "weights": result.weights,
                    "mlflow_run_id": result.mlflow_run_id,
                    "samples": result.samples,
                    "val_psnr_db": result.psnr_db,
                    "samples_per_s": result.samples_per_s,
                    "data_wait": result.data_wait,
                    "num_workers": result.num_workers,
                    "pictures": [str(picture) for picture in result.pictures],
                }
            )
            return
    score = "" if result.psnr_db is None else f", {result.psnr_db:.2f} dB on the validation store"
    _print(
        f"{result.samples} samples at {result.samples_per_s:.1f}/s{score}. Weights: {result.weights}",
        *(f"  {picture}" for picture in result.pictures),
        f"Next: nafnet evaluate {settings.name} TEST_STORE",
    )


@app.command(epilog="Example: nafnet evaluate mine test-store")
def evaluate(
    model: Annotated[str, typer.Argument(help="Weights file, run, or models:/NAME@ALIAS.")],
    data: Annotated[Path, typer.Argument(help="Store, or folder of blurred images.")],
    gt: Annotated[Path | None, typer.Argument(help="Folder of sharp images.")] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on pairs that it was not trained on: PSNR, SSIM, latency."""
    with _output(as_json) as output:
        from pipelines import evaluate as stage
        from pipelines.models import open_model

        place = Workspace.find(workspace)
        loaded = open_model(model, place)
        pairs = stage.Pairs(data, gt)
        with console.progress("evaluate", "images") as update:
            result = stage.run(loaded, pairs, place.make(), on_progress=update)
        if output.as_json:
            output.print_json(result.report.model_dump())
            return
    _score_table(f"{result.report.model} on {result.report.num_images} images", result.report)
    _print(f"Report: {result.path}", f"Picture: {result.picture}")


@app.command(epilog="Example: nafnet restore holiday --out restored")
def restore(
    inputs: Annotated[str, typer.Argument(metavar="INPUT", help="A photo, a folder or a glob.")],
    out: OutOption = Path("restored"),
    model: Annotated[
        str | None, typer.Option(help="Weights, run or models:/…  [default: the champion]")
    ] = None,
    tile: Annotated[int | None, typer.Option(min=64, help="Side of a tile, px. [default: by memory]")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    on_error: Annotated[str, typer.Option(help="skip or stop.")] = "skip",
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
    with _output(as_json) as output:
        from pipelines import restore as stage
        from pipelines.models import open_model

        stage.find_photos(inputs, out)
        loaded = open_model(model, Workspace.find(workspace))
        console.say(f"Model: {loaded.label}")
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
            _print(f"{summary}. In {out}, what was done in {out / stage.RECORD}")
    if counts["failed"]:
        raise typer.Exit(InputError.exit_code)


@registry_app.command("register", epilog="Example: nafnet registry register mine --on test-store")
def registry_register(
    model: Annotated[str, typer.Argument(help="Weights file or run.")],
    on: Annotated[Path | None, typer.Option(help="Store to score it on.")] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Store a model as a new version; it becomes the candidate."""
    with _output(as_json) as output:
        from pipelines import registry as stage

        with console.progress("evaluate", "images") as update:
            version = stage.register(model, Workspace.find(workspace), on=on, on_progress=update)
        if output.as_json:
            output.print_json(version.to_dict())
            return
    _print(f"Version {version.version} is the candidate.", "Next: nafnet registry promote --on TEST_STORE")


@registry_app.command("promote", epilog="Example: nafnet registry promote --on test-store")
def registry_promote(
    on: Annotated[Path, typer.Option(help="Store that both models are scored on.")],
    version: Annotated[int | None, typer.Argument(help="Version. [default: the candidate]")] = None,
    min_gain_db: Annotated[float, typer.Option(help="PSNR over the champion's, at least.")] = 0.05,
    max_ssim_drop: Annotated[float, typer.Option()] = 0.002,
    max_latency_ratio: Annotated[float, typer.Option()] = 1.2,
    reason: Annotated[str, typer.Option(help="For the history.")] = "",
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a version the champion, if it passes the gate."""
    with _output(as_json) as output:
        from pipelines import registry as stage
        from pipelines.gate import GateSettings

        settings = GateSettings(
            min_gain_db=min_gain_db, max_ssim_drop=max_ssim_drop, max_latency_ratio=max_latency_ratio
        )
        with console.progress("evaluate", "images") as update:
            moved = stage.promote(
                Workspace.find(workspace),
                version=version,
                on=on,
                settings=settings,
                reason=reason,
                on_progress=update,
            )
        if output.as_json:
            output.print_json(moved.to_dict())
            return
    rows = [[c.name, _number(c.champion), _number(c.candidate), c.limit, "yes"] for c in moved.checks]
    base = "blurred input" if moved.before is None else f"champion {moved.before}"
    console.table("The gate", ["", base, f"version {moved.version}", "limit", "passed"], rows)
    _print(f"Version {moved.version} is the champion: models:/nafnet-deblur@champion")


@registry_app.command("list", epilog="Example: nafnet registry list")
def registry_list(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Show the registered versions, newest first."""
    with _output(as_json) as output:
        from pipelines import registry as stage

        found: list[Version] = stage.versions(Workspace.find(workspace).make())
        if output.as_json:
            output.print_json([version.to_dict() for version in found])
            return
    rows = [
        [v.version, ", ".join(v.aliases), v.model, _number(v.psnr_db), _number(v.gain_db), v.created]
        for v in found
    ]
    console.table("nafnet-deblur", ["version", "alias", "model", "PSNR, dB", "gain, dB", "registered"], rows)


def main() -> None:
    """Entry point: run a command, and turn what it raises into one line and an exit code."""
    console.warn_on_stderr()
    try:
        code = app(standalone_mode=False)
    except NAFNetError as error:
        _fail(str(error), error.exit_code)
    except click.exceptions.Abort:
        _fail("stopped", 130)
    except click.ClickException as error:
        _fail(error.format_message(), InputError.exit_code)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        logging.getLogger("pipelines").debug("bug", exc_info=True)
        place = traceback.extract_tb(error.__traceback__)[-1]
        if os.environ.get("NAFNET_DEBUG"):
            raise
        _fail(
            f"this is a bug of ours: {type(error).__name__}: {error} ({place.filename}:{place.lineno}). "
            "Set NAFNET_DEBUG=1 to see all of it",
            1,
        )
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(line: str, code: int) -> None:
    console.say(f"nafnet: {line}")
    sys.exit(code)


def _print(*lines: str) -> None:
    for line in lines:
        typer.echo(line)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"


def _score_table(title: str, report: Report) -> None:
    rows = [
        [
            "PSNR, dB",
            f"{report.psnr_blurred_db:.2f}",
            f"{report.psnr_restored_db:.2f}",
            f"{report.gain_db:+.2f}",
        ]
    ]
    if report.ssim_blurred is not None and report.ssim_restored is not None:
        gain = report.ssim_restored - report.ssim_blurred
        rows.append(["SSIM", f"{report.ssim_blurred:.4f}", f"{report.ssim_restored:.4f}", f"{gain:+.4f}"])
    console.table(title, ["", "blurred input", "restored", "gain"], rows)
    _print(f"{report.latency_s:.2f} s an image, {report.peak_memory_mib:.0f} MiB at the peak")


@contextmanager
def _train_progress() -> Iterator[Any]:
    """A progress line fed by the journal: samples of the budget, speed, loss, learning rate, data-wait."""
    with console.progress("train", "samples") as update:
        total = 0

        def on_row(row: Row) -> None:
            nonlocal total
            total = int(row.metrics.get("total_samples", total))
            note = "".join(
                form.format(row.metrics[name])
                for name, form in (
                    ("train/samples_per_s", "{:.1f}/s"),
                    ("train/loss", " loss {:.4g}"),
                    ("train/lr", " lr {:.2g}"),
                    ("train/data_wait", " data-wait {:.1%}"),
                    ("val/psnr_db", "validation {:.2f} dB"),
                )
                if name in row.metrics
            )
            update(row.samples, total or row.samples, note)

        yield on_row


@contextmanager
def _connected(needed: bool, address: str | None) -> Iterator[None]:
    if not needed:
        yield
        return
    from cluster.connect import connect

    with connect(address):
        yield
