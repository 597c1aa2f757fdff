"""A run's state carried to storage and back: nothing lost, nothing twice, whoever dies on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.checkpoint import LEDGER, CheckpointLedger
from pipelines.files import write_json
from pipelines.storage import LocalFolder
from pipelines.train import mirror as mirror_module
from pipelines.train.files import CONFIG, METRICS, RESULT, STOP
from pipelines.train.mirror import Mirror
from pipelines.train.trainer import Trainer
from tests.pipelines.train import tiny


@pytest.fixture
def storage(tmp_path: Path) -> LocalFolder:
    driver = tmp_path / "first-driver"
    driver.mkdir()
    write_json(driver / CONFIG, {"name": "tiny"})
    place = LocalFolder(tmp_path / "storage")
    Mirror(place, driver).begin()
    return place


def _append(run_dir: Path, text: str) -> None:
    with (run_dir / METRICS).open("a") as file:
        file.write(text)


def test_the_journal_arrives_once_in_pieces(
    storage: LocalFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_PIECE_BYTES", 40)
    worker, driver = Mirror(storage, tmp_path / "worker"), Mirror(storage, tmp_path / "driver")
    written = ""
    for number in range(30):
        line = f'{{"row": {number}}}\n'
        _append(tmp_path / "worker", line)
        written += line
        worker._send()
        if number % 3 == 0:
            driver.pull()
            assert (tmp_path / "driver" / METRICS).read_text() == written
    _append(tmp_path / "worker", '{"half": ')  # is not sent before it is whole
    worker._send()
    # The worker is lost; another one goes on elsewhere, and so does another driver.
    other = Mirror(storage, tmp_path / "other")
    other.fetch()
    assert (tmp_path / "other" / METRICS).read_text() == written
    _append(tmp_path / "other", '{"row": 30}\n')
    other._send()
    for place in ("driver", "driver-2"):
        Mirror(storage, tmp_path / place).pull()
        assert (tmp_path / place / METRICS).read_text() == written + '{"row": 30}\n'
    assert 2 < len(storage.below("journal").names()) < 15


def test_checkpoints_arrive_and_go(storage: LocalFolder, tmp_path: Path) -> None:
    run_dir = tmp_path / "worker"
    worker = Mirror(storage, run_dir)
    trainer = Trainer(tiny.config(checkpoint={"keep": 1}), tiny.context(run_dir))
    for samples in (4, 8):
        trainer.samples = samples
        trainer.save()
        trainer.saver.wait()
        worker._send()
    there = storage.below("checkpoints")
    assert sorted(path.name for path in there.path.iterdir()) == ["0000000008", LEDGER]
    other = Mirror(storage, tmp_path / "other")
    other.fetch()
    entry = CheckpointLedger(tmp_path / "other").newest_whole()
    assert entry is not None and entry.samples == 8
    # A bucket that was damaged meanwhile: what is fetched does not match its digest.
    (there.path / "0000000008" / "optim.safetensors").write_bytes(b"")
    Mirror(storage, tmp_path / "third").fetch()
    assert CheckpointLedger(tmp_path / "third").fault(entry) == "optim.safetensors has another digest"


def test_the_rest_is_sent_and_a_wish_to_stop_arrives(
    storage: LocalFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_EVERY_S", 0.01)
    run_dir = tmp_path / "worker"
    worker, driver = Mirror(storage, run_dir), Mirror(storage, tmp_path / "driver")
    with worker.sending():
        driver.ask_to_stop()
        for _ in range(1000):
            if (run_dir / STOP).exists():
                break
            mirror_module.threading.Event().wait(0.01)
        (run_dir / "pictures").mkdir()
        (run_dir / "pictures" / "0000000004.png").write_bytes(b"picture")
        write_json(run_dir / RESULT, {"samples": 4})
    assert (run_dir / STOP).exists()
    driver.pull()
    assert (tmp_path / "driver" / "pictures" / "0000000004.png").read_bytes() == b"picture"
    assert (tmp_path / "driver" / RESULT).is_file() and (tmp_path / "driver" / CONFIG).is_file()
