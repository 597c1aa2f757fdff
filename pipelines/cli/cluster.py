"""`nafnet cluster up` and `down` through Ray's launcher, and `manifest` for Kubernetes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nafnet_core.errors import CapabilityError, InputError
from pipelines import console
from pipelines.cli.parsing import checked_command
from pipelines.cli.shared import JsonOption, output_to, print_lines

if TYPE_CHECKING:
    from cluster.launch_file import Launch

app = typer.Typer(
    help="A Ray cluster: on machines of a cloud or your own, or on Kubernetes.",
    epilog="Example: nafnet cluster up, then nafnet cluster submit -- train --config gopro_width32",
    no_args_is_help=True,
)

_STORED = "checkpoint.storage"

FileArgument = Annotated[
    Path | None,
    typer.Argument(help="File of Ray's cluster launcher. [default: ./ray_cluster.yaml]", show_default=False),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command("up", epilog="Example: nafnet cluster up ray_cluster.yaml")
def cluster_up(file: FileArgument = None, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """Start a cluster by Ray's launcher (`ray up`), or bring it up to date: then its jobs end."""
    with output_to(as_json) as output:
        from cluster import launcher
        from cluster.launch_file import DEFAULT_FILE, check_ready, read

        launch = read(file or DEFAULT_FILE)
        check_ready(launch)
        _show(launch)
        if not yes and not _agreed(
            "Start it? If it runs already, Ray is started anew there, and its jobs end."
        ):
            return
        launcher.up(launch, on_line=console.say)
        if output.as_json:
            output.print_json(_described(launch))
            return
    joining = "join as jobs need them" if launch.provider != "local" else "join within a minute or two"
    print_lines(
        f"The head of {launch.name!r} is up; workers {joining}.",
        f"Next: ray dashboard {launch.file}      # in a terminal of its own; opens http://localhost:8265",
        "      nafnet cluster submit --follow -- cluster preflight",
        "      nafnet cluster submit -- train --config RECIPE",
        f"      nafnet cluster down {launch.file}",
    )


@app.command("down", epilog="Example: nafnet cluster down ray_cluster.yaml")
def cluster_down(file: FileArgument = None, yes: YesOption = False, as_json: JsonOption = False) -> None:
    """End a cluster's machines (`ray down`). What runs stored elsewhere stays."""
    with output_to(as_json) as output:
        from cluster import launcher
        from cluster.launch_file import DEFAULT_FILE, read

        launch = read(file or DEFAULT_FILE)
        if not yes and not _agreed(f"End all machines of {launch.name!r}? What lies on their disks is lost."):
            return
        launcher.down(launch, on_line=console.say)
        if output.as_json:
            output.print_json(_described(launch))
            return
    print_lines(
        f"{launch.name!r} is down."
        + (" Workers end a minute later, when they miss the head." if launch.provider == "local" else "")
    )


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise InputError("nobody is there to be asked", fix="Give --yes")
    return typer.confirm(question, err=True)


def _show(launch: Launch) -> None:
    rows = [
        [
            group.name,
            group.machine + (" (spot)" if group.is_spot else ""),
            str(group.least) if group.least == group.most else f"{group.least} to {group.most}",
        ]
        for group in launch.groups
    ]
    console.table(f"{launch.name}, {launch.provider}", ["", "machines", "how many"], rows)


def _described(launch: Launch) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "name": launch.name,
        "provider": launch.provider,
        "file": str(launch.file),
        "groups": [asdict(group) for group in launch.groups],
    }


@app.command(
    "manifest",
    epilog="Example: nafnet cluster manifest --config cluster.yaml --job -- train --config mobile "
    "--data s3://bucket/stores/train --name mine | kubectl apply -f -",
)
def cluster_manifest(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="-- COMMAND …", help="Of `nafnet`, for --job.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of the cluster. [default: the shipped example]")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override, as gpu.max_nodes=16; repeatable.")
    ] = None,
    job: Annotated[
        bool, typer.Option("--job", help="A RayJob: the command, and a cluster for it alone.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File to write. [default: stdout]")] = None,
) -> None:
    """Write KubeRay's manifest of a cluster (RayCluster), or of a command with its own cluster (RayJob)."""
    import yaml

    from cluster.kuberay import ray_cluster, ray_job
    from pipelines.config.cluster import load_cluster

    if job != bool(arguments):
        raise InputError(
            "--job and a command go together",
            expected="--job -- COMMAND …, or neither",
            got=f"the command {arguments[0]!r} alone" if arguments else "--job alone",
        )
    settings = load_cluster(config, overrides or ())
    if config is None:
        console.say(
            "The shipped example: image, storage and MLflow are made up; give your own with --config."
        )
    if settings.mlflow_uri is None and settings.storage.claim is None:
        console.say("No mlflow_uri: what MLflow records lies on the head, and ends with it.")
    if job:
        manifest = ray_job(settings, job_arguments(arguments or [], storage=settings.storage.url))
    else:
        manifest = ray_cluster(settings)
        if settings.gcs.backend == "rocksdb":
            console.say(
                "gcs.backend rocksdb: needs KubeRay 1.7, feature gate GCSFaultToleranceEmbeddedStorage."
            )
    text = yaml.safe_dump(manifest, sort_keys=False)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text)
    except OSError as error:
        raise CapabilityError("cannot write the manifest", file=out, got=error.strerror) from error
    console.say(f"Next: kubectl apply -f {out}")


def job_arguments(arguments: list[str], *, storage: str | None) -> list[str]:
    """The command as it is to run on a cluster: there, and with its state where the head is not.

    Raises:
        InputError: a recipe that is a file of this machine.
        Typer's own usage error: no such command, or bad options.
    """
    name, *rest = arguments
    options = checked_command(arguments)
    recipe = options.get("config")
    if isinstance(recipe, str) and Path(recipe).is_file():
        raise InputError(
            "this recipe is a file of this machine, which the job will not have",
            file=recipe,
            fix="Name a shipped recipe and put the rest into --set, or put the file into the image",
        )
    added = []
    if "address" in options and options["address"] is None:
        added += ["--address", "auto"]
    given = [override.partition("=")[0].strip() for override in options.get("overrides") or ()]
    if name in ("train", "tune") and storage is not None and _STORED not in given:
        added += ["--set", f"{_STORED}={storage}"]
    return [name, *rest, *added]
