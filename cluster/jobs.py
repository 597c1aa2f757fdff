"""Commands that a cluster runs by itself: sent, looked at and stopped through Ray's dashboard.

A job's program is our command line on the cluster's head, with our code sent along. It needs neither this
machine nor the terminal that it was sent from.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.code import stage_for_jobs, zipped_bytes
from nafnet_core.errors import CapabilityError, InputError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Ray's own 3 s are not enough for workers to end their step and save.
_STOP_WAIT_S = 300
_SHOWN = 160  # characters of what Ray says
_COMMAND = "nafnet"  # the key under which a job tells its command
_FORWARD = "Is its port forwarded here? By `ray dashboard FILE`, `kubectl port-forward` or `ssh -L`"
_CHATTERING = (
    "dashboard.modules.dashboard_sdk",
    "dashboard.modules.job.sdk",
    "_private.runtime_env.packaging",
)
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What Ray knows of a job."""

    id: str
    status: str
    """PENDING, RUNNING, or one of SUCCEEDED, FAILED, STOPPED."""
    command: str
    started_ms: int | None
    ended_ms: int | None
    message: str

    @property
    def is_over(self) -> bool:
        return self.status in _OVER


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that was sent."""

    id: str
    code_bytes: int
    """Of what was sent, as Ray packed it."""


class Jobs:
    """The jobs of one cluster.

    Args:
        address: the dashboard's, `http(s)://HOST:PORT`.

    Raises:
        InputError: not such an address.
        CapabilityError: nobody answers there, `ray[default]` is missing, or the token is.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        if not address.startswith(("http://", "https://")):
            raise InputError(
                "not the address of a dashboard, which takes jobs",
                file=address,
                expected="http://HOST:8265",
                fix=_FORWARD,
            )
        self._address = address
        with self._explained():
            from ray.job_submission import JobSubmissionClient

            for part in _CHATTERING:
                logging.getLogger(f"ray.{part}").setLevel(logging.WARNING)
            # They would win over what was asked for.
            with _unset("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
                self._client: JobSubmissionClient = JobSubmissionClient(address)

    def submit(
        self,
        arguments: Sequence[str],
        *,
        name: str,
        files: Mapping[str, Path],
        workspace: str | None,
        environment: Mapping[str, str],
    ) -> Submitted:
        """Have the cluster run `nafnet ARGUMENTS`.

        Args:
            arguments: of the command line. None may hold a secret: Ray shows them to all.
            name: of the job; none on the cluster may have it.
            files: sent along, by the name under which the arguments refer to them.
            workspace: folder on the cluster; None takes `NAFNET_WORKSPACE` of its head, else a folder in its
                home.
            environment: for the program; no secrets here either.
        """
        place = shlex.quote(workspace) if workspace else '"${NAFNET_WORKSPACE:-$HOME/nafnet-workspace}"'
        program = f"NAFNET_WORKSPACE={place} exec python -m pipelines {shlex.join(arguments)}"
        with self._explained(), tempfile.TemporaryDirectory(prefix="nafnet-job-") as temporary:
            folder = Path(temporary)
            stage_for_jobs(folder)
            for sent_as, file in files.items():
                shutil.copyfile(file, folder / sent_as)
            self._client.submit_job(
                entrypoint=program,
                submission_id=name,
                metadata={_COMMAND: shlex.join(arguments)},
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), **environment},
                },
            )
            return Submitted(id=name, code_bytes=zipped_bytes(folder))

    def all(self) -> list[Job]:
        """All jobs that were submitted, the newest first."""
        with self._explained():
            found = [self._job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started_ms or 0, reverse=True)

    def find(self, job_id: str | None) -> Job:
        """One job; the newest where no ID is given. Raises `InputError` where there is none."""
        jobs = self.all()
        if not jobs:
            raise InputError("this cluster has no jobs", file=self._address, fix="Send one: `cluster submit`")
        if job_id is None:
            return jobs[0]
        for job in jobs:
            if job.id == job_id:
                return job
        raise InputError(
            "this cluster has no such job",
            file=self._address,
            expected=", ".join(job.id for job in jobs[:5]),
            got=job_id,
        )

    def log(self, job: Job) -> str:
        """What a job has printed until now; nothing where its log cannot be had."""
        with self._explained():
            try:
                return self._client.get_job_logs(job.id)
            except RuntimeError:
                return ""

    def follow(self, job: Job) -> Iterator[str]:
        """What it prints, as it comes, until its end."""
        pieces = self._client.tail_job_logs(job.id)
        loop = asyncio.new_event_loop()
        try:
            with self._explained():
                while True:
                    try:
                        yield loop.run_until_complete(anext(pieces))
                    except StopAsyncIteration:
                        return
        finally:
            # Ray's generator does not like to be left early, and says so when it is collected.
            with suppress(RuntimeError):
                loop.run_until_complete(pieces.aclose())
            loop.close()

    def stop(self, job: Job) -> None:
        """Ask it to save its state and end, as Ctrl-C does; Ray kills it after five minutes."""
        with self._explained():
            self._client.stop_job(job.id)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Ray's and its libraries' errors, in one line."""
        from ray.exceptions import AuthenticationError

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except AuthenticationError as error:
            raise CapabilityError(
                "the cluster wants its token",
                file=self._address,
                fix="Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, or put it into ~/.ray/auth_token",
            ) from error
        except (ImportError, ConnectionError, OSError, RuntimeError) as error:
            line = " ".join(str(error).split())
            if "already exists" in line:
                raise InputError(
                    "the cluster has a job of this name", fix="Give another one with --job"
                ) from error
            is_missing = isinstance(error, ImportError) or "ray[default]" in line
            is_away = isinstance(error, (ConnectionError, OSError))
            said = "no dashboard answers there" if is_away else "the cluster's dashboard does not take this"
            raise CapabilityError(
                "jobs need Ray's dashboard" if is_missing else said,
                file=self._address,
                got=_shortened(line),
                fix="pip install 'nafnet-ray[cluster]', here and on the nodes" if is_missing else _FORWARD,
            ) from error

    @staticmethod
    def _job(details: Any) -> Job:
        return Job(
            id=details.submission_id,
            status=details.status.value,
            command=(details.metadata or {}).get(_COMMAND) or details.entrypoint,
            started_ms=details.start_time,
            ended_ms=details.end_time,
            # Ray repeats the log's end in it.
            message=" ".join((details.message or "").partition(", last available logs")[0].split()),
        )


def _shortened(line: str) -> str:
    return line if len(line) <= _SHOWN else line[:_SHOWN].rpartition(" ")[0] + " …"


@contextmanager
def _unset(*variables: str) -> Iterator[None]:
    """Without these environment variables, for a while."""
    before = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
