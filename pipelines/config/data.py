"""Where a run's pairs come from, and what is done to them on the way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from nafnet_core.blur import BlurKind, draw_degradation, sample_rng
from nafnet_core.errors import InputError
from pipelines.config.base import Section
from pipelines.urls import absolute, holds_credentials, public


def without_credentials(value: str | os.PathLike[str]) -> str:
    """A place as text. Raises `InputError` where its credentials would be written down."""
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError("a path, or a URL")
    text = os.fspath(value)
    if holds_credentials(text):
        # No ValueError: pydantic's message would quote the URL.
        raise InputError(
            "credentials in a URL would be written into the run's records",
            file=public(text),
            fix="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    return text


Place = Annotated[str, BeforeValidator(without_credentials), AfterValidator(absolute)]
"""A path, made absolute, for workers run in other folders; or a URL of any file system that pyarrow or fsspec
knows, without credentials."""


class BlurSection(Section):
    """Blur made on the fly: sharp images are blurred anew for each sample; see `nafnet_core.blur`.

    `nafnet synth` has the same options, and takes its defaults from here.
    """

    kinds: tuple[BlurKind, ...] = Field(("shake",), min_length=1)
    """All equally likely."""
    min_size_px: float = Field(3.0, ge=0)
    max_size_px: float = Field(15.0, ge=0)
    """Range of the blur's extent. GoPro's blurs reach some 30 px at 1280×720."""
    max_noise: float = Field(0.004, ge=0, le=1)
    """Upper end of the read noise, linear light, 1.0 being white; 0.004 is a phone at ISO 400 or so."""
    min_jpeg_quality: int | None = Field(None, ge=1, le=95)
    """Blurred images are compressed, at qualities from this to 95; None leaves them as they are."""
    encoded_share: float = Field(0.0, ge=0, le=1)
    """Share of the blurred samples that are blurred as encoded, as GoPro's `blur` was made; the others in
    linear light, as cameras do, and as GoPro's `blur_gamma`."""
    kernels: Annotated[Path, AfterValidator(Path.absolute)] | None = None
    """Folder of measured kernels, gray images or MATLAB files, or one such file, for the kind `measured`."""
    sharp_share: float = Field(0.0, ge=0, le=1)
    """Share of the samples that stay sharp, so that a network learns to leave sharp photos as they are."""
    own_share: float = Field(0.0, ge=0, le=1)
    """Share of the samples that keep the blurred image of the store."""

    def ranges(self) -> dict[str, Any]:
        """What `nafnet_core.blur.draw_degradation` draws from."""
        return self.model_dump(exclude={"kernels", "sharp_share", "own_share"})

    @model_validator(mode="after")
    def _can_be_drawn(self) -> BlurSection:
        draw_degradation(sample_rng(0, 0), **self.ranges())
        if (self.kernels is not None) != ("measured" in self.kinds):
            raise ValueError("`kernels` and the kind `measured` together, or neither")
        if self.sharp_share + self.own_share > 1:
            raise ValueError("sharp_share and own_share of at most 1 together")
        return self


class StoreSection(Section):
    """One store of a training mixture."""

    path: Place
    weight: float = Field(1.0, gt=0)
    """Passes over this store in one epoch of the mixture."""
    blur: BlurSection | None = None
    """None trains on the store's own blurred images."""


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
