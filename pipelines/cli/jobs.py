"""`nafnet cluster submit`, `status`, `logs` and `stop`: commands that a cluster runs."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.jobs import DEFAULT_ADDRESS, Jobs
from nafnet_core.errors import InputError
from pipelines import console
from pipelines.cli.parsing import checked_command
from pipelines.cli.shared import JsonOption, output_to, print_lines
from pipelines.urls import holds_credentials

if TYPE_CHECKING:
    from cluster.jobs import Job

DashboardOption = Annotated[
    str,
    typer.Option(
        "--address", help="The cluster's dashboard, http(s)://HOST:PORT.", envvar="RAY_API_SERVER_ADDRESS"
    ),
]
_TRACKING = "MLFLOW_TRACKING_URI"  # goes along: a job's records belong where those from here are
JobArgument = Annotated[str | None, typer.Argument(metavar="JOB", help="Its name. [default: the newest]")]
# Of our plain progress lines, `train: 1744/2400 samples …`.
_PROGRESS = re.compile(r"^\w[\w ]*: \d+/\d+\b.*$", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_SECRET = re.compile("KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.IGNORECASE)
_OF_RAY = re.compile(r"Running entrypoint for job |\d{4}-\d\d-\d\d [\d:,]+\tINFO ")
_LOST_S = 60.0

app = typer.Typer()


@app.command(
    "submit",
    context_settings={"ignore_unknown_options": True},
    epilog="Example: nafnet cluster submit -- train --config gopro_width64 --data s3://bucket/gopro "
    "--set checkpoint.storage=s3://bucket/runs",
)
def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND…", help="As it would be run here, without `nafnet`.")
    ],
    job: Annotated[str | None, typer.Option("--job", help="Name of the job. [default: made up]")] = None,
    workspace: Annotated[
        str | None,
        typer.Option(
            help="Workspace on the cluster. [default: NAFNET_WORKSPACE there, else in the head's home]"
        ),
    ] = None,
    send: Annotated[
        list[str] | None,
        typer.Option(
            "--env", metavar="NAME", help="Variable of this environment to send; no secret. Repeatable."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show what it prints; Ctrl-C leaves it running.")
    ] = False,
    address: DashboardOption = DEFAULT_ADDRESS,
    as_json: JsonOption = False,
) -> None:
    """Have the cluster run a command; it goes on when this terminal is closed.

    YAML files that the command names go along, and MLFLOW_TRACKING_URI. Other paths are those of the cluster;
    neither data nor credentials are sent.
    """
    arguments, files = _checked(command)
    environment = {variable: _public_value(variable) for variable in send or ()}
    if (server := os.environ.get(_TRACKING, "")).startswith("http"):
        if holds_credentials(server):
            console.say(f"nafnet: {_TRACKING} is not sent along, as it has a password in it")
        else:
            environment.setdefault(_TRACKING, server)
    if job is not None and not _NAME.fullmatch(job):
        raise InputError(
            "not a name for a job", got=repr(job), expected="letters, digits, dots, dashes and underscores"
        )
    with output_to(as_json) as output:
        name = job or f"{arguments[0]}-{datetime.now():%m%d-%H%M%S}"
        jobs = Jobs(address)
        sent = jobs.submit(arguments, name=name, files=files, workspace=workspace, environment=environment)
        if output.as_json:
            output.print_json({"job": sent.id, "address": address, "code_kib": round(sent.code_bytes / 1024)})
            return
        print_lines(f"Job {sent.id}: {sent.code_bytes / 1024:.0f} KiB of code and recipes sent.")
        if follow:
            sys.exit(_follow(jobs, jobs.find(sent.id)))
        print_lines(
            f"Look at it: nafnet cluster status {sent.id}",
            f"What it prints: nafnet cluster logs {sent.id} --follow",
            f"Save its state and end it: nafnet cluster stop {sent.id}",
        )


@app.command("status", epilog="Example: nafnet cluster status")
def status(
    job: JobArgument = None, address: DashboardOption = DEFAULT_ADDRESS, as_json: JsonOption = False
) -> None:
    """Show the cluster's jobs, or how far one is."""
    with output_to(as_json) as output:
        jobs = Jobs(address)
        shown = jobs.all() if job is None else [jobs.find(job)]
        # Of those that are over their status says enough, unless one is asked for.
        asked = [one for one in shown if job is not None or not one.is_over]
        lines = {one.id: last_line(jobs.log(one), is_over=one.is_over) for one in asked}
        if output.as_json:
            output.print_json([_as_json(one, lines.get(one.id)) for one in shown])
            return
        if not shown:
            print_lines("This cluster has no jobs.")
        elif job is None:
            rows = [[one.id, one.status, _duration(one), f"nafnet {one.command}"] for one in shown]
            console.table("Jobs", ["job", "status", "time", "command"], rows, values_left=True)
            print_lines(*(f"{name}: {line}" for name, line in lines.items() if line))
        else:
            one = shown[0]
            print_lines(f"{one.id}: {one.status}, {_duration(one)}; nafnet {one.command}")
            print_lines(*filter(None, [lines[one.id], one.message if one.status == "FAILED" else None]))


@app.command("logs", epilog="Example: nafnet cluster logs --follow")
def logs(
    job: JobArgument = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until its end.")] = False,
    address: DashboardOption = DEFAULT_ADDRESS,
) -> None:
    """Print what a job has printed. With --follow, end with 1 where it fails."""
    jobs = Jobs(address)
    found = jobs.find(job)
    if follow:
        sys.exit(_follow(jobs, found))
    typer.echo(jobs.log(found), nl=False)


@app.command("stop", epilog="Example: nafnet cluster stop train-1126-101500")
def stop(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Its name.")],
    wait: Annotated[bool, typer.Option("--wait", help="Return only when it has ended.")] = False,
    address: DashboardOption = DEFAULT_ADDRESS,
) -> None:
    """Have a job save its state and end; the same command then goes on from there."""
    jobs = Jobs(address)
    found = jobs.find(job)
    if found.is_over:
        raise InputError("this job has ended already", got=f"{found.id}: {found.status}")
    jobs.stop(found)
    while wait and not jobs.find(job).is_over:
        time.sleep(1)
    if wait:
        print_lines(
            f"{found.id}: {jobs.find(job).status}", *filter(None, [last_line(jobs.log(found), is_over=True)])
        )
    else:
        print_lines(f"{found.id} saves its state and ends: nafnet cluster status {found.id}")


def last_line(log: str, *, is_over: bool) -> str | None:
    """The line that tells how far a job is: its last progress line; how it ended, its last one."""
    progress = [] if is_over else _PROGRESS.findall(log)
    # Of Ray's own, which come first, none tells anything.
    lines = [line for line in log.splitlines() if line.strip() and not _OF_RAY.match(line)]
    found = progress or lines
    return found[-1] if found else None if is_over else "starting"


def _follow(jobs: Jobs, job: Job) -> int:
    """Print what a job prints until it ends; the exit code that tells how."""
    try:
        for piece in jobs.follow(job):
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        console.say(f"nafnet: no longer followed, {job.id} goes on: nafnet cluster logs {job.id} --follow")
        return 0
    # The last piece comes before Ray has entered the end.
    deadline = time.monotonic() + _LOST_S
    while not (now := jobs.find(job.id)).is_over and time.monotonic() < deadline:
        time.sleep(0.5)
    console.say(f"nafnet: {now.id}: {now.status}")
    return 0 if now.status == "SUCCEEDED" else 1


def _checked(command: Sequence[str]) -> tuple[list[str], dict[str, Path]]:
    """A command for the cluster, and the files that go along. Raises as `checked_command`."""
    words = list(command)[1:] if command[:1] == ["nafnet"] else list(command)
    checked_command(words)
    files: dict[str, Path] = {}
    for index, word in enumerate(words):
        path = Path(word)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            sent_as = f"{len(files)}-{path.name}" if path.name in files else path.name
            files[sent_as] = path
            words[index] = sent_as
        elif path.exists() and index and not path.is_absolute():
            words[index] = str(path.absolute())
    return words, files


def _public_value(variable: str) -> str:
    """A variable's value, if every user of the cluster may read it. Raises `InputError`."""
    value = os.environ.get(variable)
    if value is None:
        raise InputError("this variable is not set here", got=f"--env {variable}")
    if _SECRET.search(variable) or holds_credentials(value):
        raise InputError(
            "Ray writes what it is sent into its logs, so secrets are not",
            got=f"--env {variable}",
            fix="Set it on the nodes, or give them a role; `nafnet cluster preflight` tells who lacks it",
        )
    return value


def _as_json(job: Job, line: str | None) -> dict[str, Any]:
    return {
        "job": job.id,
        "status": job.status,
        "command": job.command,
        "started_ms": job.started_ms,
        "ended_ms": job.ended_ms,
        "line": line,
        "message": job.message,
    }


def _duration(job: Job) -> str | None:
    if job.started_ms is None:
        return None
    ended_s = job.ended_ms / 1000 if job.ended_ms else time.time()
    seconds = max(0, round(ended_s - job.started_ms / 1000))
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
