"""A run whose state lies in a bucket, or where the driver does not work: each end has a folder on its disk.

    rank 0: scratch folder ──thread──▶ STORAGE/checkpoints, journal/, pictures/ …      STORAGE/stop ──▶ rank 0
    driver: STORAGE ──every second──▶ the run's folder in the workspace

So nothing else in training knows of storage. What is sent is sent again where a server fails; a checkpoint
counts once the ledger there names it, which is written after its files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from nafnet_core import CapabilityError, InputError
from pipelines.checkpoint import LEDGER, CheckpointLedger
from pipelines.files import make_folder
from pipelines.storage import LocalFolder, RemoteFolder
from pipelines.train.files import CONFIG, FAILURES, INIT, METRICS, RESULT, STOP

log = logging.getLogger(__name__)

_CHECKPOINTS, _JOURNAL, _PICTURES = "checkpoints", "journal", "pictures"
_EVERY_S = 1.0
_PIECE_BYTES = 2**18
_SEND_TIMEOUT_S = 600.0


class Mirror:
    """Storage of a run, and the folder on this node's disk that stands for it."""

    def __init__(self, storage: LocalFolder | RemoteFolder, run_dir: Path) -> None:
        self._storage, self._run_dir = storage, make_folder(run_dir)
        self._piece = self._journal_sent = self._journal_bytes()
        self._ledger_sent = b""
        self._sent: set[str] = set()

    # What a worker does

    def fetch(self) -> None:
        """Bring the newest whole checkpoint, and the journal, to this node.

        Raises:
            CapabilityError: the storage does not answer.
        """
        self.pull()
        self._piece = self._journal_sent = self._journal_bytes()
        self._sent |= {file.name for file in self._run_dir.glob(f"{_PICTURES}/*.png")}
        checkpoints = self._storage.below(_CHECKPOINTS)
        if checkpoints.size(LEDGER) is None:
            return
        ledger = CheckpointLedger(self._run_dir)
        make_folder(ledger.folder)
        (ledger.folder / LEDGER).write_bytes(checkpoints.read(LEDGER))
        for entry in reversed(ledger.entries()):
            with contextlib.suppress(FileNotFoundError):  # damaged, which the ledger finds out
                self._fetch_checkpoint(entry.folder, list(entry.digests))
            if ledger.fault(entry) is None:
                break
        self._ledger_sent = (ledger.folder / LEDGER).read_bytes()
        self._sent |= {entry.folder for entry in ledger.entries()}

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Send what the block writes, on a thread, and the rest of it at the block's end.

        Raises:
            CapabilityError: the rest could not be sent.
        """
        ended = threading.Event()
        thread = threading.Thread(target=self._keep_sending, args=(ended,), name="mirror", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(_SEND_TIMEOUT_S)
        self._send()

    def _keep_sending(self, ended: threading.Event) -> None:
        while not ended.wait(_EVERY_S):
            try:
                self._send()
                if self._storage.size(STOP) is not None:
                    (self._run_dir / STOP).touch()
            except (CapabilityError, InputError, OSError) as error:
                log.warning("the run's storage does not take what there is, trying again: %s", error)

    def _send(self) -> None:
        ledger = self._run_dir / _CHECKPOINTS / LEDGER
        content = ledger.read_bytes() if ledger.exists() else b""
        # In this order: the journal must not end before a checkpoint that is gone on from.
        self._send_journal()
        if content != self._ledger_sent:
            self._send_checkpoints(content)
        for file in sorted(self._run_dir.glob(f"{_PICTURES}/*.png")):
            self._send_once(file, self._storage.below(_PICTURES))
        if (self._run_dir / RESULT).exists():
            self._send_once(self._run_dir / RESULT, self._storage)

    def _send_once(self, file: Path, to: LocalFolder | RemoteFolder) -> None:
        if file.name not in self._sent:
            to.write(file.name, file.read_bytes())
            self._sent.add(file.name)

    def _send_journal(self) -> None:
        """Whole lines, in pieces named by where they begin: a bucket's objects do not grow.

        The newest piece is written anew until it is large: days of training are hundreds of pieces.
        """
        path = self._run_dir / METRICS
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._piece)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        end = self._piece + len(content)
        if end > self._journal_sent:
            self._storage.below(_JOURNAL).write(f"{self._piece:012d}.jsonl", content)
            self._journal_sent = end
        if len(content) >= _PIECE_BYTES:
            self._piece = end

    def _send_checkpoints(self, content: bytes) -> None:
        """Files, then the ledger that names them, then away with those that it does not name any more."""
        folder, there = self._run_dir / _CHECKPOINTS, self._storage.below(_CHECKPOINTS)
        named = {entry["folder"]: entry["digests"] for entry in json.loads(content)["entries"]}
        for name, digests in named.items():
            if name not in self._sent:
                there.below(name).make()
                for file in digests:
                    there.below(name).upload(folder / name / file, file)
                self._sent.add(name)
        there.write(LEDGER, content)
        before = json.loads(self._ledger_sent)["entries"] if self._ledger_sent else []
        for entry in before:
            if entry["folder"] not in named:
                there.below(entry["folder"]).remove()
                self._sent.discard(entry["folder"])
        self._ledger_sent = content

    # What the driver does

    def pull(self) -> None:
        """Bring what is new of the journal, pictures, notes of failures and the result.

        Raises:
            CapabilityError: the storage does not answer.
        """
        journal = self._storage.below(_JOURNAL)
        for name, size in sorted(journal.sizes().items()):
            start, have = int(Path(name).stem), self._journal_bytes()
            if start <= have < start + size:
                with (self._run_dir / METRICS).open("ab") as file:
                    file.write(journal.read(name)[have - start :])
        for below in (_PICTURES, FAILURES):
            self._pull_files(self._storage.below(below), self._run_dir / below)
        for name in (RESULT, CONFIG, INIT):
            if not (self._run_dir / name).exists() and self._storage.size(name) is not None:
                (self._run_dir / name).write_bytes(self._storage.read(name))

    def pull_checkpoints(self) -> None:
        """Bring every checkpoint that counts."""
        there = self._storage.below(_CHECKPOINTS)
        if there.size(LEDGER) is None:
            return
        folder = make_folder(self._run_dir / _CHECKPOINTS)
        content = there.read(LEDGER)
        for entry in json.loads(content)["entries"]:
            self._fetch_checkpoint(entry["folder"], list(entry["digests"]))
        (folder / LEDGER).write_bytes(content)

    def ask_to_stop(self) -> None:
        """Tell the workers."""
        self._storage.write(STOP, b"")

    def begin(self) -> None:
        """Make the storage's folder, hand it the recipe, and take back what told earlier workers to stop."""
        for name in (_CHECKPOINTS, _JOURNAL, _PICTURES, FAILURES):
            self._storage.below(name).make()
        for name in (CONFIG, INIT):
            if (self._run_dir / name).exists():
                self._storage.upload(self._run_dir / name, name)
        self._storage.delete(STOP)

    def _pull_files(self, there: LocalFolder | RemoteFolder, here: Path) -> None:
        for name in there.names():
            if not (here / name).exists():
                make_folder(here)
                (here / name).write_bytes(there.read(name))

    def _fetch_checkpoint(self, name: str, files: list[str]) -> None:
        there, here = self._storage.below(_CHECKPOINTS).below(name), self._run_dir / _CHECKPOINTS / name
        if all((here / file).exists() for file in files):
            return
        shutil.rmtree(here, ignore_errors=True)
        make_folder(here)
        for file in files:
            (here / file).write_bytes(there.read(file))

    def _journal_bytes(self) -> int:
        path = self._run_dir / METRICS
        return path.stat().st_size if path.exists() else 0
