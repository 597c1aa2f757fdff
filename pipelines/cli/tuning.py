"""`nafnet tune`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines import console
from pipelines.cli.shared import AddressOption, JsonOption, WorkspaceOption, output_to, print_lines
from pipelines.cli.training import train_progress
from pipelines.counting import counted
from pipelines.urls import public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.tracking import Row
    from pipelines.tune import Progress, TuneResult
    from pipelines.tune.ledger import Trial

app = typer.Typer()

_SHOWN_TRIALS = 12


@app.command(epilog="Example: nafnet tune --config search_mobile --data store --val test-store --name first")
def tune(
    config: Annotated[str, typer.Option(help="A shipped recipe of a search, or a YAML file.")],
    data: Annotated[list[str] | None, typer.Option(help="Store to train on, or its URL; repeatable.")] = None,
    val: Annotated[str | None, typer.Option(help="Store of whole images to compare trials on.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the search; the same goes on with it.")] = None,
    init: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Weights that every trial begins with."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override, as search.trials=32; repeatable.")
    ] = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search for the best recipe. Ctrl-C saves the state; the same command then goes on."""
    from pipelines.config import load_search
    from pipelines.store import read_manifest

    settings = load_search(config, overrides or (), name=name, train=data or (), val=val, init=init)
    # Before torch and Ray are imported, which takes seconds.
    for store in (*(store.path for store in settings.data.train), settings.data.val):
        if store is not None:
            read_manifest(store)
    with output_to(as_json) as output:
        from pipelines import tune as stage

        place = Workspace.find(workspace)
        console.log_to(place.make().run_dir(settings.name) / "logs" / "driver.log")
        with closing(_Shown(settings.name)) as shown:
            result = stage.run(
                settings,
                place,
                address=address,
                on_progress=shown.on_progress,
                on_row=shown.on_row,
                on_scored=shown.on_scored,
            )
        if output.as_json:
            output.print_json(_as_json(result))
            return
        _print_result(place, result)


class _Shown:
    """What a person sees of a search: its table, then a bar of the last training, then one of scoring."""

    def __init__(self, name: str) -> None:
        self._stack, self._phase = ExitStack(), ""
        self._name, self._update = name, None
        self._enter("trials", lambda: _live_table(name))

    def on_progress(self, progress: Progress) -> None:
        self._enter("trials", lambda: _live_table(self._name))(progress)

    def on_row(self, row: Row) -> None:
        self._enter("train", train_progress)(row)

    def on_scored(self, done: int, total: int) -> None:
        self._enter("evaluate", lambda: console.progress("evaluate", "images"))(done, total)

    def close(self) -> None:
        self._stack.close()

    def _enter(self, phase: str, manager: Callable[[], AbstractContextManager[Any]]) -> Any:
        """What draws this phase; the one before is ended."""
        if phase != self._phase:
            self._stack.close()
            self._update, self._phase = self._stack.enter_context(manager()), phase
        return self._update


@contextmanager
def _live_table(name: str) -> Iterator[Any]:
    """A table that is drawn anew on a terminal; elsewhere a line for each new score and each end."""
    told: dict[int, tuple[int, str]] = {}

    def tell(progress: Progress) -> None:
        for trial in progress.trials:
            now = len(trial.scores), trial.state
            if told.get(trial.number, (0, "running")) != now:
                told[trial.number] = now
                console.say(f"tune: {_line(trial)}")

    with console.live() as draw:
        if draw is None:
            yield tell
            return
        draw(_table(name, None))

        def update(progress: Progress) -> None:
            draw(_table(name, progress))

        yield update


def _line(trial: Trial) -> str:
    from pipelines.tune.space import short

    values = " ".join(f"{key}={value}" for key, value in short(trial.point).items())
    score = f"{trial.scores[-1].psnr_db:.2f} dB at {trial.samples} samples" if trial.scores else "no score"
    error = f": {trial.error}" if trial.error else ""
    return f"trial {trial.number} {trial.state}{error}, {score}, {values}"


def _table(name: str, progress: Progress | None) -> Any:
    """The trials that run, and the best of the others; None before there are any."""
    from pipelines.tune.space import short

    trials = () if progress is None else progress.trials
    running = [trial for trial in trials if trial.outcome is None]
    others = sorted((t for t in trials if t.outcome is not None), key=lambda t: -(t.psnr_db or 0.0))
    shown = [*running, *others][:_SHOWN_TRIALS]
    ended = sum(trial.outcome in ("finished", "stopped") for trial in trials)
    names = list(dict.fromkeys(key for trial in trials for key in short(trial.point)))
    title = (
        f"{name}: starting"
        if progress is None
        else f"{name}: {ended} of {progress.num_wanted} trials, {progress.samples:,} samples"
    )
    hidden = len(trials) - len(shown)
    return console.grid(
        title,
        ["trial", *names, "rung", "PSNR, dB", "state"],
        [
            [
                trial.number,
                *(short(trial.point).get(key) for key in names),
                f"{len(trial.scores)} of {progress.num_rungs if progress else 0}",
                None if trial.psnr_db is None else f"{trial.psnr_db:.2f}",
                trial.state,
            ]
            for trial in shown
        ],
        caption=f"and {counted(hidden, 'trial')} more" if hidden else None,
    )


def _print_result(place: Workspace, result: TuneResult) -> None:
    from pipelines.tracking import tracking_uri
    from pipelines.tune.space import short

    samples = result.progress.samples
    console.show(_table(result.search_dir.name, result.progress))
    values = ", ".join(f"{key} {value}" for key, value in short(result.best.point).items())
    share = samples / result.full_samples if result.full_samples else 1.0
    lines = [
        f"The best is trial {result.best.number}: {values}.",
        f"Its run is {result.winner.run}, {result.winner.psnr_db:.2f} dB on the search's validation images.",
        f"Its weights: {result.winner.weights}",
        f"{samples:,} samples in all, {share:.0%} of the {result.full_samples:,} that all of them at "
        "full length would have taken.",
        f"The recipe, to be trained for longer: nafnet train --config {result.recipe} --name NAME "
        "--set budget.samples=NUMBER",
        *(f"Picture: {picture}" for picture in result.pictures),
    ]
    uri = public(tracking_uri(place))
    lines.append(
        f"Look at it: {f'mlflow ui --backend-store-uri {uri}' if uri.startswith('sqlite:') else uri}"
    )
    if result.version is not None:
        version = result.version
        lines.append(f"Version {version.version} is the candidate now.")
        if version.psnr_db is not None and version.gain_db is not None:
            lines.append(
                f"On all of that store: {version.psnr_db:.2f} dB, {version.gain_db:+.2f} against the "
                f"blurred input.{' That is no gain yet: train longer.' if version.gain_db <= 0 else ''}"
            )
        lines.append("Next: nafnet registry promote --on TEST_STORE")
    print_lines(*lines)


def _as_json(result: TuneResult) -> dict[str, Any]:
    return {
        "search": result.search_dir,
        "mlflow_run_id": result.mlflow_run_id,
        "best": result.best.number,
        "point": dict(result.best.point),
        "run": result.winner.run,
        "weights": result.winner.weights,
        "val_psnr_db": result.winner.psnr_db,
        "recipe": result.recipe,
        "samples": result.progress.samples,
        "full_samples": result.full_samples,
        "pictures": [str(picture) for picture in result.pictures],
        "version": None if result.version is None else result.version.version,
        "trials": [
            {
                "number": trial.number,
                "point": dict(trial.point),
                "psnr_db": trial.psnr_db,
                "samples": trial.samples,
                "state": trial.state,
                "error": trial.error,
            }
            for trial in result.progress.trials
        ],
    }
