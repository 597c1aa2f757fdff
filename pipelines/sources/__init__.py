"""Where pairs come from: one adapter a data set layout. Each lists pairs by path and decodes nothing."""

from pipelines.sources.base import PairRef, Source, hold_out
from pipelines.sources.datasets import GoProPairs, HidePairs, RealBlurPairs, RedsPairs
from pipelines.sources.find import find_source
from pipelines.sources.folders import FolderPairs
from pipelines.sources.lists import ListedPairs

__all__ = [
    "FolderPairs",
    "GoProPairs",
    "HidePairs",
    "ListedPairs",
    "PairRef",
    "RealBlurPairs",
    "RedsPairs",
    "Source",
    "find_source",
    "hold_out",
]
