"""Which form of a model runs: torch, or an export that was kept.

    choose(loaded, workspace, backend="auto")

`auto` takes the fastest, on this machine, of torch and the kept exports whose runtime is installed. Without a
kept export, or with a GPU, which exports do not use, that is torch, and nothing is measured.
"""

from __future__ import annotations

import logging
import math
from functools import cache

import torch

from nafnet_core import InputError, NAFNetError
from pipelines.console import TOLD
from pipelines.export import published
from pipelines.export.formats import FORMATS, Format
from pipelines.export.kept import Kept, name_of, network_digest, place_of, read_kept
from pipelines.export.timing import measure, read_times, this_machine, write_times
from pipelines.models import LoadedModel
from pipelines.restorer import Restorer, RestoreSettings
from pipelines.workspace import Workspace

log = logging.getLogger(__name__)

RUNTIMES: dict[str, Format] = {form.runtime: form for form in FORMATS.values() if form.runtime is not None}
BACKENDS = ("auto", "torch", *RUNTIMES)
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")
_IN_TORCH = PRECISIONS[:3]


def choose(
    loaded: LoadedModel,
    workspace: Workspace,
    *,
    backend: str,
    precision: str = "auto",
    num_threads: int | None = None,
) -> LoadedModel:
    """The model in a back end.

    Args:
        loaded: in torch.
        workspace: where exports are kept; those beside a registered version are fetched into it.
        backend: one of `BACKENDS`. A runtime takes the export that is kept for it, of several precisions the
            fastest.
        precision: only exports of this one; `auto`: of any.
        num_threads: of a runtime, and of torch while times are measured; None: as many as torch has.

    Returns:
        `loaded`, where that is what was chosen.

    Raises:
        InputError: no such back end, none kept for it, or what is kept is damaged. With `auto` such an export
            is passed over, with a warning.
        CapabilityError: the runtime that was asked for is not installed, or the registry does not answer.
    """
    if backend not in BACKENDS:
        raise InputError("unknown back end", expected=", ".join(BACKENDS), got=backend)
    if precision not in PRECISIONS:
        raise InputError("unknown precision", expected=", ".join(PRECISIONS), got=precision)
    is_auto = backend == "auto"
    if backend == "torch" or (is_auto and torch.cuda.is_available()):
        return loaded
    if not is_auto:
        RUNTIMES[backend].check(RUNTIMES[backend].to_run, f"--backend {backend}")
    kept = _kept(loaded, workspace, backend, precision)
    threads = num_threads or torch.get_num_threads()
    if is_auto:
        return _fastest(loaded, kept, precision, threads, is_auto=True) if kept else loaded
    if not kept:
        wanted = "" if precision == "auto" else f" --precision {precision}"
        raise InputError(
            f"no export for {backend} is kept of this model", file=loaded.label,
            expected=None if precision == "auto" else precision,
            fix=f"nafnet export {loaded.version or 'MODEL'} --to {RUNTIMES[backend].name}{wanted} --keep",
        )  # fmt: skip
    return _fastest(loaded, kept, precision, threads, is_auto=False)


def _kept(loaded: LoadedModel, workspace: Workspace, backend: str, precision: str) -> list[Kept]:
    """What is kept and can be run here."""
    is_auto = backend == "auto"
    pattern = name_of(
        "*" if is_auto else backend, "*" if precision == "auto" else precision, loaded.train_patch_px
    )
    if loaded.version is None and not workspace.exports.is_dir():
        return []
    network = network_digest(loaded)
    if loaded.version is not None:
        try:
            published.fetch(loaded.version, network, pattern, workspace)
        except NAFNetError as error:
            if not is_auto:
                raise
            log.warning("exports beside %s are passed over: %s", loaded.version, error)
    found = []
    for folder in sorted(place_of(network, pattern, workspace).parent.glob(pattern)):
        try:
            kept = read_kept(folder)
        except InputError as error:
            if not is_auto:
                raise
            log.warning("passed over: %s", error)
            continue
        if kept.form.can_run:
            found.append(kept)
    return found


def _fastest(
    loaded: LoadedModel, kept: list[Kept], precision: str, num_threads: int, *, is_auto: bool
) -> LoadedModel:
    """Of the kept ones, and with `auto` of torch; by times that are measured where they are not known."""
    in_torch = RestoreSettings(precision=precision if precision in _IN_TORCH else "auto")  # type: ignore[arg-type]
    forms: dict[str, Kept | None] = {each.key: each for each in kept}
    if is_auto and precision in _IN_TORCH:
        forms[f"torch-{Restorer(loaded, in_torch).precision}"] = None

    @cache
    def opened(name: str) -> LoadedModel | None:
        try:
            return loaded if (form := forms[name]) is None else form.open(loaded, num_threads=num_threads)
        except NAFNetError as error:
            if not is_auto:
                raise
            log.warning("passed over: %s", error)
            return None

    folder, machine = kept[0].folder.parent, this_machine(num_threads, {each.runtime for each in kept})
    times = read_times(folder, machine)
    if len(forms) > 1 and not set(forms) <= set(times):
        told = sorted({form.runtime if form else "torch" for form in forms.values()})
        log.info("timing this model in %s, once on this machine", ", ".join(told), extra=TOLD)
        settings = {name: in_torch if form is None else RestoreSettings() for name, form in forms.items()}
        restorers = {name: Restorer(model, settings[name]) for name in forms if (model := opened(name))}
        times = {**times, **measure(restorers, num_threads=num_threads)}
        write_times(folder, machine, times)
    by_time = sorted(forms, key=lambda name: times.get(name, math.inf))
    return next((model for name in by_time if (model := opened(name))), loaded)
