"""Asking the registry: errors of MLflow's in one line, and writes that a busy SQLite gets again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from nafnet_core import CapabilityError
from pipelines.tracking import mlflow_client
from pipelines.tracking.client import reason
from pipelines.urls import public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

_Answer = TypeVar("_Answer")

_BUSY = "TEMPORARILY_UNAVAILABLE"
_BUSY_S = 15.0
_PAUSE_S = (0.05, 0.3)


@contextmanager
def asking(workspace: Workspace) -> Iterator[MlflowClient]:
    """A client on the workspace's registry.

    Raises:
        CapabilityError: MLflow cannot do what it is asked inside the block.
    """
    client = mlflow_client(workspace)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield client
    # The latter where MLflow looks at its tables for the first time.
    except (MlflowException, SQLAlchemyError) as error:
        uri = str(client.tracking_uri)
        is_refusal = isinstance(error, MlflowException) and error.error_code != _BUSY
        raise CapabilityError(
            "the registry refuses this" if is_refusal else "the registry cannot do this now",
            file=public(uri),
            got=reason(error, uri),
            fix="Run this again; if it stays so, look whether MLflow's data base or server is well",
        ) from error


def retried(call: Callable[[], _Answer]) -> _Answer:
    """The answer of a call that writes, asked again while the data base is busy, for 15 s.

    Of two that write to SQLite, which both have read before, one is refused at once, however long it would
    wait. Nothing of it is written then.
    """
    from mlflow.exceptions import MlflowException

    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            return call()
        except MlflowException as error:
            if error.error_code != _BUSY or time.monotonic() > deadline:
                raise
        time.sleep(random.uniform(*_PAUSE_S))
