"""A search: many training runs, of which the scheduler stops what lags behind, and one winner.

    nafnet tune --config search_mobile --data store/ --val test-store/ --name first
    nafnet tune --config search_mobile --data store/ --val test-store/ --set search.trials=4  # minutes

`space.py` says what may be tried and `proposals.py` what is tried next; `queue.py` and `schedulers.py` are
Ray Tune's searcher and scheduler; `actor.py` runs an attempt at a training run for each trial, and
`trials.py` looks after them where the command runs. What is known of the trials is in `ledger.py`'s file,
from which a killed search goes on. `winner.py` trains and registers the best; `driver.py` holds it together.
"""

from pipelines.tune.driver import Progress, TuneResult, run
from pipelines.tune.winner import Winner

__all__ = ["Progress", "TuneResult", "Winner", "run"]
