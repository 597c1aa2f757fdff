"""Pictures of a search: where good values lie, and how the best score came about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.config import Distribution
from pipelines.files import make_folder, written_aside
from pipelines.tune.ledger import Trial, TrialLedger
from pipelines.tune.space import Space, same, short

_STATES = {"finished": ("whole budget", "o", "C0"), "stopped": ("stopped early", ".", "0.6")}
_RUNNING = ("under way", "x", "C1")
_LABEL_CHARS = 30
_INCHES_AN_AXIS, _FEWEST_INCHES = 2.2, 6.0
_DPI = 110


def parallel_coordinates(path: Path, space: Space, trials: Sequence[Trial], *, title: str) -> Path | None:
    """An axis a searched value and one for the PSNR, a line a trial; None without scores.

    Lines are coloured by PSNR. Stopped trials are thin, their scores being of shorter training; the thickest
    line is the best of those that had the whole budget.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    scored = sorted((t for t in trials if t.psnr_db is not None), key=lambda trial: trial.psnr_db or 0.0)
    if not scored:
        return None
    keys = list(space.distributions)
    scores = [trial.psnr_db or 0.0 for trial in scored]
    low, high = scores[0], max(scores[-1], scores[0] + 1e-3)
    width = max(_FEWEST_INCHES, _INCHES_AN_AXIS * (len(keys) + 1))
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    figure.suptitle(f"{title}: thin lines were stopped early, the thickest is the best")
    best = max((t for t in scored if t.outcome == "finished"), key=lambda t: t.psnr_db or 0.0, default=None)
    axes = figure.subplots()
    colours = colormaps["viridis"]
    for trial, score in zip(scored, scores, strict=True):
        heights = [_height(space.distributions[key], trial.point[key]) for key in keys]
        share = (score - low) / (high - low)
        whole = trial.outcome == "finished"
        width = 4.0 if trial is best else 1.8 if whole else 0.8
        line = [*heights, share]
        axes.plot(range(len(line)), line, color=colours(share), linewidth=width, alpha=1.0 if whole else 0.6)
    for place, key in enumerate(keys):
        axes.axvline(place, color="0.7", linewidth=0.8)
        for height, label in _ticks(space.distributions[key], key):
            _note(axes, place, height, label)
    axes.axvline(len(keys), color="0.7", linewidth=0.8)
    for height, value in ((0.0, low), (1.0, high)):
        _note(axes, len(keys), height, f"{value:.2f}")
    axes.set_xticks(range(len(keys) + 1), [*keys, "PSNR, dB"])
    axes.set_yticks([])
    axes.set_xlim(-0.15, len(keys) + 0.5)
    axes.set_ylim(-0.06, 1.06)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return _save(figure, path)


def history(path: Path, ledger: TrialLedger, *, title: str) -> Path | None:
    """Scores of the trials over all samples trained on, and the best so far; None without scores."""
    from matplotlib.figure import Figure

    samples_of: dict[int, int] = {}
    places: dict[int, tuple[int, float]] = {}
    best: list[tuple[int, float]] = []
    for event in ledger.history:
        if event["event"] != "score":
            continue
        number = event["trial"]
        samples_of[number] = event["samples"]
        total = sum(samples_of.values())
        places[number] = total, max(event["psnr_db"], places.get(number, (0, 0.0))[1])
        best.append((total, max(event["psnr_db"], best[-1][1] if best else 0.0)))
    if not best:
        return None
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots()
    axes.step(*zip(*best, strict=True), where="post", color="C2", label="best so far")
    for state, (label, marker, colour) in {**_STATES, None: _RUNNING}.items():
        points = [place for number, place in places.items() if ledger.trials[number].outcome == state]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, label=label)
    axes.set_xlabel("samples, all trials together")
    axes.set_ylabel("PSNR, dB")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return _save(figure, path)


def _height(drawn: Distribution, value: Any) -> float:
    """Where on its axis a value lies, from 0 to 1."""
    import math

    if drawn.choice is not None:
        number = next(n for n, choice in enumerate(drawn.choice) if same(choice, value))
        return number / max(1, len(drawn.choice) - 1)
    assert drawn.range is not None
    low, high = drawn.range
    if drawn.loguniform is not None:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _ticks(drawn: Distribution, key: str) -> list[tuple[float, str]]:
    return [
        (_height(drawn, value), next(iter(short({key: value}).values()))[:_LABEL_CHARS])
        for value in drawn.extremes
    ]


def _note(axes: Any, place: float, height: float, text: str) -> None:
    box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
    axes.text(place + 0.03, height, text, fontsize=8, va="center", bbox=box)


def _save(figure: Any, path: Path) -> Path:
    make_folder(path.parent)
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
    return path
