"""What Ray Tune runs for each trial: an attempt at a training run, whose scores it reports.

The actor takes hardly any CPU. Training workers have placement groups of their own, as under `nafnet train`;
how many trials there are at a time is the queue's affair (`queue.py`).
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
ACTOR_CPUS = 0.01

_LOOK_EVERY_S = 0.2
# For a checkpoint to be written, and sent.
_ENDING_LIMIT_S = 600.0


class TrialActor(tune.Trainable):
    """One trial after the other; a warm one begins as soon as its workers do.

    Its configuration: `number`; `recipe`, a `RunConfig` as JSON; `run_dir`, on the driver's node; `steps`, of
    the scheduler's axis in the whole budget; `told`, samples of the last score that is known already.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._folders = contextlib.ExitStack()
        self._thread: threading.Thread | None = None
        self._prepare(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._wait()
        self._prepare(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next score, or for the end."""
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
        if isinstance(self._error, NAFNetError):
            return self._end("failed", str(self._error).splitlines()[0])
        raise self._error

    def cleanup(self) -> None:
        self._wait()
        self._folders.close()

    def _prepare(self, config: dict[str, Any]) -> None:
        self._folders.close()
        self._config = RunConfig.model_validate_json(config["recipe"])
        self._number, self._steps, self._told = config["number"], config["steps"], config["told"]
        self._mirror: Mirror | None = None
        if self._config.checkpoint.storage is None:
            self._run_dir = Path(config["run_dir"])
            self._storage = LocalFolder(self._run_dir)
        else:  # this node need not see the driver's disk
            self._run_dir = self._folders.enter_context(scratch_folder())
            self._storage, self._mirror = storage_of(self._config, self._run_dir)
        self._thread = None
        self._error: BaseException | None = None
        self._read, self._total = 0, 0

    def _train(self) -> None:
        self._pull()
        if (self._run_dir / RESULT).exists():  # of a search that was killed before it heard of it
            return
        try:
            attempt(self._config, self._run_dir, self._storage, None, self._pull)
        except BaseException as error:  # for `step` to tell
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

    def _wait(self) -> None:
        """Until the workers have stopped."""
        if self._thread is None:
            return
        if self._thread.is_alive() and self._mirror is None:
            (self._run_dir / STOP).touch()
        elif self._thread.is_alive():
            assert self._mirror is not None
            self._mirror.ask_to_stop()
        self._thread.join(_ENDING_LIMIT_S)
        if self._thread.is_alive():
            raise CapabilityError("a trial's workers do not stop", file=self._run_dir)
