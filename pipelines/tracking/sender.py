"""A thread that sends a run to MLflow: what the server did not take is sent again, in order, until it did.

Nothing of the driver waits for it, so that a server that is away, or hangs, costs neither training nor Ctrl-C
a second. Sending twice does no harm: MLflow keeps one of two equal rows.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.tracking.client import quick_requests, reason
from pipelines.tracking.opening import Opening, dataset_inputs
from pipelines.tracking.rows import Row, rows_from, within
from pipelines.tracking.state import TrackingState

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

log = logging.getLogger(__name__)

_EVERY_S, _LONGEST_PAUSE_S = 1.0, 15.0
_KEY_TAG = "nafnet.run_key"
# MLflow's limits.
_MOST_METRICS, _MOST_PARAMS = 1000, 100
_PARAM_CHARS, _TAG_CHARS = 6000, 8000
_FEWEST_METRICS = 50


class Sender:
    """Sends one run, from `start` to `end`."""

    def __init__(
        self, client: MlflowClient, state: TrackingState, journal: Path, pictures: Path, opening: Opening
    ) -> None:
        self._client, self._state, self._journal, self._pictures = client, state, journal, pictures
        self._opening, self._uri = opening, str(client.tracking_uri)
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._is_open = self._is_away = False
        self._most_metrics, self._num_sent = _MOST_METRICS, 0
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self) -> None:
        """Begin to send. A new run is made in MLflow first, here: its server was just seen to answer.

        Raises:
            MlflowException: it does not.
        """
        self._state.save(ending=None, ended=False, sent=within(self._journal, self._state.now.sent))
        if self._state.now.run_id is None:
            with quick_requests():
                self._create()
        self._thread.start()

    def end(self, wait_s: float) -> None:
        """Send the rest, the ending in the state included, for at most `wait_s`; then stop."""
        self._wake.set()
        self._thread.join(wait_s)
        self._stopping.set()
        self._wake.set()
        self._state.close()

    def _work(self) -> None:
        pause = _EVERY_S
        with quick_requests():
            while not self._stopping.is_set():
                pause = _EVERY_S if self._try() else min(2 * pause, _LONGEST_PAUSE_S)
                if self._state.now.ended:
                    return
                self._wake.wait(_EVERY_S if self._state.now.ending else pause)
                self._wake.clear()

    def _try(self) -> bool:
        """Send what there is; whether the server took it all. One line when it goes away, one when back."""
        try:
            self._send()
        # Whatever it is, of sockets, data bases or files: without this thread the rest would be lost.
        except Exception as error:
            # It may be the size that is too much for the time that a call has, or somebody deleted the run.
            self._most_metrics = max(_FEWEST_METRICS, self._most_metrics // 2)
            self._is_open = False
            if not self._is_away:
                log.warning(
                    "the tracking server takes nothing (%s): training goes on, and what it misses is sent "
                    "when it is back",
                    reason(error, self._uri),
                )
                self._is_away, self._num_sent = True, 0
            return False
        if self._is_away:
            log.warning("the tracking server is back, and has the %d rows it missed", self._num_sent)
            self._is_away = False
        return True

    def _send(self) -> None:
        # First: when the end is told, all rows before it are in the journal, but they may come meanwhile.
        ending = self._state.now.ending
        if not self._is_open:
            self._open()
            self._is_open = True
        while rows := rows_from(self._journal, self._state.now.sent):
            for batch in self._batches(rows):
                self._send_rows(batch)
        for picture in new_pictures(self._pictures, self._state.now.sent_picture):
            self._client.log_artifact(self._run_id, str(picture), artifact_path="pictures")
            self._state.save(sent_picture=picture.name)
        if ending is None:
            return
        for file in map(Path, ending.files):
            if file.exists():
                folder = "pictures" if file.suffix == ".png" else None
                self._client.log_artifact(self._run_id, str(file), artifact_path=folder)
        self._client.set_terminated(self._run_id, status=ending.status, end_time=ending.time_ms)
        self._state.save(ended=True)

    @property
    def _run_id(self) -> str:
        run_id = self._state.now.run_id
        assert run_id is not None
        return run_id

    def _create(self) -> None:
        """Make the MLflow run, or find the one whose making was not answered."""
        opening, key = self._opening, self._state.now.key
        experiment_id = opening.experiment_id()
        if key is None:
            key = uuid.uuid4().hex
            self._state.save(key=key)
            found = []
        else:
            found = self._client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{key}'", max_results=1)
        tags = {_KEY_TAG: key, **opening.tags}
        run = found[0] if found else self._client.create_run(experiment_id, run_name=opening.name, tags=tags)
        self._state.save(run_id=run.info.run_id)

    def _open(self) -> None:
        """Complete what is told before the first row; begin anew where the server has not this run."""
        from mlflow.entities import Param, RunTag

        if self._state.now.run_id is None:
            self._create()
        run = self._run()
        if run is None:
            log.warning("the tracking server has no run %s: it is sent anew, whole", self._state.now.run_id)
            self._state.save(run_id=None, key=None, opened=False, sent=0, sent_picture="")
            self._create()
            run = self._client.get_run(self._run_id)
        params = [
            Param(key, str(value)[:_PARAM_CHARS])
            for key, value in self._opening.params.items()
            if key not in run.data.params
        ]
        for start in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MOST_PARAMS])
        tags = [RunTag(key, value[:_TAG_CHARS]) for key, value in self._opening.tags.items()]
        self._client.log_batch(self._run_id, tags=tags)
        known = run.inputs.dataset_inputs if run.inputs else []
        have = {(entry.dataset.name, entry.dataset.digest) for entry in known}
        inputs = [
            entry
            for entry in dataset_inputs(self._opening.data_sets)
            if (entry.dataset.name, entry.dataset.digest) not in have
        ]
        if inputs:
            self._client.log_inputs(self._run_id, datasets=inputs)
        self._client.update_run(self._run_id, status="RUNNING")
        self._state.save(opened=True)

    def _run(self) -> Run | None:
        """The run as the server has it; None where it has not, or has it deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(self._run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows as calls take them; never a part of a row, so that `sent` can move on after each."""
        batch: list[Row] = []
        num_metrics = 0
        for row in rows:
            if batch and num_metrics + len(row.metrics) > self._most_metrics:
                yield batch
                batch, num_metrics = [], 0
            batch.append(row)
            num_metrics += len(row.metrics)
        yield batch

    def _send_rows(self, rows: Sequence[Row]) -> None:
        metrics = [metric for row in rows for metric in _metrics(row)]
        # A row of a thousand ranks is more than one call takes.
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + _MOST_METRICS])
        self._num_sent += len(rows)
        self._most_metrics = min(_MOST_METRICS, 2 * self._most_metrics)
        self._state.save(sent=rows[-1].end)


def new_pictures(folder: Path, newest: str) -> list[Path]:
    """Pictures of validations after `newest`, oldest first; their names are numbers of samples."""
    return [path for path in sorted(folder.glob("0*.png")) if path.name > newest]


def _metrics(row: Row) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(key, value, int(row.time_s * 1000), row.samples) for key, value in row.metrics.items()]
