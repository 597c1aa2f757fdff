"""Scoring images: the protocol, one image's scores, the pairs, and the work on one or many processes."""

from pipelines.scoring.image import ImageScore, Protocol, score_image

__all__ = ["ImageScore", "Protocol", "score_image"]
