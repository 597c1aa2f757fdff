"""`nafnet inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nafnet_core.errors import InputError
from pipelines import console
from pipelines.cli.shared import JsonOption, WorkspaceOption, number, output_to, print_lines
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.inspect import InspectResult

app = typer.Typer()

_QUANTITIES = {
    "width_px": "width, px",
    "height_px": "height, px",
    "sharpness_blurred": "sharpness, blurred",
    "sharpness_sharp": "sharpness, sharp",
    "psnr_db": "PSNR of blurred, dB",
}
_RECIPE = (
    "model", "data", "budget", "stages", "optim", "schedule", "loss", "precision", "scaling", "validation",
    "seed",
)  # fmt: skip


@app.command(epilog="Example: nafnet inspect store --out pictures")
def inspect(
    what: Annotated[
        str,
        typer.Argument(
            metavar="STORE|MODEL|RUN",
            help="Store, weights, run, models:/NAME@ALIAS; or pairs that are not prepared yet.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the pictures. [default: WORKSPACE/inspect/NAME]")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Hash the files anew, and compare.")] = True,
    deep: Annotated[bool, typer.Option("--deep", help="Decode every pair of a store as well.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Pairs that statistics are taken on, at most.")] = 512,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look at a store, model, run or source: what it holds, checksums, pictures."""
    with output_to(as_json) as output:
        from pipelines import inspect as stage

        config = stage.InspectConfig(
            what=what,
            workspace=Workspace.find(workspace),
            out=out,
            verify=verify,
            deep=deep,
            num_samples=samples,
        )
        result = stage.run(config, show=console.progress)
        for line in result.problems:
            console.say(f"damaged: {line}")
        if output.as_json:
            output.print_json(result.to_dict())
        else:
            _print(result)
    if result.problems:
        raise typer.Exit(InputError.exit_code)


def _print(result: InspectResult) -> None:
    facts = dict(result.facts)
    metadata = dict(facts.pop("metadata", None) or {})
    recipe = facts.pop("recipe", None) or metadata.pop("recipe", None) or {}
    facts |= metadata
    title = f"{result.kind.capitalize()} {result.name}"
    console.table(title, ["", ""], [[_name(key), _shown(key, value)] for key, value in facts.items()])
    if recipe:
        rows = [[key, _shown(key, recipe[key])] for key in _RECIPE if key in recipe]
        console.table("Recipe", ["", ""], rows)
    if result.checkpoints:
        columns = ["checkpoint", "samples", "PSNR, dB", "digests"]
        states = {True: "match", False: "damaged", None: "not verified"}
        rows = [
            [c["folder"], c["samples"], number(c["psnr_db"]), states[c["whole"]]] for c in result.checkpoints
        ]
        console.table("Checkpoints", columns, rows)
    if result.statistics is not None:
        _print_statistics(result.statistics)
    if result.verification is not None:
        _print_verification(result.verification)
    print_lines(*result.notes, *(f"Picture: {picture}" for picture in result.pictures))


def _print_statistics(statistics: Mapping[str, Any]) -> None:
    rows = []
    for key, label in _QUANTITIES.items():
        if (values := statistics[key]) is not None:
            rows.append([label, *(number(values[name]) for name in ("median", "p5", "p95"))])
    sampled, unreadable = statistics["num_sampled"], statistics["num_unreadable"]
    title = f"{sampled} pairs sampled" + (f", {unreadable} unreadable" if unreadable else "")
    if rows:
        console.table(title, ["", "median", "5 %", "95 %"], rows)
        print_lines("Sharpness is the variance of the Laplacian, in squared 8-bit levels.")


def _print_verification(verification: Mapping[str, Any]) -> None:
    size = f"{verification['hashed_bytes'] / 2**20:.1f} MiB"
    if not verification["ok"]:
        print_lines(f"Verified: damage was found; {size} match their SHA-256.")
    elif verification["digest_of_pixels"]:
        print_lines(f"Verified: {size} match their SHA-256, and all pixels the digest.")
    else:
        print_lines(f"Verified: {size} match their SHA-256. --deep decodes every pair as well.")


def _name(key: str) -> str:
    return {"bytes": "size", "sha256": "SHA-256", "gmacs_1280x720": "GMACs at 1280×720"}.get(
        key, key.replace("_px", ", px").replace("_", " ")
    )


def _shown(key: str, value: Any) -> str | None:
    if key == "bytes":
        return f"{value / 2**20:.1f} MiB"
    if key in ("digest", "sha256") and isinstance(value, str):
        return f"{value[:16]}…"  # --json has it whole
    if key in ("digest", "sha256") and isinstance(value, Mapping):  # of several files
        return ", ".join(f"{name} {_shown(key, part)}" for name, part in value.items())
    if key == "int8_layers" and value:
        return f"{len(value)} convolutions"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    if isinstance(value, Mapping):
        parts = [f"{name} {_shown('', part)}" for name, part in value.items() if part is not None]
        return ", ".join(parts) or None
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_shown("", part)) for part in value) or None
    return None if value is None else str(value)
