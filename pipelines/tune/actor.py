"""What Ray Tune runs for each trial: an attempt at a training run, whose scores it reports.

How many there are at a time is the queue's affair (`queue.py`).
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from pathlib import Path
from typing import Any

from ray import tune

from nafnet_core import CapabilityError, NAFNetError
from pipelines.config import RunConfig
from pipelines.scratch import scratch_folder
from pipelines.storage import LocalFolder
from pipelines.tracking import Row
from pipelines.tracking.rows import rows_from
from pipelines.train.attempt import attempt, storage_of
from pipelines.train.files import METRICS, RESULT, STOP
from pipelines.train.mirror import Mirror
from pipelines.tune.schedulers import METRIC, NUMBER, SAMPLES, STEP

STATE, ERROR = "state", "error"

_ACTOR_BYTES = 2**20
_LOOK_EVERY_S = 0.2
# For a checkpoint to be written, and sent.
_ENDING_LIMIT_S = 600.0


class TrialActor(tune.Trainable):
    """One trial after the other; a warm one begins as soon as its workers do.

    Its configuration: `number`; `recipe`, a `RunConfig` as JSON; `run_dir`, on the driver's node; `steps`, of
    the scheduler's axis in the whole budget; `told`, samples of the last score that is known already.
    """

    # A name that Tune's own class has not: it keeps plenty under plain ones.
    _attempt_of_trial: _Attempt

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """No CPU: its workers have placement groups of their own. Ray Tune wants some resource."""
        return tune.PlacementGroupFactory([{"memory": _ACTOR_BYTES}])

    def setup(self, config: dict[str, Any]) -> None:
        self._attempt_of_trial = _Attempt(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._attempt_of_trial.close()
        self._attempt_of_trial = _Attempt(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next score, or for the end."""
        return self._attempt_of_trial.next()

    def cleanup(self) -> None:
        self._attempt_of_trial.close()


class _Attempt:
    """An attempt at a trial's run, on a thread that begins with the first question."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._config = RunConfig.model_validate_json(told["recipe"])
        self._number, self._steps, self._told = told["number"], told["steps"], told["told"]
        self._folders = contextlib.ExitStack()
        self._mirror: Mirror | None = None
        if self._config.checkpoint.storage is None:
            self._run_dir = Path(told["run_dir"])
            self._storage = LocalFolder(self._run_dir)
        else:  # this node need not see the driver's disk
            self._run_dir = self._folders.enter_context(scratch_folder())
            self._storage, self._mirror = storage_of(self._config, self._run_dir)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._read, self._total = 0, 0

    def next(self) -> dict[str, Any]:
        """The next score, or the end, as a result of Tune's."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="trial", daemon=True)
            self._thread.start()
        while True:
            is_over = not self._thread.is_alive()  # before the journal is read, so that nothing is missed
            row = self._next_score()
            if row is not None:
                if not math.isfinite(row.metrics["val/psnr_db"]):
                    return self._end("failed", "diverged: the validation's PSNR is not a number")
                return self._score(row)
            if is_over:
                break
            time.sleep(_LOOK_EVERY_S)
        if self._error is None:
            return self._end("finished" if (self._run_dir / RESULT).exists() else "interrupted")
        line = str(self._error).splitlines()[0] if str(self._error) else ""
        is_ours = isinstance(self._error, NAFNetError)
        return self._end("failed", line if is_ours else f"{type(self._error).__name__}: {line}")

    def close(self) -> None:
        """Have the workers save and end, and wait for that."""
        if self._thread is not None and self._thread.is_alive():
            if self._mirror is None:
                (self._run_dir / STOP).touch()
            else:
                self._mirror.ask_to_stop()
            self._thread.join(_ENDING_LIMIT_S)
            if self._thread.is_alive():
                raise CapabilityError("a trial's workers do not stop", file=self._run_dir)
        self._folders.close()

    def _train(self) -> None:
        try:
            self._pull()
            if not (self._run_dir / RESULT).exists():  # else the search was killed before it heard of it
                attempt(self._config, self._run_dir, self._storage, None, self._pull)
        except BaseException as error:  # for `next` to tell
            self._error = error

    def _pull(self) -> None:
        if self._mirror is not None:
            with contextlib.suppress(CapabilityError):  # a server that fails for a while
                self._mirror.pull()

    def _next_score(self) -> Row | None:
        while rows := rows_from(self._run_dir / METRICS, self._read):
            for row in rows:
                self._read = row.end
                self._total = int(row.metrics.get("total_samples", self._total))
                if "val/psnr_db" in row.metrics and row.samples > self._told:
                    return row
        return None

    def _score(self, row: Row) -> dict[str, Any]:
        self._told = row.samples
        share = row.samples / self._total
        return {
            NUMBER: self._number,
            SAMPLES: row.samples,
            STEP: int(share * self._steps + 1e-6),
            METRIC: row.metrics["val/psnr_db"],
        }

    def _end(self, state: str, error: str | None = None) -> dict[str, Any]:
        return {NUMBER: self._number, STATE: state, ERROR: error, "done": True}
