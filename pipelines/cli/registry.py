"""`nafnet registry …`: what there is. What changes the champion is in `moving.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipelines import console
from pipelines.cli import moving
from pipelines.cli.shared import (
    JsonOption,
    TrainPatchOption,
    WorkspaceOption,
    number,
    output_to,
    print_lines,
)
from pipelines.counting import counted
from pipelines.urls import public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.registry import Comparison, Move, Shown

_MIB = 2**20
_WORST = 5  # images of a comparison that are named

app = typer.Typer(
    help="The model registry: versions, candidate, champion, and the history of both.",
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


@app.command("list", epilog="Example: nafnet registry list")
def registry_list(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """Show the registered versions, newest first."""
    with output_to(as_json) as output:
        from pipelines import registry as stage

        place = Workspace.find(workspace).make()
        stage.history(place)
        found = stage.versions(place)
        if output.as_json:
            output.print_json([version.to_dict() for version in found])
            return
    rows = [
        [
            v.version,
            ", ".join(v.aliases),
            v.model,
            number(v.psnr_db),
            None if v.gain_db is None else f"{v.gain_db:+.2f}",
            v.data and v.data.rstrip("/").rpartition("/")[2],
            _minute(v.created),
        ]
        for v in found
    ]
    columns = ["", "alias", "model", "PSNR", "gain", "data", "UTC"]
    console.table(
        "Versions of nafnet-deblur; dB, gain over the blurred input", columns, rows, values_left=True
    )
    if not found:
        print_lines("Nothing is registered yet: nafnet registry register MODEL")


@app.command("show", epilog="Example: nafnet registry show champion")
def registry_show(
    version: Annotated[str, typer.Argument(help="Number of a version, or candidate or champion.")],
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one version: its card, scores, files and history."""
    with output_to(as_json) as output:
        from pipelines import registry as stage

        shown = stage.show(version, Workspace.find(workspace).make())
        if output.as_json:
            output.print_json(shown.to_dict())
            return
    _print_card(shown)
    _print_moves(f"Moves of version {shown.version.version}", shown.moves)


@app.command("history", epilog="Example: nafnet registry history --json")
def registry_history(
    limit: Annotated[int, typer.Option(min=1, help="Moves to show, the newest.")] = 30,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show who moved the champion, when and why, newest first; --json with both reports and the gate."""
    with output_to(as_json) as output:
        from pipelines import registry as stage

        place = Workspace.find(workspace).make()
        moves = stage.history(place)
        if output.as_json:
            output.print_json(stage.records(moves[:limit], place))
            return
        before = stage.previous(moves)
    _print_moves("History of nafnet-deblur's champion", moves[:limit])
    if len(moves) > limit:
        print_lines(f"{counted(len(moves) - limit, 'older move')} not shown: --limit {len(moves)}")
    if before is not None:
        print_lines(f"`nafnet registry rollback` would come to version {before}.")


@app.command("compare", epilog="Example: nafnet registry compare champion candidate test-store")
def registry_compare(
    first: Annotated[str, typer.Argument(metavar="A", help="Version, alias, weights file or run.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The same; it is compared with A.")],
    store: Annotated[
        str | None,
        typer.Argument(help="Store to score both on. [default: the reports that lie with them]"),
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show two models side by side on the same data: scores, time, and which images get worse."""
    with output_to(as_json) as output:
        from pipelines import registry as stage

        with console.progress("evaluate", "images") as update:
            compared = stage.compare(
                first, second, Workspace.find(workspace).make(), on=store, on_progress=update
            )
        if output.as_json:
            output.print_json(compared.to_dict())
            return
    _print_comparison(first, second, compared)


app.registered_commands += moving.app.registered_commands


def _print_card(shown: Shown) -> None:
    version, card = shown.version, shown.card
    training = card.get("training", {})
    score = (
        None
        if version.psnr_db is None
        else f"{version.psnr_db:.2f} dB, {version.gain_db:+.2f} on {version.data}"
    )
    size = sum(size for _, size in shown.files) / _MIB
    rows = [
        ["alias", ", ".join(version.aliases)],
        ["registered", f"{_minute(version.created)} UTC"],
        ["model", version.model],
        ["parameters", f"{card['num_parameters']:,}" if card else None],
        ["weights", f"SHA-256 {card['weights_digest'][:16]}…" if card else None],
        ["score", score],
        ["training patch", f"{training['train_patch_px']} px" if training.get("train_patch_px") else None],
        [
            "trained on",
            "\n".join(f"{d['place']} (licence: {d['licence']})" for d in card.get("data", ())) or None,
        ],
        ["files", f"{len(shown.files)}, {size:.1f} MiB in {shown.folder}"],
        [
            "exports",
            "\n".join(
                f"{each['format']}, {each['precision']}: loses {each['loss_db']:.4f} dB"
                for each in shown.exports.values()
            )
            or None,
        ],
    ]
    console.table(f"nafnet-deblur version {version.version}", ["", ""], rows, values_left=True)
    print_lines(f"Card: {shown.folder / 'artifacts' / 'MODEL_CARD.md'}")


def _print_moves(title: str, moves: list[Move] | tuple[Move, ...]) -> None:
    rows = []
    for move in moves:
        told = move.told() if move.state == "done" else f"{move.told()}, {move.state}"
        why = "; ".join(text for text in (move.reason, move.note) if text)
        gain = None if move.gain_db is None else f"{move.gain_db:+.2f}"
        rows.append([move.number, _minute(move.time), move.user, told, gain, why])
    console.table(title, ["", "UTC", "user", "move", "gain, dB", "why"], rows, values_left=True)


def _print_comparison(first: str, second: str, compared: Comparison) -> None:
    a, b = compared.first, compared.second
    rows = [
        ["PSNR, dB", f"{a.psnr_restored_db:.2f}", f"{b.psnr_restored_db:.2f}", f"{compared.gain_db:+.2f}"]
    ]
    if a.ssim_restored is not None and b.ssim_restored is not None:
        gain = b.ssim_restored - a.ssim_restored
        rows.append(["SSIM", f"{a.ssim_restored:.4f}", f"{b.ssim_restored:.4f}", f"{gain:+.4f}"])
    if compared.latency_ratio is not None:
        rows.append(["time, ×", "1", f"{compared.latency_ratio:.2f}", f"{compared.latency_ratio - 1:+.0%}"])
    title = f"{counted(a.num_images, 'image')} of {a.data}"
    console.table(title, ["", f"A: {first}", f"B: {second}", "B over A"], rows)
    better, worse = compared.count(), compared.count(worse_by_db=0)
    print_lines(f"B is better on {better} of {a.num_images}, worse on {worse}, by more than 0.5 dB on "
                f"{compared.count(worse_by_db=0.5)}.")  # fmt: skip
    scores = [{image.key: image.psnr_restored_db for image in report.images} for report in (a, b)]
    worst = [name for name in list(compared.gains_db)[:_WORST] if compared.gains_db[name] < 0]
    if worst:
        rows = [
            [name, f"{scores[0][name]:.2f}", f"{scores[1][name]:.2f}", f"{compared.gains_db[name]:+.2f}"]
            for name in worst
        ]
        console.table("Where B loses most, dB", ["image", "A", "B", "B over A"], rows)


def _minute(iso: str) -> str:
    return iso[:16].replace("T", " ")
