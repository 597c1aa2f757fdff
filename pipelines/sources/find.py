"""Recognise a data set by what lies in its folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from os.path import isdir
from pathlib import Path

from nafnet_core import InputError
from pipelines.sources.base import Source
from pipelines.sources.datasets import (
    GoProPairs,
    RealBlurPairs,
    RedsPairs,
    is_reds,
    realblur_subset,
)
from pipelines.sources.folders import FolderPairs
from pipelines.sources.hide import HidePairs, is_hide
from pipelines.sources.lists import LIST_SUFFIXES, ListedPairs
from pipelines.sources.lmdbs import LmdbPairs, is_lmdb
from pipelines.sources.remote import AnyPath

# Folder names that people use for the two sides, best known first.
_LQ_NAMES = ("blur", "lq", "input", "blurred", "blurry")
_GT_NAMES = ("sharp", "gt", "target", "groundtruth", "ground_truth")


def find_source(root: AnyPath, *, split: str, lq_name: str = "{}", blur: str | None = None) -> Source:
    """Recognise the layout of `root`: a list, GoPro, RealBlur, REDS, HIDE, or two folders of pairs.

    Args:
        root: a CSV or JSONL file, or a folder; two folders of pairs may also lie below `root/split`.
        split: train, val or test.
        lq_name: of two folders of pairs, see `FolderPairs`.
        blur: which of its blurred versions a data set is to give. None takes `blur`, or RealBlur's only one.

    Raises:
        InputError: there is no such folder, or no layout is recognised.
    """
    if root.suffix in LIST_SUFFIXES and root.is_file():
        return ListedPairs(path=root, split=split)
    if not root.is_dir():
        fix = None if isinstance(root, Path) else "Look at the bucket's name too: it may not exist"
        raise InputError(
            "no such folder" if not root.exists() else "not a folder or a list", file=root, fix=fix
        )
    if (subset := realblur_subset(root, blur)) is not None:
        return RealBlurPairs(root=root, split=split, subset=subset)
    blur = blur or "blur"
    if any((root / split).glob("*/sharp")) and any((root / split).glob(f"*/{blur}")):
        return GoProPairs(root=root, split=split, blur=blur)
    if is_reds(root, split):
        return RedsPairs(root=root, split=split, blur=blur)
    if is_hide(root, split):
        return HidePairs(root=root, split=split)
    for folder in (root, root / split):
        sides = [_first_folder(folder, names) for names in (_LQ_NAMES, _GT_NAMES)]
        if all(sides):
            return FolderPairs(lq_dir=sides[0], gt_dir=sides[1], lq_name=lq_name)  # type: ignore[arg-type]
    others = _splits_with_sequences(root)
    if others:
        what, got, fix = (
            f"--split {split}",
            f"sequences in {' and '.join(others)}",
            "Copy the missing part of the data set there, or choose another --split or --blur",
        )
        if split in others:
            versions = sorted({path.name for path in root.glob(f"{split}/*/*") if path.is_dir()})
            what, got, fix = f"--blur {blur}", ", ".join(versions), "Choose another --blur, or copy it there"
        raise InputError(
            f"no sequences for {what} in this folder",
            file=root / split,
            expected=f"SEQUENCE/{blur} and SEQUENCE/sharp",
            got=got,
            fix=fix,
        )
    raise InputError(
        "no pairs found in this folder",
        file=root,
        expected="subfolders blur and sharp (or lq and gt, input and target), GoPro, HIDE, RealBlur or REDS",
        fix="Name both: `prepare --lq BLURRED --gt SHARP`, or `evaluate MODEL BLURRED SHARP`; "
        "sharp photos alone are for `prepare --sharp`, or for `synth`",
    )


def two_sides(lq: AnyPath, gt: AnyPath, *, lq_name: str = "{}") -> Source:
    """Pairs of two folders, or of two LMDBs as BasicSR writes them."""
    if is_lmdb(lq) and is_lmdb(gt):
        if not (isinstance(lq, Path) and isinstance(gt, Path)):
            raise InputError("an LMDB is not read from a URL", file=str(lq), fix="Copy both to a disk")
        return LmdbPairs(lq_dir=lq, gt_dir=gt)
    return FolderPairs(lq_dir=lq, gt_dir=gt, lq_name=lq_name)


def _splits_with_sequences(root: AnyPath) -> list[str]:
    if not isinstance(root, Path):
        return sorted({path.parent.parent.name for path in root.glob("*/*/sharp")})
    # Not by `glob`: of a folder of a million photos it would keep all names.
    return sorted(
        Path(split).name for split in _folders(root) if any(isdir(f"{s}/sharp") for s in _folders(split))
    )


def _folders(folder: str | Path) -> Iterator[str]:
    with suppress(PermissionError), os.scandir(folder) as entries:
        yield from (entry.path for entry in entries if entry.is_dir())


def _first_folder(parent: AnyPath, names: Sequence[str]) -> AnyPath | None:
    return next((parent / name for name in names if (parent / name).is_dir()), None)
