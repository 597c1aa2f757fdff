"""Look at what there is: a store, a model, a run, or pairs that are not prepared yet.

    nafnet inspect store                 # table, checksums, sample pairs and histograms as PNG
    nafnet inspect store --deep          # decodes every pair, and compares the digest of the pixels too
    nafnet inspect my-run                # checkpoints with their digests, curves

One file a kind: `stores`, `weights`, `exported`, `runs`, `searches`; `verification` checks a store's files,
`sampling` measures pairs and `drawing` draws them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nafnet_core import InputError
from pipelines.inspect.result import InspectConfig, InspectResult, Show
from pipelines.sources import place
from pipelines.store import is_store
from pipelines.urls import local_path

__all__ = ["InspectConfig", "InspectResult", "run"]

_WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt")
_EXPORTED = (".onnx", ".xml")  # as `pipelines.models.EXPORTED_SUFFIXES`, whose import would cost seconds
_LISTS = (".csv", ".jsonl")


def run(config: InspectConfig, *, show: Show) -> InspectResult:
    """Look at `config.what`.

    Args:
        config: `what` is a store; a weights or exported file or `models:/NAME@ALIAS`; the folder of a run or
            search, or its name in the workspace; or a folder or list of pairs that `prepare` would take.
        show: makes a progress display from a label and a unit.

    Raises:
        InputError: it is none of these, or so damaged that nothing can be said of it. Damage that leaves
            something to say is in the result's `problems`.
    """
    return _kind_of(config)(config, show)


def _kind_of(config: InspectConfig) -> Callable[[InspectConfig, Show], InspectResult]:
    # Imported where they are needed: a store is looked at without torch.
    path = place(config.what)
    if not config.what.startswith("models:/") and is_store(local_path(config.what)):
        from pipelines.inspect.stores import inspect_store

        return inspect_store
    if config.what.startswith("models:/") or (path.suffix in _WEIGHTS and isinstance(path, Path)):
        from pipelines.inspect.weights import inspect_model

        return inspect_model
    if path.suffix in _EXPORTED and isinstance(path, Path) and path.is_file():
        from pipelines.inspect.exported import inspect_exported

        return inspect_exported
    from pipelines.inspect.runs import find_run, inspect_run
    from pipelines.inspect.searches import find_search, inspect_search

    if isinstance(path, Path) and find_search(config.what, config.workspace) is not None:
        return inspect_search
    if isinstance(path, Path) and find_run(config.what, config.workspace) is not None:
        return inspect_run
    if path.is_dir() or (path.suffix in _LISTS and path.is_file()):
        from pipelines.inspect.stores import inspect_source

        return inspect_source
    raise InputError(
        "no such thing" if not path.exists() else "nothing that can be looked at",
        file=str(path),
        expected="a store, a weights or exported file, models:/NAME@ALIAS, a run or search, "
        "or a folder or list of pairs",
        fix="Of a store, name its folder" if path.exists() else None,
    )
