"""Where pairs come from: one adapter a data set layout. Each lists pairs by path and decodes nothing."""

from pipelines.sources.base import PairRef, Source, hold_out
from pipelines.sources.datasets import GoProPairs, RealBlurPairs, RedsPairs
from pipelines.sources.find import find_source, two_sides
from pipelines.sources.folders import FolderPairs
from pipelines.sources.hide import HidePairs
from pipelines.sources.lists import ListedPairs
from pipelines.sources.lmdbs import LmdbPairs
from pipelines.sources.remote import AnyPath, RemotePath, place
from pipelines.sources.sharp import SharpPhotos

__all__ = [
    "AnyPath",
    "FolderPairs",
    "GoProPairs",
    "HidePairs",
    "ListedPairs",
    "LmdbPairs",
    "PairRef",
    "RealBlurPairs",
    "RedsPairs",
    "RemotePath",
    "SharpPhotos",
    "Source",
    "find_source",
    "hold_out",
    "place",
    "two_sides",
]
