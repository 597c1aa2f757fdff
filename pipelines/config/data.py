"""Where a run's pairs come from, and what is done to them on the way."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import BeforeValidator, Field

from nafnet_core.errors import InputError
from pipelines.config.base import Section
from pipelines.urls import holds_credentials, public


def _place(value: str | os.PathLike[str]) -> str:
    text = os.fspath(value)
    if holds_credentials(text):
        # No ValueError: pydantic's message would quote the URL.
        raise InputError(
            "credentials in a URL would be written into the run's records",
            file=public(text),
            fix="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    return text


Place = Annotated[str, BeforeValidator(_place)]
"""A path, or a URL of any file system that pyarrow or fsspec knows, without credentials."""


class StoreSection(Section):
    """One store of a training mixture."""

    path: Place
    weight: float = Field(1.0, gt=0)
    """Passes over this store in one epoch of the mixture."""


class DataSection(Section):
    """Where pairs come from. Left out in shipped recipes; `--data` and `--val` fill it."""

    train: tuple[StoreSection, ...] = ()
    val: Place | None = None
    """Store of whole images to validate on."""
    shuffle_window_pairs: int = Field(65_536, gt=0)
    """Pairs shuffled among one another; a window is a random set of runs of consecutive pairs."""
    cache_gib: float = Field(64.0, gt=0)
    """Bound of each node's cache of shards, where a store is a URL. `NAFNET_CACHE` names its folder."""
    augment: bool = True
    """The eight flips and quarter turns."""
    cutblur: float = Field(0.0, ge=0, le=1)
    """Probability that a part of the blurred patch is made sharp (Yoo et al. 2020)."""
    channel_shuffle: float = Field(0.0, ge=0, le=1)
    """Probability that the colour channels of a pair change places."""
