"""The driver of a training run: what it refuses before any worker starts."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.connect import connect
from nafnet_core import CapabilityError, InputError
from pipelines import train
from pipelines.config import BlurSection, RunConfig, parse_config, with_stores
from pipelines.files import write_json
from pipelines.png import encode_png
from pipelines.prepare import PrepareConfig
from pipelines.prepare import run as prepare
from pipelines.sources import FolderPairs, SharpPhotos
from pipelines.store import read_manifest
from pipelines.synth import SynthConfig
from pipelines.synth import run as synth
from pipelines.tracking import TRACKING, mlflow_client
from pipelines.train import checks, launch
from pipelines.train.files import CONFIG, METRICS, RESULT
from pipelines.train.trainer import Trainer
from pipelines.workspace import Workspace
from tests.pipelines.pairs import piece
from tests.pipelines.train import tiny


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    root = tmp_path_factory.mktemp("train")
    (root / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(root / "photos" / "noise.png")
    synth(SynthConfig(sharp=[root / "photos"], out=root / "pairs", variants=2))
    source = FolderPairs(lq_dir=root / "pairs" / "blur", gt_dir=root / "pairs" / "sharp")
    prepare(source, source.pairs(), PrepareConfig(out=root / "store", crop_px=None))
    return root / "store"


def _config(store: Path, **changes: object) -> RunConfig:
    content = {
        "model": {"width": 4, "enc_blk_nums": [1], "middle_blk_num": 1, "dec_blk_nums": [1]},
        "budget": {"samples": 64},
        "stages": [{"patch_px": 32, "batch": 32}],
        **changes,
    }
    return with_stores(parse_config(content, file="test"), [store], None)


def test_sharp_photos_without_blur_are_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(encode_png(piece(0)))
    source = SharpPhotos(root=tmp_path / "photos")
    prepare(source, source.pairs(), PrepareConfig(out=tmp_path / "sharp", crop_px=None))
    config = _config(tmp_path / "sharp")
    with pytest.raises(InputError, match=r"a store of sharp photos alone.*--set .data.train.0.blur.kinds"):
        train.check(config)
    blurred = config.data.train[0].model_copy(update={"blur": BlurSection()})
    data = config.data.model_copy(update={"train": (blurred,)})
    train.check(config.model_copy(update={"data": data}))
    validated = data.model_copy(update={"val": str(tmp_path / "sharp")})
    with pytest.raises(InputError, match=r"a store of sharp photos alone.*Validate on pairs"):
        train.check(config.model_copy(update={"data": validated}))
    measured = BlurSection(kinds=("measured",), kernels=tmp_path / "nowhere")
    data = data.model_copy(update={"train": (blurred.model_copy(update={"blur": measured}),)})
    with pytest.raises(InputError, match="no such folder.*nowhere"):
        train.check(config.model_copy(update={"data": data}))


@pytest.mark.ray
def test_more_than_the_machine_has_is_refused_with_what_there_is(store: Path, tmp_path: Path) -> None:
    with connect():
        with pytest.raises(CapabilityError, match=r"not enough CPUs .*expected 30\.4") as refused:
            train.run(_config(store, scaling={"num_workers": 32}), Workspace(tmp_path / "a"))
        assert refused.value.exit_code == 4 and "scaling.num_workers" in str(refused.value)
        with pytest.raises(CapabilityError, match="not enough GPUs .*got 0"):
            scaling = {"num_workers": 1, "use_gpu": True}
            train.run(_config(store, scaling=scaling), Workspace(tmp_path / "b"))


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize("side", ["train", "val"])
def test_damaged_shards_are_told_before_workers_start(
    store: Path, tmp_path: Path, damage: str, side: str
) -> None:
    shutil.copytree(store, tmp_path / "damaged")
    shard = tmp_path / "damaged" / "shard-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    if damage == "missing":
        shard.unlink()
    places = {"train": store, "val": store} | {side: tmp_path / "damaged"}
    config = with_stores(_config(store), [places["train"]], places["val"])
    with pytest.raises(InputError, match=r"missing or damaged shard: '.*damaged/shard-00000\.parquet'"):
        train.check(config)


def test_a_name_is_one_run(store: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_json(run_dir / CONFIG, _config(store).model_dump(mode="json"))
    (run_dir / METRICS).touch()
    checks.claim(_config(store), run_dir)
    # Another machine may go on with other workers, but not with another recipe.
    checks.claim(_config(store, scaling={"num_workers": 2}), run_dir)
    with pytest.raises(InputError, match=r"expected optim.lr=0.001, got optim.lr=0.5\).*--name"):
        checks.claim(_config(store, optim={"lr": 0.5}), run_dir)


def test_a_store_that_was_made_anew_is_refused_before_workers_start(store: Path, tmp_path: Path) -> None:
    config, run_dir = _config(store), tmp_path / "run"
    run_dir.mkdir()
    write_json(run_dir / CONFIG, config.model_dump(mode="json"))
    (run_dir / METRICS).touch()
    trainer = Trainer(config, tiny.context(run_dir, digests=(read_manifest(store).digest,)))
    trainer.save()
    trainer.saver.wait()
    checks.claim(config, run_dir)
    state = run_dir / "checkpoints" / "0000000000" / "state.json"
    write_json(state, {**json.loads(state.read_text()), "digests": ["of-the-store-before"]})
    with pytest.raises(InputError, match=r"trained on other data.*expected \['of-the-store'\].*--name"):
        checks.claim(config, run_dir)
    state.write_text("{")  # damaged: what resumes goes back to the one before
    checks.claim(config, run_dir)


def test_a_validation_store_without_pairs_is_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_stores(_config(store), [], store)
    train.check(config)
    empty = read_manifest(store).model_copy(update={"shards": (), "num_pairs": 0})
    monkeypatch.setattr(checks, "read_manifest", lambda place: empty)
    with pytest.raises(InputError, match="a validation store without pairs"):
        train.check(config)


def test_a_micro_batch_beyond_a_workers_slice_is_told(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    checks.warn(_config(store, scaling={"num_workers": 2, "micro_batch": 16}))
    assert not caplog.records
    checks.warn(_config(store, scaling={"num_workers": 2, "micro_batch": 17}))
    assert "micro_batch=17 is more than a worker's slice of the batch, 16 samples" in caplog.text


def test_a_gpu_without_bf16_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr("torch.cuda.device", contextlib.nullcontext)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(CapabilityError, match="no bf16.*got Tesla T4.*precision=fp32"):
        checks.check_precision(_config(store, precision="bf16"), gpu)
    checks.check_precision(_config(store), gpu)
    checks.check_precision(_config(store, precision="bf16"), torch.device("cpu"))


def test_a_run_that_never_began_does_not_keep_its_name(store: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_json(run_dir / CONFIG, _config(store).model_dump(mode="json"))
    write_json(run_dir / TRACKING, {"run_id": "of other values"})
    checks.claim(_config(store, optim={"lr": 0.5}), run_dir)
    assert list(run_dir.iterdir()) == []


def test_a_finished_run_sends_what_its_server_has_not_got(store: Path, tmp_path: Path) -> None:
    workspace, config = Workspace(tmp_path), _config(store)
    run_dir = workspace.run_dir(config.name)
    run_dir.mkdir(parents=True)
    trainer = Trainer(config, tiny.context(run_dir, digests=(read_manifest(store).digest,)))
    trainer.samples = 64
    trainer.save()
    trainer.saver.wait()
    row = {"time": 1e9, "samples": 64, "metrics": {"train/psnr_db": 20.5}}
    (run_dir / METRICS).write_text(json.dumps(row) + "\n")
    write_json(run_dir / CONFIG, config.model_dump(mode="json"))
    write_json(run_dir / RESULT, {"samples": 64, "skipped": 0})

    result = train.run(config, workspace)
    assert result.samples == 64
    client = mlflow_client(workspace)
    recorded = client.get_run(result.mlflow_run_id)
    assert recorded.info.status == "FINISHED" and recorded.data.metrics == {"train/psnr_db": 20.5}
    assert recorded.data.params["optim.lr"] == "0.001" and int(recorded.data.params["num_parameters"]) > 100
    digest = read_manifest(store).digest
    assert recorded.data.params["data.train.0.digest"] == recorded.data.tags["nafnet.store_digests"] == digest
    assert [entry.dataset.digest for entry in recorded.inputs.dataset_inputs] == [digest[:36]]
    assert {file.path for file in client.list_artifacts(result.mlflow_run_id)} == {CONFIG, "pictures"}
    with pytest.raises(InputError, match=r"finished already.*--name"):
        train.run(config, workspace)


def test_the_users_own_error_is_found_inside_rays() -> None:
    class WorkerGroupError(RuntimeError):
        worker_failures = {1: InputError("a missing or damaged shard", file="shard-00000.lmdb")}

    error = launch._explained(WorkerGroupError("wrapped"), Path("run"))
    assert isinstance(error, InputError) and "shard-00000.lmdb" in str(error)
    other = launch._explained(RuntimeError("line\nlast line"), Path("run"))
    assert isinstance(other, CapabilityError) and "last line" in str(other)
