"""Photos or frames in, pairs out: finds the work, has it done, and writes down what was done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from nafnet_core import InputError
from pipelines.files import written_aside
from pipelines.synth.config import (
    RECORDS,
    SHEET,
    SynthConfig,
    SynthResult,
    check,
    claim,
    refuse_other_pairs,
)
from pipelines.synth.frames import FrameSequence, find_sequences, open_sequence
from pipelines.synth.kernels import digests, read_kernels
from pipelines.synth.photos import blur_photo, find_photos, unique_names
from pipelines.synth.scan import Scan, scan
from pipelines.synth.sheet import draw_sheet
from pipelines.synth.windows import Window, average_window, plan_windows, window_jobs
from pipelines.synth.work import in_threads, over_ray
from pipelines.synth.writing import Made

# Measured on 2 cores, 200 photos of 481×321: a plain loop 17.5 pairs/s, threads 34.0, Ray once it runs 33.5;
# its start takes 5 s and more. A job holds the interpreter for 1 to 2 of its 50 ms, so threads use some 30
# cores: on one machine Ray is for more than half of that and for many jobs, and for clusters. (Of before blur
# was made tap by tap, which makes a job 1.3 to 1.7 times as fast.)
_MIN_RAY_JOBS, _MIN_RAY_CPUS = 1000, 16


@dataclass(frozen=True, kw_only=True)
class _Work:
    """All there is to do. The jobs are made when they are taken: frames of a video come with theirs."""

    function: Callable[..., Made]
    jobs: Iterable[Any]
    num_jobs: int
    keys: list[str]
    shared: tuple[Any, ...]
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def run(
    config: SynthConfig, *, on_progress: Callable[..., None] = lambda done, total, note="": None
) -> SynthResult:
    """Make all pairs that are not there yet.

    The pixels of a pair follow from the seed, the name of its photo or sequence and its number. A pair counts
    as there when both files are, younger than what they were made from; with other settings than those it was
    made with, nothing is touched and the run refused.

    Args:
        config: what to make of which photos or frames.
        on_progress: called with photos (or pairs of frames) done, and all of them; while frames are looked
            at first, with frames done, all of them, and a word on it.

    Raises:
        InputError: nothing to work on, unreadable kernels, an unusable range, options that exclude each
            other, pairs of other settings, or a folder that cannot be written.
    """
    check(config)
    asked = config
    # Ray's workers may run in another folder than this process.
    config = replace(config, out=config.out.absolute(), sharp=[path.absolute() for path in config.sharp])
    work = _of_photos(config) if config.average is None else _of_frames(config, on_progress)
    refuse_other_pairs(config.out, {f"{key}.png" for key in work.keys})
    refused, keys, num_kept = list(work.refused), [], 0
    with written_aside(config.out / RECORDS) as temporary, temporary.open("w") as file:
        with closing(_done(work, config)) as results:
            for done, made in enumerate(results, start=1):
                refused += [made.refused] if made.refused else []
                num_kept += made.num_kept
                for record in made.records:
                    file.write(json.dumps(record) + "\n")
                    keys.append(str(record["key"]))
                on_progress(done, work.num_jobs)
        if not keys:
            if config.average is not None and len(refused) == 1:
                raise InputError(refused[0])
            what = "photos" if config.average is None else "sequences"
            raise InputError(f"none of the {what} could be used", file=config.out, got=refused[0])
    for half in config.out.rglob(".*.tmp"):  # left by a run that was killed
        half.unlink()
    sheet = asked.out / SHEET
    draw_sheet(asked.out, keys, sheet)
    return SynthResult(
        out=asked.out,
        num_pairs=len(keys),
        num_kept=num_kept,
        refused=tuple(refused),
        notes=work.notes,
        contact_sheet=sheet,
    )


def _of_photos(config: SynthConfig) -> _Work:
    jobs = find_photos(config)
    kernels = read_kernels(config.kernels) if config.kernels else []
    claim(config, digests(kernels))
    return _Work(
        function=blur_photo,
        jobs=jobs,
        num_jobs=len(jobs),
        keys=[key for job in jobs for key in job.keys(config.variants)],
        shared=(config, kernels),
    )


def _of_frames(config: SynthConfig, on_progress: Callable[..., None]) -> _Work:
    found = find_sequences(config.sharp, config.out)
    names = unique_names(name for name, _ in found)
    sequences = [open_sequence(name, path) for name, (_, path) in zip(names, found, strict=True)]
    claim(config, {})
    planned: list[tuple[FrameSequence, list[Window]]] = []
    refused: list[str] = []
    notes: list[str] = []
    for sequence, result in _scanned(sequences, on_progress):
        if isinstance(result, InputError):
            refused.append(str(result))
            continue
        notes += result.notes
        try:
            windows, left_out = plan_windows(sequence, result, config)
        except InputError as error:
            refused.append(str(error))
            continue
        planned.append((sequence, windows))
        refused += left_out
    keys = [window.key(sequence.name) for sequence, windows in planned for window in windows]
    return _Work(
        function=average_window,
        jobs=chain.from_iterable(window_jobs(sequence, windows, config) for sequence, windows in planned),
        num_jobs=len(keys),
        keys=keys,
        shared=(config,),
        refused=tuple(refused),
        notes=tuple(notes),
    )


def _scanned(
    sequences: list[FrameSequence], on_progress: Callable[..., None]
) -> Iterator[tuple[FrameSequence, Scan | InputError]]:
    """Each sequence with what is in it, or why it cannot be used."""
    counts: list[int] = []
    for sequence in sequences:
        try:
            counts.append(sequence.num_expected)
        except InputError:
            counts.append(0)
    total, done = sum(counts), 0

    def step() -> None:
        nonlocal done
        done += 1
        on_progress(done, max(done, total), "frames looked at")

    for sequence in sequences:
        try:
            yield sequence, scan(sequence, step)
        except InputError as error:
            yield sequence, error


def _done(work: _Work, config: SynthConfig) -> Iterator[Made]:
    use_ray = config.use_ray
    if use_ray is None:
        is_worth_it = work.num_jobs >= _MIN_RAY_JOBS and (os.cpu_count() or 1) >= _MIN_RAY_CPUS
        use_ray = config.address is not None or is_worth_it
    if not use_ray:
        yield from in_threads(lambda job: work.function(job, *work.shared), work.jobs)
        return
    from cluster.connect import connect

    with connect(config.address):
        yield from over_ray(work.function, work.jobs, *work.shared)
