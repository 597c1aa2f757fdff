"""One run at a time in a folder.

On a disk that is a file lock: the system gives it up with the process that holds it.

A bucket has no locks. There a run writes a note of its own and then looks for notes of others; storage that
shows a file to everybody once it is written (as S3, GCS and Azure do) shows the later of two the earlier's
note, so at most one goes on. Of two that begin in the same moment both may be refused. The note is written
anew every few seconds. One that is not was left by a run that was killed: on the same machine that is seen at
once, from another one after two minutes, by the storage's own clock. A holder that was cut off for so long
finds its note gone when it comes back, and stops; what it had under way are shards of the same pairs.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nafnet_core import InputError, NAFNetError
from pipelines.files import locked
from pipelines.processes import is_dead, machine_id, this_process
from pipelines.storage import LocalFolder, RemoteFolder

log = logging.getLogger(__name__)

_LOCK = "lock"
_PREFIX = "run-"
_RENEW_S = 10.0
# Longer than a storage that fails is waited for, the S3 client's own attempts included: some 80 s.
EXPIRE_S = 120.0
# Notes of this process that hold.
_OURS: set[str] = set()


@contextmanager
def held(store: LocalFolder | RemoteFolder, notes: str) -> Iterator[Callable[[], None]]:
    """Hold a store, by what lies in its folder `notes`; yields a check that it is still held.

    Raises:
        InputError: another run holds it, or, from the check, has taken it over.
    """
    if isinstance(store, LocalFolder):
        with locked(store.path / notes / _LOCK):
            yield lambda: None
        return
    lease = _Lease(store, store.below(notes))
    lease.take()
    renewing = threading.Thread(target=lease.renew_for_ever, name="lease", daemon=True)
    renewing.start()
    try:
        yield lease.check
    finally:
        lease.ended.set()
        renewing.join()
        lease.give_up()


class _Lease:
    def __init__(self, store: RemoteFolder, place: RemoteFolder) -> None:
        self._store, self._place = store, place
        self._name = f"{_PREFIX}{uuid.uuid4().hex}.json"
        self._is_lost = False
        self.ended = threading.Event()

    def take(self) -> None:
        """Write the note, unless another run has one. Raises `InputError`."""
        _OURS.add(self._name)
        try:
            self._write()
            written = self._place.written_at()
            now = written.get(self._name)
            for name, then in written.items():
                if name.startswith(_PREFIX) and name != self._name:
                    self._refuse_if_alive(name, None if now is None or then is None else now - then)
        except BaseException:
            self.give_up()
            raise

    def renew_for_ever(self) -> None:
        while not self.ended.wait(_RENEW_S):
            try:
                if self._place.size(self._name) is None:
                    self._is_lost = True
                    return
                self._write()
            except (NAFNetError, OSError) as error:
                log.warning("the note of this run was not renewed: %s", error)

    def check(self) -> None:
        if self._is_lost:
            raise InputError(
                "another run has taken this folder over, as this one gave no sign for two minutes",
                file=self._store,
                fix="Wait for the other one",
            )

    def give_up(self) -> None:
        try:
            self._place.delete(self._name)
        except (NAFNetError, OSError) as error:
            log.warning("the note of this run stays behind: %s", error)
        finally:
            _OURS.discard(self._name)

    def _write(self) -> None:
        self._place.write(self._name, json.dumps(this_process()).encode())

    def _refuse_if_alive(self, name: str, age_s: float | None) -> None:
        """Delete another run's note if that run is over. Raises `InputError` where it is not."""
        try:
            owner = json.loads(self._place.read(name))
        except FileNotFoundError:  # over this very moment
            return
        except ValueError:
            owner = {}
        is_ours = owner.get("machine") == machine_id() and owner.get("pid") == os.getpid()
        if (name not in _OURS if is_ours else is_dead(owner)) or (age_s is not None and age_s > EXPIRE_S):
            self._place.delete(name)
            return
        if age_s is None:
            fix = f"Wait for it; if it was killed, delete {self._place.at(name)}"
        else:
            fix = f"Wait for it; if it was killed, run this again in {max(1, round(EXPIRE_S - age_s))} s"
        raise InputError(
            "another run is at work in this folder",
            file=self._store,
            got=f"process {owner.get('pid')} on {owner.get('host')}",
            fix=f"{fix}, or choose another --out",
        )
