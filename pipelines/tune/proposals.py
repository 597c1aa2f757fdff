"""Which point is tried next: at random, along a grid, or by Optuna's estimator.

Each is a function of the recipe's seed and of what the ledger holds, so that a search that was killed goes on
as it would have, and two trials of one number never differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.config import Distribution
from pipelines.tune.ledger import Trial, TrialLedger
from pipelines.tune.space import Space, same

if TYPE_CHECKING:
    import optuna


def propose(searcher: str, space: Space, ledger: TrialLedger, *, seed: int) -> dict[str, Any] | None:
    """The point of the next trial; None where a grid is through.

    Args:
        searcher: `random`, `grid` or `optuna`.
        space: what is drawn from.
        ledger: the trials so far; the next has the number after theirs.
        seed: of the search.
    """
    rng = np.random.default_rng([seed, len(ledger.trials)])
    match searcher:
        case "grid":
            points = space.grid()
            # In an order of its own: along the grid, ASHA would compare neighbours first.
            order = np.random.default_rng(seed).permutation(len(points))
            return points[order[len(ledger.trials)]] if len(ledger.trials) < len(points) else None
        case "optuna":
            return _estimated(space, ledger, seed=int(rng.integers(2**31)))
    return space.draw(rng)


def _estimated(space: Space, ledger: TrialLedger, *, seed: int) -> dict[str, Any]:
    """A point from Optuna, in a study that is made anew from the ledger: it keeps nothing of its own."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # What runs counts as bad, so that trials at one time do not all try one place.
        sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    distributions = {key: _for_optuna(drawn) for key, drawn in space.distributions.items()}
    for trial in ledger.trials.values():
        if trial.outcome != "failed":
            study.add_trial(_told(trial, space, distributions))
    params = study.ask(distributions).params
    return {
        key: params[key] if drawn.choice is None else drawn.choice[params[key]]
        for key, drawn in space.distributions.items()
    }


def _told(
    trial: Trial, space: Space, distributions: dict[str, optuna.distributions.BaseDistribution]
) -> optuna.trial.FrozenTrial:
    """A trial as Optuna takes it: of one that was stopped early, the last score, as good as it ever was."""
    import optuna

    is_over = trial.outcome is not None and bool(trial.scores)
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.COMPLETE if is_over else optuna.trial.TrialState.RUNNING,
        value=trial.psnr_db if is_over else None,
        params={
            key: trial.point[key] if drawn.choice is None else _number_of(trial.point[key], drawn.choice)
            for key, drawn in space.distributions.items()
        },
        distributions=distributions,
    )


def _number_of(value: Any, choices: Sequence[Any]) -> int:
    """Which choice a value is; it has been through JSON."""
    return next(number for number, choice in enumerate(choices) if same(choice, value))


def _for_optuna(drawn: Distribution) -> optuna.distributions.BaseDistribution:
    import optuna

    if drawn.choice is not None:  # by number: it takes no mappings
        return optuna.distributions.CategoricalDistribution(range(len(drawn.choice)))
    if drawn.integers is not None:
        return optuna.distributions.IntDistribution(*drawn.integers)
    assert drawn.range is not None
    return optuna.distributions.FloatDistribution(*drawn.range, log=drawn.loguniform is not None)
