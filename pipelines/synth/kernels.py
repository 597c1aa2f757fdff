"""Measured blur kernels: gray images, or MATLAB files as the field's authors publish them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nafnet_core import CapabilityError, InputError
from nafnet_core.kernels import Kernel, centred
from pipelines.files import sha256
from pipelines.images import IMAGE_SUFFIXES, list_images, read_photo

_MAX_SIDE_PX = 101  # Levin's measure 13 to 27 px, KAIR's 25
# Nine tenths of a kernel's energy lie in 1 to 14 % of its pixels (Levin 2009, and KAIR's twelve), of a
# photo's in 69 % or more. Kernels cut tight around their disc fill more, and are dark along the border.
_ENERGY_SHARE, _MAX_FILLED_SHARE, _SMALL_PX = 0.9, 0.5, 150
_MAX_BORDER_RATIO = 0.3
_OTHER_SUFFIXES = frozenset({".npy", ".npz", ".h5", ".hdf5", ".csv"})


@dataclass(frozen=True, kw_only=True)
class MeasuredKernel:
    """A kernel ready to use, and where it is from."""

    name: str
    """File name; in a MATLAB file with the variable and the number in it, `kernels_12.mat:kernels[3]`."""
    sha256: str
    """Of the file."""
    kernel: Kernel


def read_kernels(path: Path) -> list[MeasuredKernel]:
    """Read all kernels of a folder, or of one file, sorted by path.

    Raises:
        InputError: there are none, a file is no kernel, or one is of a format that is not read.
        CapabilityError: MATLAB files without SciPy to read them.
    """
    if path.is_file():
        files, root = [path], path.parent
    else:
        mats = [file for file in path.rglob("*") if file.suffix.lower() == ".mat"]
        files, root = sorted([*list_images(path), *mats]), path
        _refuse_unread(path)
    found = []
    for file in files:
        name, digest = file.relative_to(root).as_posix(), sha256(file)
        for part, values in _arrays(file):
            try:
                kernel = centred(_checked(values))
            except ValueError as error:
                raise InputError("not a blur kernel", file=f"{file}{part}", got=str(error)) from error
            found.append(MeasuredKernel(name=f"{name}{part}", sha256=digest, kernel=kernel))
    if not found:
        raise InputError("no kernels in this folder", file=path, expected="gray images, or .mat files")
    return found


def digests(kernels: list[MeasuredKernel]) -> dict[str, str]:
    """Name → SHA-256 over the kernel as it is used."""
    return {kernel.name: hashlib.sha256(kernel.kernel.tobytes()).hexdigest() for kernel in kernels}


def _refuse_unread(folder: Path) -> None:
    unread = [file for file in folder.rglob("*") if file.suffix.lower() in _OTHER_SUFFIXES]
    if unread:
        raise InputError(
            "kernels of a format that is not read",
            file=sorted(unread)[0],
            expected="gray images, or .mat files",
            fix="Save them as 8- or 16-bit gray PNG, or take them out of the folder",
        )


def _arrays(file: Path) -> Iterator[tuple[str, NDArray[np.floating]]]:
    """Each array of a file, with what is to be added to the file's name to tell it from others."""
    if file.suffix.lower() == ".mat":
        yield from _of_matlab(file)
        return
    if file.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError("not a file of kernels", file=file, expected="a gray image, or a .mat file")
    photo = read_photo(file)
    if not (photo.rgb_hwc == photo.rgb_hwc[..., :1]).all():
        raise InputError("not a blur kernel", file=file, expected="a gray image", got="a colour image")
    yield "", photo.rgb_hwc[..., 0].astype(np.float64)


def _of_matlab(file: Path) -> Iterator[tuple[str, NDArray[np.floating]]]:
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise CapabilityError(
            "MATLAB files need SciPy", file=file, fix="pip install scipy, or save the kernels as gray PNGs"
        ) from error
    try:
        variables = loadmat(file)
    except NotImplementedError as error:  # HDF5 inside
        raise InputError(
            "a MATLAB file of version 7.3", file=file, expected="version 7 or older", fix="Save it with -v7"
        ) from error
    except Exception as error:  # damaged ones raise whatever the parser stumbles over
        raise InputError("a damaged MATLAB file", file=file, got=error) from error
    for name, value in sorted(variables.items()):
        if name.startswith("__") or not isinstance(value, np.ndarray):
            continue
        if value.dtype != object:
            yield f":{name}", value
            continue
        for number, cell in enumerate(value.ravel()):
            yield f":{name}[{number}]", np.asarray(cell)


def _checked(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """`values` as numbers. Raises `ValueError`, in a few words, where they are too much like a photo."""
    if values.dtype.kind not in "fiub":
        raise ValueError(f"values of type {values.dtype}")
    kernel = values.astype(np.float64)
    if kernel.ndim != 2:
        raise ValueError(f"{kernel.ndim} dimensions")
    if not kernel.size or max(kernel.shape) > _MAX_SIDE_PX:
        raise ValueError(
            f"{kernel.shape[1]}×{kernel.shape[0]}, and a kernel is up to {_MAX_SIDE_PX} px a side"
        )
    if not np.isfinite(kernel).all() or kernel.min() < 0 or kernel.sum() <= 0:
        raise ValueError("a kernel is of non-negative numbers, not all zero")
    energy = np.cumsum(np.sort(kernel, axis=None)[::-1])
    num_filled = int(np.searchsorted(energy, _ENERGY_SHARE * energy[-1])) + 1
    border = np.concatenate([kernel[0], kernel[-1], kernel[1:-1, 0], kernel[1:-1, -1]])
    is_filled = num_filled > max(_SMALL_PX, _MAX_FILLED_SHARE * kernel.size)
    if is_filled and border.mean() > _MAX_BORDER_RATIO * kernel.mean():
        raise ValueError(f"light all over, as a photo's: {num_filled} pixels hold nine tenths of it")
    return kernel
