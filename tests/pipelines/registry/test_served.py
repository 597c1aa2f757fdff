"""What lies in a version, and that MLflow answers with the pixels of `nafnet restore`."""

from __future__ import annotations

import contextlib
import json
import os
import pickletools
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nafnet_core import save_model, save_official
from pipelines import registry
from pipelines.gate import GateSettings
from pipelines.models import open_model
from pipelines.store import PairStore
from pipelines.tracking import tracking_uri
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import SMALL, assert_network_acts, lively_network, photo
from tests.pipelines.mlflow_servers import free_port
from tests.pipelines.registry.brighteners import write_brightener

_ROOT = Path(__file__).resolve().parents[3]
_START_S = 120.0
_CLIENT = """
import sys, mlflow, numpy as np
from PIL import Image
model = mlflow.pyfunc.load_model("models:/nafnet-deblur@champion")
Image.fromarray(model.predict(np.asarray(Image.open(sys.argv[1])))).save(sys.argv[2])
"""


def _is_pickle(path: Path) -> bool:
    content = path.read_bytes()
    if zipfile.is_zipfile(path):  # as torch.save writes
        return any(name.endswith(".pkl") for name in zipfile.ZipFile(path).namelist())
    try:
        return len(list(pickletools.genops(content))) > 0
    except Exception:  # whatever it was, it cannot be unpickled
        return False


def test_a_version_holds_all_that_it_should_and_no_pickle(
    workspace: Workspace, store: PairStore, tmp_path: Path
) -> None:
    # An official file is one: it must not get in as it is.
    save_official(lively_network(SMALL), tmp_path / "official.pth")
    assert _is_pickle(tmp_path / "official.pth")
    registry.register(str(tmp_path / "official.pth"), workspace, on=store.root, train_patch_px=64)
    shown = registry.show("candidate", workspace)
    files = [path for path in shown.folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [
        path for path in files if _is_pickle(path) or path.suffix in (".pkl", ".pickle", ".pt", ".pth")
    ] == []
    assert {path.name for path in (shown.folder / "artifacts").iterdir()} == {
        "model.safetensors", "config.json", "card.json", "MODEL_CARD.md", "report.json", "before_after.png",
    }  # fmt: skip
    requirements = (shown.folder / "requirements.txt").read_text().split()
    assert len(requirements) == 5 and all("==" in line and "+" not in line for line in requirements)
    card = (shown.folder / "artifacts" / "MODEL_CARD.md").read_text()
    for said in (store.digest, "rgb8", "local statistics", "Limits", "licence", "PSNR", "torch=="):
        assert said.lower() in card.lower(), said
    with Image.open(shown.folder / "artifacts" / "before_after.png") as picture:
        assert picture.width > 3 * 96


def test_the_card_tells_the_licence_of_the_training_data(
    workspace: Workspace, store: PairStore, tmp_path: Path
) -> None:
    trained_on = {"data": {"train": [{"path": str(store.root)}, {"path": str(tmp_path / "gone")}]}}
    metadata = {"samples": 640, "recipe": trained_on, "store_digests": [store.digest, "d" * 64]}
    save_model(lively_network(SMALL), tmp_path / "run.safetensors", metadata=metadata)
    registry.register(str(tmp_path / "run.safetensors"), workspace)
    known, gone = registry.show("1", workspace).card["data"]
    assert known == {"place": str(store.root), "digest": store.digest, "licence": store.manifest.licence}
    assert gone["digest"] == "d" * 64 and "not where it was" in gone["licence"]


@pytest.fixture
def lively_champion(workspace: Workspace, store: PairStore, tmp_path: Path) -> Workspace:
    """A champion whose every part tells in the pixels, its residual scales too."""
    model = lively_network(SMALL)
    assert_network_acts(model, torch.from_numpy(photo(64, 64)).permute(2, 0, 1)[None] / 255)
    save_model(model, tmp_path / "lively.safetensors", metadata={"train_patch_px": 64})
    registry.register(str(tmp_path / "lively.safetensors"), workspace, on=store.root)
    registry.promote(workspace, on=store.root, settings=GateSettings(), force=True, reason="for a test")
    return workspace


def _environment(workspace: Workspace) -> dict[str, str]:
    """As of a user who has the virtual environment active, and the checkout nowhere."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return environment | {"MLFLOW_TRACKING_URI": tracking_uri(workspace), "MLFLOW_DISABLE_TELEMETRY": "true"}


def _restored(photo_path: Path, workspace: Workspace, out: Path) -> NDArray[np.uint8]:
    """By the real command: with another number of threads than it, sums differ in their last bits."""
    command = [sys.executable, "-m", "pipelines", "restore", str(photo_path), "--out", str(out)]
    command += ["--precision", "fp32", "--workspace", str(workspace.root)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "1 restored" in done.stdout, done.stderr
    return np.asarray(Image.open(out / photo_path.name))


def test_pyfunc_answers_with_the_pixels_of_restore_over_several_tiles(
    lively_champion: Workspace, tmp_path: Path
) -> None:
    blurred = tmp_path / "photo.png"
    Image.fromarray(photo(1100, 1310)).save(blurred)
    command = [sys.executable, "-c", _CLIENT, str(blurred), str(tmp_path / "answer.png")]
    environment = _environment(lively_champion)
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    expected = _restored(blurred, lively_champion, tmp_path / "restored")
    assert not np.array_equal(expected, photo(1100, 1310))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "answer.png")), expected)


@contextmanager
def _served(workspace: Workspace, log: Path) -> Iterator[str]:
    """`mlflow models serve` of the champion; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/nafnet-deblur@champion"]
    command += ["--env-manager", "local", "-p", str(port)]
    environment = _environment(workspace)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd="/", env=environment, stdout=file, stderr=file, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, 9)
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ping", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_mlflow_models_serve_answers_over_http_with_the_pixels_of_restore(
    lively_champion: Workspace, tmp_path: Path
) -> None:
    blurred = tmp_path / "photo.png"
    Image.fromarray(photo(290, 411)).save(blurred)
    body = json.dumps({"inputs": photo(290, 411).tolist()}).encode()
    with _served(lively_champion, tmp_path / "serve.log") as address:
        request = urllib.request.Request(
            f"{address}/invocations", data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=100) as answer:
            restored = np.array(json.load(answer)["predictions"])
    expected = _restored(blurred, lively_champion, tmp_path / "restored")
    np.testing.assert_array_equal(restored, expected)
    assert not np.array_equal(restored, photo(290, 411))


def test_the_same_weights_keep_their_report(workspace: Workspace, store: PairStore) -> None:
    """The file in the version is written anew; its report must still be of its digest."""
    path = write_brightener(workspace.root / "model.safetensors", 0.5)
    registry.register(str(path), workspace, on=store.root)
    loaded = open_model("models:/nafnet-deblur@candidate", workspace)
    report = json.loads((loaded.weights.with_name("report.json")).read_text())
    assert report["weights_digest"] == loaded.digest
