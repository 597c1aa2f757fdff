"""The search space: points drawn from it, the recipe that a point makes, and whether all of them can be."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nafnet_core import InputError
from pipelines.config import Distribution, RunConfig, SearchConfig, parse_config
from pipelines.config.recipe import is_within
from pipelines.train.checks import check_numbers

Point = Mapping[str, Any]
"""Dotted name → value."""

# The same in every trial: what trains on other data, for another time, or is scored otherwise cannot be
# compared; the rest says where and how, and changes no result.
_FIXED = {
    "name": "it is the search's",
    "seed": "it decides the order of samples",
    "data.train": "trials on other data cannot be compared",
    "data.val": "trials scored on other data cannot be compared",
    "data.shuffle_window_pairs": "it decides the order of samples",
    "budget": "trials of other lengths cannot be compared",
    "validation": "trials scored otherwise cannot be compared",
    "scaling": "it says who does the work, and changes no result",
    "checkpoint": "it changes no result",
    "tracking": "it changes no result",
    "search": "it is no part of a run's recipe",
}
_MOST_CORNERS = 512
_SHORT_DIGITS = 3


class Space:
    """What a search draws from."""

    def __init__(self, config: SearchConfig) -> None:
        self._base = config.base.model_dump(mode="json")
        self._search = config.search
        # A section's own choice before what is drawn inside it.
        self.distributions = dict(sorted(config.search.space.items(), key=lambda item: item[0].count(".")))

    def recipe(self, point: Point, *, name: str, file: str = "search.space") -> RunConfig:
        """The run of one point.

        Raises:
            InputError: it cannot be.
        """
        content = copy.deepcopy(self._base)
        for key in self.distributions:
            _put(content, key, point[key])
        content["name"] = name
        return parse_config(content, file=file)

    def draw(self, rng: np.random.Generator) -> dict[str, Any]:
        """A point, each value on its own."""
        return {key: _drawn(drawn, rng) for key, drawn in self.distributions.items()}

    def grid(self) -> list[dict[str, Any]]:
        """Every choice, and `grid_points` of each range, evenly spread on its own scale."""
        values = [_spread(drawn, self._search.points_of(drawn)) for drawn in self.distributions.values()]
        return [
            dict(zip(self.distributions, combined, strict=True)) for combined in itertools.product(*values)
        ]

    def check(self) -> None:
        """Try what the space allows: every choice beside every other, and the ends of every range.

        Raises:
            InputError: a name that no recipe has or that must not differ, or values that do not go together;
                both are told.
        """
        for key in self.distributions:
            # Also a section that holds it: `data` as a whole brings other stores.
            fixed = next((name for name in _FIXED if is_within(key, name)), None)
            if fixed is not None:
                raise InputError(f"{key!r} cannot be searched: {_FIXED[fixed]}", file="search.space")
        tried: set[str] = set()
        for point in self._corners():
            try:
                recipe = self.recipe(point, name="trial")
                # Networks are built for it: once for each, not for each learning rate.
                built = recipe.model_dump_json(include={"model", "loss", "perceptual_weights", "stages"})
                if built not in tried:
                    check_numbers(recipe)
                    tried.add(built)
            except InputError as error:
                if str(error).startswith("unknown key"):
                    raise
                raise InputError(
                    f"a trial that the space allows cannot be: {error}",
                    file="search.space",
                    got=", ".join(f"{key}={told(value)}" for key, value in point.items()),
                    fix="Leave it out of the space",
                ) from error

    def _corners(self) -> Iterator[dict[str, Any]]:
        """All combinations of extremes; of too many, each pair of values beside the first of all others."""
        extremes = {key: drawn.extremes for key, drawn in self.distributions.items()}
        if math.prod(len(values) for values in extremes.values()) <= _MOST_CORNERS:
            for combined in itertools.product(*extremes.values()):
                yield dict(zip(extremes, combined, strict=True))
            return
        first = {key: values[0] for key, values in extremes.items()}
        for one, other in itertools.combinations(extremes, 2):
            for a, b in itertools.product(extremes[one], extremes[other]):
                yield {**first, one: a, other: b}


def told(value: Any) -> str:
    """A value in as few characters as tell it from others: `{kind: step, decay: 0.5}`, `0.00213`."""
    if isinstance(value, float):
        return f"{value:.{_SHORT_DIGITS}g}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {told(below)}" for key, below in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(told(item) for item in value) + "]"
    return str(value)


def short(point: Point) -> dict[str, str]:
    """A point for a table: last parts of names; of a mapping its `kind`, where it has one, and the rest."""
    shown = {}
    for key, value in point.items():
        name = key.rpartition(".")[2]
        name = key if name in shown or name.isdecimal() else name
        if isinstance(value, Mapping) and "kind" in value:
            rest = {below: inner for below, inner in value.items() if below not in ("kind", "final_lr")}
            shown[name] = " ".join([str(value["kind"]), *(told(inner) for inner in rest.values())])
        else:
            shown[name] = told(value)
    return shown


def same(one: Any, other: Any) -> bool:
    """Whether two values are one, also where one has been through JSON."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    """Put a value in its place. Raises `InputError` where the recipe has no such place."""
    *parents, last = key.split(".")
    place: Any = content
    for part in parents:
        if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            if place.get(part) is None:  # absent, or an optional section that was off
                place[part] = {}
            place = place[part]
        else:
            raise InputError("no such place in a recipe", file="search.space", got=key)
    if isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = copy.deepcopy(value)
    elif isinstance(place, dict):
        place[last] = copy.deepcopy(value)
    else:
        raise InputError("no such place in a recipe", file="search.space", got=key)


def _drawn(distribution: Distribution, rng: np.random.Generator) -> Any:
    if distribution.choice is not None:
        return distribution.choice[int(rng.integers(len(distribution.choice)))]
    if distribution.integers is not None:
        low, high = distribution.integers
        return int(rng.integers(low, high, endpoint=True))
    assert distribution.range is not None
    low, high = distribution.range
    if distribution.loguniform is not None:
        return float(math.exp(rng.uniform(math.log(low), math.log(high))))
    return float(rng.uniform(low, high))


def _spread(distribution: Distribution, number: int) -> Sequence[Any]:
    if distribution.choice is not None:
        return distribution.choice
    assert distribution.range is not None
    low, high = distribution.range
    if distribution.loguniform is not None:
        return [float(value) for value in np.geomspace(low, high, number)]
    values = np.linspace(low, high, number)
    if distribution.integers is not None:
        return sorted({round(float(value)) for value in values})
    return [float(value) for value in values]
