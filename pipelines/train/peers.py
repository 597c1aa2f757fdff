"""Which worker is missing when a collective fails: the others' messages name sockets, not ranks."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator

import torch.distributed as dist

_ROLL_CALL_S = 10.0


class PeerLostError(RuntimeError):
    """A collective failed since another worker is gone or stuck."""


class Peers:
    """The group of workers, and a second connection among them for a roll call."""

    def __init__(self) -> None:
        self._group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            # Rank 0 reports who is missing; the others must not give up on rank 0 while it waits for them.
            timeout = datetime.timedelta(seconds=3 * _ROLL_CALL_S)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    @contextlib.contextmanager
    def named(self, *, first: Callable[[], None]) -> Iterator[None]:
        """Have failures of collectives in the block name the rank that is missing; `first` is called before.

        Raises:
            PeerLostError: with the ranks that do not answer, in the place of the collective's own error.
        """
        try:
            yield
        except RuntimeError as error:
            if self._group is None or not _is_of_collective(error):
                raise
            first()
            raise PeerLostError(self._missing()) from error

    def _missing(self) -> str:
        try:
            timeout = datetime.timedelta(seconds=_ROLL_CALL_S)
            dist.monitored_barrier(self._group, timeout=timeout, wait_all_ranks=True)
        except RuntimeError as error:
            text = _first_line(error)
            if "failed to pass" in text:  # "[Rank 0]: Ranks 1, 2 failed to pass monitoredBarrier in 10000 ms"
                ranks = text.partition("Ranks")[2].partition("failed")[0].strip()
                return f"rank {ranks} does not answer"
            if "from rank 0" in text and "Timed out" in str(error):
                return "rank 0 does not answer"
            return "another rank is gone"
        return "a collective failed, though all ranks answer"


def _is_of_collective(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].rpartition("]")[2].strip() or str(error)
