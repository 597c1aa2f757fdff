"""`nafnet evaluate`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nafnet_core.errors import CapabilityError, InputError
from pipelines import console
from pipelines.cli.shared import (
    AddressOption,
    BackendOption,
    JsonOption,
    TrainPatchOption,
    WorkspaceOption,
    on_a_disk,
    output_to,
    print_lines,
    stoppable,
)
from pipelines.counting import counted
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from pipelines.evaluate import CompareResult, EvaluateResult
    from pipelines.models import LoadedModel

app = typer.Typer()

_SHOWN_SCENES = 5
_MOST_WORDS, _MOST_PLACES = 4, 2  # MODEL_A MODEL_B BLURRED SHARP; BLURRED SHARP
_LONG_S = 60.0


@dataclass(frozen=True)
class _Asked:
    """What the words after `evaluate` mean."""

    models: tuple[str | None, ...]
    """One, or A and B; None is the workspace's champion, else the bundled one."""
    data: str
    gt: str | None


@app.command(
    epilog="Examples: nafnet evaluate mine test-store; nafnet evaluate mine blurred sharp --workers 8; "
    "nafnet evaluate mine other test-store"
)
def evaluate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL [MODEL_B]] DATA [GT]",
            help="MODEL: weights or exported file, run, models:/NAME@ALIAS or mobile-v1; left out, the "
            "champion, else mobile-v1. DATA: store, folder of pairs, or "
            "folder of blurred images with GT, that of the sharp ones; or their URLs. MODEL_B: held against "
            "MODEL, with an interval of the difference; what is models:/…, ends as a weights file, or is a "
            "run's folder or its name in the workspace, is one.",
        ),
    ],
    perceptual: Annotated[
        bool,
        typer.Option(
            "--perceptual", help="Distance of features too: LPIPS-like, not LPIPS; a second a megapixel."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Score on so many Ray workers at once, a core each; the scores are the same. [default: "
            "none, or with --address one for each of the cluster's cores]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder for a copy of the report; an earlier report there is replaced.",
            parser=on_a_disk,
            metavar="PATH",
        ),
    ] = None,
    backend: BackendOption = None,
    precision: Annotated[
        str | None, typer.Option(help="Of a kept export. [default: fp32; an exported file's own]")
    ] = None,
    train_patch: TrainPatchOption = None,
    workspace: WorkspaceOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on pairs that it was not trained on, or two models side by side.

    PSNR, SSIM, sharpness, the distribution, by scene and by strength of the blur; latency and memory. The
    report is a folder: report.json, report.md, report.html, images.csv, pictures.
    """
    with output_to(as_json) as output:
        from pipelines import evaluate as stage
        from pipelines.export.running import open_runnable
        from pipelines.models import is_exported

        place = Workspace.find(workspace)
        asked = _asked(words, place)
        judge = stage.installed_judge() if perceptual else None
        loaded = [
            open_runnable(
                spec,
                place,
                backend=backend,
                precision=precision or ("auto" if is_exported(spec) else "fp32"),
                train_patch_px=train_patch,
                num_threads=1,
            )
            for spec in asked.models
        ]
        for each in loaded:
            if workers or address:
                each.check_travels()
            if each.backend == "torch" and precision not in (None, "auto", "fp32"):
                raise InputError("scores in torch are of fp32", got=f"--precision {precision}")
        if asked.models == (None,) or backend is not None:
            for each in loaded:
                console.say(f"Model: {each.label}")
        pairs = stage.Pairs(asked.data, asked.gt)
        start = time.monotonic()
        with (
            _workers(workers, address, len(pairs)) as num_workers,
            stoppable("nothing is written", fix="The same command begins anew"),
            console.progress("evaluate", "images") as update,
        ):
            given = (*loaded, pairs, place.make())
            on_progress, on_drawing = _told_in_turn(update)
            options = {"on_progress": on_progress, "on_drawing": on_drawing, "judge": judge}
            options |= {"num_workers": num_workers, "out": out}
            if len(loaded) == 2:
                compared = stage.compare(*given, **options)  # type: ignore[arg-type]
            else:
                scored = stage.run(*given, **options)  # type: ignore[arg-type]
        if output.as_json:
            content = compared.comparison if len(loaded) == 2 else scored.report
            output.print_json(content.model_dump())
            return
    if len(loaded) == 2:
        _tell_comparison(compared)
        folder = compared.path.parent
    else:
        _tell_report(scored, is_slow=num_workers is None and time.monotonic() - start > _LONG_S)
        folder = scored.path.parent
    stem = "comparison" if len(loaded) == 2 else "report"
    shown = folder if out is None else out
    print_lines(f"Report: {shown / f'{stem}.html'} (also .md, .json, images.csv)")
    if len(loaded) == 1:
        print_lines(f"Picture: {shown / scored.picture.name}")
        spec = asked.models[0]
        is_registered = spec is None or spec.startswith("models:/")
        if asked.gt is None and not is_registered and loaded[0].backend == "torch":
            print_lines(*_next(loaded[0], place, spec, pairs.label, train_patch))


def _asked(words: list[str], workspace: Workspace) -> _Asked:
    """[MODEL [MODEL_B]] DATA [GT]: what the first two words are, decides."""
    from pipelines.models import is_model
    from pipelines.store import is_store
    from pipelines.urls import is_url

    if len(words) <= _MOST_PLACES and not is_model(words[0], workspace):
        is_place = is_url(words[0]) or Path(words[0]).exists()
        if len(words) == 1 or (is_place and not is_store(words[1]) and not is_model(words[1], workspace)):
            return _Asked((None,), words[0], words[1] if len(words) > 1 else None)
    if not 2 <= len(words) <= _MOST_WORDS:
        raise InputError(
            "a model and what to score it on",
            expected="[MODEL [MODEL_B]] DATA, or the same with BLURRED SHARP for DATA",
            got=" ".join(words),
        )
    first, second, *rest = words
    if is_model(second, workspace):
        if not rest:
            raise InputError(
                "two models, and nothing to score them on",
                got=f"{first} and {second}",
                fix="nafnet evaluate MODEL_A MODEL_B DATA",
            )
        return _Asked((first, second), rest[0], rest[1] if len(rest) > 1 else None)
    if len(rest) > 1:
        raise InputError(
            "four places, and the second is no model",
            got=second,
            expected="MODEL_A MODEL_B BLURRED SHARP",
            fix="A run by its name or folder, a weights file, or models:/NAME@ALIAS",
        )
    if rest and not is_url(second) and not Path(second).exists():
        raise InputError(
            "neither a second model nor a folder of blurred images",
            file=second,
            expected="a run, a weights file, models:/NAME@ALIAS, or a folder",
            fix="`nafnet registry list` shows what is registered",
        )
    return _Asked((first,), second, rest[0] if rest else None)


def _told_in_turn(
    update: Callable[..., None],
) -> tuple[Callable[[int, int], None], Callable[[int, int], None]]:
    """On one line: images that are scored, and beside them how far their pictures are."""
    scored = (0, 0)

    def on_progress(done: int, total: int) -> None:
        nonlocal scored
        scored = (done, total)
        update(done, total)

    def on_drawing(done: int, total: int) -> None:
        update(*scored, f"drawing {done}/{total}" if done < total else "writing the report")

    return on_progress, on_drawing


def _next(
    loaded: LoadedModel, workspace: Workspace, spec: str, data: str, train_patch: int | None
) -> list[str]:
    """What makes sense after a report: to register the model, or what follows where that is done."""
    from pipelines import registry

    try:
        found = registry.version_of(loaded, workspace)
    except CapabilityError:  # the report is there; who registers will be told
        found = None
    if found is None:
        patch = "" if train_patch is None else f" --train-patch {train_patch}"
        return [f"Next: nafnet registry register {spec} --on {data}{patch}"]
    is_champion = "champion" in found.aliases
    number = "" if "candidate" in found.aliases else f" {found.version}"
    return [
        f"This is version {found.version} of the registry{', the champion' if is_champion else ''}.",
        "Next: nafnet restore PHOTO_OR_FOLDER"
        if is_champion
        else f"Next: nafnet registry promote{number} --on {data}",
    ]


@contextmanager
def _workers(wanted: int | None, address: str | None, num_pairs: int) -> Iterator[int | None]:
    """Connect to Ray where it is wanted; yields the number of workers, None for this process alone."""
    if wanted is None and address is None:
        yield None
        return
    from cluster.connect import connect

    with connect(address):
        import ray

        yield min(wanted or max(1, int(ray.cluster_resources().get("CPU", 1))), num_pairs)


def _tell_report(result: EvaluateResult, *, is_slow: bool) -> None:
    from pipelines.evaluate.pages import distribution_table, score_table, time_told

    report = result.report
    title = f"{report.model} on {counted(report.num_images, 'image')}"
    scores, spread = score_table(report), distribution_table(report.distributions)
    console.table(title, scores.columns, scores.rows)
    console.table(spread.caption, spread.columns, spread.rows)
    if len(report.by_blur) > 1:
        rows = [
            [
                g.name,
                g.num_images,
                f"{g.psnr_blurred_db:.2f}",
                f"{g.psnr_restored_db:.2f}",
                f"{g.gain_db:+.2f}",
            ]
            for g in report.by_blur
        ]
        console.table(
            "By strength of the blur", ["", "images", "blurred, dB", "restored, dB", "gain, dB"], rows
        )
    if 1 < len(report.by_scene) < report.num_images:
        worst = sorted(report.by_scene, key=lambda group: group.gain_db)[:_SHOWN_SCENES]
        rows = [[group.name, group.num_images, f"{group.gain_db:+.2f}"] for group in worst]
        title = f"{len(worst)} of {len(report.by_scene)} scenes, the lowest gain first"
        console.table(title, ["", "images", "gain, dB"], rows)
    statistics = "off" if report.train_patch_px is None else f"on, patch {report.train_patch_px} px"
    print_lines(time_told(report), f"Local statistics: {statistics}")
    if is_slow and len(os.sched_getaffinity(0)) > 1:
        print_lines("With --workers N, on N cores, it takes an N-th of the time; the scores are the same.")


def _tell_comparison(result: CompareResult) -> None:
    from pipelines.evaluate.comparison_page import group_rows, notes, score_table, verdict

    compared = result.comparison
    scores = score_table(compared)
    title = f"{counted(len(compared.images), 'image')} of {compared.first.data}"
    console.table(title, scores.columns, scores.rows)
    if len(compared.first.by_blur) > 1:
        columns = ["", "images", "A, dB", "B, dB", "B over A"]
        console.table("By strength of the blur", columns, group_rows(compared, "by_blur"))
    print_lines(f"A: {compared.first.model}. B: {compared.second.model}.")
    print_lines(verdict(compared), *notes(compared))
