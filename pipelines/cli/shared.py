"""What the commands share: options, output as a table or as JSON."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nafnet_core.errors import InputError, StoppedError
from pipelines import console
from pipelines.urls import is_url, public

if TYPE_CHECKING:
    from pipelines.evaluate import Report


def on_a_disk(text: str) -> Path:
    """A path of an option; as one, a URL would become a folder `s3:`."""
    if is_url(text):
        raise InputError(
            "this must be on a disk", file=public(text), fix="Name a folder, and copy it afterwards"
        )
    return Path(text)


WorkspaceOption = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        help="Where runs and the MLflow data base live.",
        envvar="NAFNET_WORKSPACE",
        parser=on_a_disk,
        metavar="PATH",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ray cluster: auto or ray://HOST:PORT. [default: this machine]",
        # As Ray's own programs take it; it is set where the cluster runs a command as a job.
        envvar="RAY_ADDRESS",
    ),
]
TrainPatchOption = Annotated[
    int | None,
    typer.Option(
        "--train-patch",
        min=0,
        help="Patch side in training, px, for local statistics; 0: none. [default: the file's]",
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="torch, onnxruntime or openvino, of what `nafnet export --keep` kept; auto: the fastest here. "
        "[default: torch; an exported file's own]",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to write.", parser=on_a_disk, metavar="PATH")]


@dataclass
class Output:
    """Where results go: a table for people, or one JSON object."""

    as_json: bool
    stdout: Any

    def print_json(self, content: Any) -> None:
        print(json.dumps(content, indent=1, default=str), file=self.stdout)  # noqa: T201


@contextmanager
def output_to(as_json: bool) -> Iterator[Output]:
    """Libraries print what they like: with --json, stdout is kept for the one object."""
    stdout = sys.stdout
    if as_json:
        sys.stdout = sys.stderr
    try:
        yield Output(as_json, stdout)
    finally:
        sys.stdout = stdout


@contextmanager
def stoppable(outcome: str, *, fix: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command in one line. To be entered after `ray.init`, which sets others."""

    def stop(number: int, frame: object) -> None:
        raise StoppedError(f"stopped; {outcome}", exit_code=128 + number, fix=fix)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_lines(*lines: str) -> None:
    for line in lines:
        typer.echo(line)


def number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"


def score_table(title: str, report: Report) -> None:
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
    print_lines(f"{report.latency_s:.2f} s an image, {report.peak_memory_mib:.0f} MiB at the peak")
