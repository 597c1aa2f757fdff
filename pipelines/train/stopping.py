"""Ctrl-C and SIGTERM as a request that workers look for, so that they stop with their state saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


class Request:
    """Whether, and how, somebody asked to stop."""

    exit_code: int | None = None


@contextmanager
def stop_requests(flag: Path) -> Iterator[Request]:
    """Turn the first SIGINT or SIGTERM into a file that the workers look for; a second one ends at once."""
    request = Request()

    def handle(number: int, frame: object) -> None:
        if request.exit_code is not None:
            raise KeyboardInterrupt
        request.exit_code = 128 + number
        flag.touch()
        log.warning("stopping: the state is being saved (once more to stop without)")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        flag.unlink(missing_ok=True)
