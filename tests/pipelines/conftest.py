from __future__ import annotations

import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import pytest
import torch

from cluster.connect import connect
from pipelines.cli import main
from pipelines.config import DataSection, StoreSection
from pipelines.ingest import plan_for
from pipelines.plan import SamplePlan
from pipelines.sources import FolderPairs
from pipelines.store import PairStore
from tests.pipelines.buckets import Server, s3_server
from tests.pipelines.pairs import make_store, write_pairs

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """One thread: small images are done sooner so, and tests beside this one keep their core."""
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Shards of tests are not kept in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NAFNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def bucket_keys() -> Iterator[None]:
    """Keys that the tests' own S3 server takes; nothing is asked of a cloud."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def s3(bucket_keys: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An S3-compatible server in a process of its own."""
    with s3_server(tmp_path_factory.mktemp("s3") / "requests.log") as server:
        yield server


@pytest.fixture
def bucket(s3: Server) -> str:
    """Name of a new, empty bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    s3.make_bucket(name)
    return name


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> FolderPairs:
    """Five pairs of 96×72 in three scenes. Shared: look, do not touch."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), ["a/1", "a/2", "b/1", "b/2", "c/1"])


@pytest.fixture(scope="session")
def store(pairs: FolderPairs, tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """45 crops of 32 px in three Parquet shards. Shared: look, do not touch."""
    return make_store(pairs, tmp_path_factory.mktemp("store") / "store")


@pytest.fixture(scope="session")
def mixture(
    pairs: FolderPairs, store: PairStore, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SamplePlan, list[PairStore]]:
    """Two stores: crops in Parquet, whole images in LMDB; the second visited twice an epoch."""
    whole = make_store(
        pairs, tmp_path_factory.mktemp("whole") / "store", crop_px=None, format="lmdb", codec="raw"
    )
    sections = (StoreSection(path=store.root), StoreSection(path=whole.root, weight=2.0))
    return plan_for(DataSection(train=sections), seed=11), [store, whole]


@pytest.fixture
def own_store(pairs: FolderPairs, tmp_path: Path) -> Path:
    """A store to damage."""
    return make_store(pairs, tmp_path / "own-store").root


@pytest.fixture(scope="session")
def data_context() -> None:
    """Ray Data's settings of this process; while they are made they warn of their own defaults."""
    import ray.data

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.data.DataContext.get_current()


@pytest.fixture(scope="package")
def ray_session(data_context: None) -> Iterator[None]:
    """A local Ray instance for all tests of this folder that ask for one: starting it takes seconds."""
    with connect():
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call `nafnet` in this process; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAFNET_WORKSPACE", str(tmp_path / "workspace"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nafnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        code = exit_info.value.code
        assert isinstance(code, int)
        return code, captured.out, captured.err

    return call
