"""A search: a recipe whose values may be drawn, and how they are drawn and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from pipelines.config.base import Section
from pipelines.config.sections import BudgetSection, RunConfig

_KINDS = ("choice", "uniform", "loguniform", "integers")


class Distribution(Section):
    """What one value is drawn from; exactly one of the four."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """Equally likely. A mapping or a list is the whole value of its key."""
    uniform: tuple[float, float] | None = None
    """Any number from the first to the second."""
    loguniform: tuple[float, float] | None = None
    """The same, equally likely in each decade."""
    integers: tuple[int, int] | None = None
    """Whole numbers, both ends among them."""

    @property
    def kind(self) -> str:
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def range(self) -> tuple[float, float] | None:
        """Ends of a range of numbers; None of a choice."""
        return self.uniform or self.loguniform or self.integers

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values that decide whether all of them are allowed: a range's ends, or every choice."""
        return self.choice if self.choice is not None else self.range or ()

    @model_validator(mode="after")
    def _exactly_one(self) -> Distribution:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(_KINDS)}; got {', '.join(given) or 'none'}")
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"a range from less to more; got {list(self.range)}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform above 0; got {list(self.loguniform)}")
        return self


def _flat(space: Any) -> Any:
    """`{optim: {lr: {loguniform: …}}}` and `{optim.lr: {loguniform: …}}` are the same."""
    if not isinstance(space, Mapping):
        return space
    flat: dict[str, Any] = {}
    for key, value in space.items():
        if isinstance(value, Distribution) or (isinstance(value, Mapping) and set(value) & set(_KINDS)):
            flat[str(key)] = value
        elif isinstance(value, Mapping):
            flat |= {f"{key}.{below}": found for below, found in _flat(value).items()}
        else:
            kinds = ", ".join(f"{{{kind}: […]}}" for kind in _KINDS)
            raise ValueError(f"{key} says how it is drawn, as one of {kinds}; got {value!r}")
    return flat


class SearchSection(Section):
    """What is searched, how, and for how long."""

    space: Annotated[dict[str, Distribution], BeforeValidator(_flat), Field(min_length=1)]
    """Dotted name of a recipe's value → what it is drawn from."""
    trials: PositiveInt = 16
    """Trials that end well, finished or stopped early. A grid has as many as it has points, at most."""
    searcher: Literal["random", "grid", "optuna"] = "random"
    """`optuna` is its tree-structured Parzen estimator (Bergstra et al. 2011), told the last scores."""
    grid_points: int = Field(4, ge=2)
    """Of a range, in a grid."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Who is stopped early: ASHA (Li et al. 2020), the median stopping rule (Golovin et al. 2017), nobody."""
    reduction_factor: int = Field(4, ge=2)
    """ASHA: of the trials at a rung, one in so many goes on."""
    rungs: int = Field(3, ge=2)
    """ASHA: scores of a trial that goes to the end. The last one is at the whole budget, each one before it
    at a `reduction_factor`th of the next."""
    grace_share: float = Field(0.2, ge=0, lt=1)
    """Median rule: part of the budget before which nobody is stopped."""
    max_concurrent: PositiveInt | None = None
    """Trials at a time; None for as many as the cluster has room for, now and later."""
    max_failed: int = Field(5, ge=0)
    """Trials that may fail, each being replaced, before the search gives up."""
    retrain: BudgetSection | None = None
    """Train the best recipe once more, for this budget. None takes the trial itself for the winner."""
    register_winner: bool = True
    """Register the winner's weights, which makes them the candidate."""

    @property
    def rung_shares(self) -> tuple[float, ...]:
        """ASHA's rungs in parts of the budget."""
        return tuple(self.reduction_factor**-power for power in reversed(range(self.rungs)))

    @property
    def num_trials(self) -> int:
        """How many trials are wanted; of a grid, no more than it has points."""
        return min(self.trials, self.num_grid_points) if self.searcher == "grid" else self.trials

    @property
    def num_grid_points(self) -> int:
        return math.prod(self.points_of(drawn) for drawn in self.space.values())

    def points_of(self, drawn: Distribution) -> int:
        """Values that a grid takes of one distribution."""
        if drawn.choice is not None:
            return len(drawn.choice)
        if drawn.integers is not None:
            return min(self.grid_points, drawn.integers[1] - drawn.integers[0] + 1)
        return self.grid_points


class SearchConfig(RunConfig):
    """A search: a run's recipe, and what of it is drawn anew for each trial."""

    name: str = Field("search", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    search: SearchSection

    @property
    def base(self) -> RunConfig:
        """The recipe without the search."""
        return RunConfig.model_validate(self.model_dump(mode="json", exclude={"search"}))

    @model_validator(mode="after")
    def _is_fair(self) -> SearchConfig:
        if self.budget.minutes is not None:
            raise ValueError(
                "a search needs `budget` in samples or epochs: minutes give each trial other samples"
            )
        return self
