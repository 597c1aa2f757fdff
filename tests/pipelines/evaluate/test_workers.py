"""The same work on Ray workers: equal to the last bit, one line for what is wrong, nothing lost to a kill."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from nafnet_core import InputError, save_model
from pipelines import evaluate
from pipelines.evaluate import Pairs, installed_judge
from pipelines.models import LoadedModel, open_model
from pipelines.scoring.work import Scorer, score_all
from pipelines.workspace import Workspace
from tests.nafnet_core.networks import SMALL, lively_network
from tests.pipelines.buckets import Server
from tests.pipelines.pairs import write_pairs

_MEASURED = {"latency_s", "peak_memory_mib", "num_workers"}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    "names",
    [
        ("store",),
        pytest.param(("pairs",), marks=pytest.mark.slow),
        pytest.param(("pairs/blur", "pairs/sharp"), marks=pytest.mark.slow),
    ],
)
def test_workers_have_the_scores_of_one_process(
    model: LoadedModel, places: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, names: tuple[str]
) -> None:
    monkeypatch.chdir(places)  # where the workers are not
    judge = installed_judge() if names == ("store",) else None
    torch.set_num_threads(2)
    try:
        alone = evaluate.run(model, Pairs(*names), workspace, judge=judge)
        pictures = {path.name: path.read_bytes() for path in alone.path.parent.rglob("*.*g")}
        done: list[tuple[int, int]] = []
        many = evaluate.run(
            model,
            Pairs(*names),
            workspace,
            judge=judge,
            num_workers=2,
            on_progress=lambda *both: done.append(both),
        )
    finally:
        torch.set_num_threads(1)
    assert many.report.model_dump(exclude=_MEASURED) == alone.report.model_dump(exclude=_MEASURED)
    assert {path.name: path.read_bytes() for path in many.path.parent.rglob("*.*g")} == pictures
    assert done == [(number, 6) for number in range(1, 7)]
    assert many.report.num_workers == 2 and alone.report.num_workers is None
    assert "on 2 workers, each on one thread" in many.path.with_name("report.md").read_text()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_damaged_image_is_one_line_from_a_worker(
    model: LoadedModel, places: Path, workspace: Workspace, tmp_path: Path
) -> None:
    shutil.copytree(places / "pairs", tmp_path / "pairs")
    file = tmp_path / "pairs" / "sharp" / "a" / "2.png"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(InputError, match=r"sharp/a/2\.png") as found:
        evaluate.run(model, Pairs(tmp_path / "pairs"), workspace, num_workers=1)
    assert "\n" not in str(found.value) and "Traceback" not in str(found.value)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_workers_read_from_a_bucket(
    model: LoadedModel, places: Path, workspace: Workspace, s3: Server, bucket: str
) -> None:
    alone = evaluate.run(model, Pairs(places / "store"), workspace).report
    for name in ("store", "pairs"):
        url = s3.upload(places / name, f"{bucket}/{name}")
        many = evaluate.run(model, Pairs(url), workspace, num_workers=2).report
        assert (many.images, many.data_digest) == (alone.images, alone.data_digest)


def test_a_node_that_does_not_see_the_pairs_says_so(places: Path, tmp_path: Path) -> None:
    for name, words in (("store", "folder of the store"), ("pairs", "folder of the images")):
        shutil.copytree(places / name, tmp_path / name)
        place = Pairs(tmp_path / name).place_of(2)
        assert (place.read().gt == Pairs(places / name)[2].gt).all()
        shutil.rmtree(tmp_path / name)
        with pytest.raises(InputError, match=f"do not share the {words}"):
            place.read()
    other = replace(Pairs(places / "store").place_of(0), digest="0" * 64)
    with pytest.raises(InputError, match="another one, or none"):
        other.read()


def test_a_place_says_no_credentials() -> None:
    from pipelines.scoring.pairs import PairPlace

    assert "SECRET" not in repr(PairPlace(index=0, store="s3://key:SECRET@bucket/store", digest="d"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_is_killed_loses_nothing(workspace: Workspace, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", [f"{number:02}" for number in range(24)], height=240, width=320)
    save_model(lively_network(SMALL), tmp_path / "a.safetensors", metadata={"train_patch_px": 32})
    loaded = open_model(str(tmp_path / "a.safetensors"), workspace)
    scorer, pairs = Scorer(model=loaded.model, train_patch_px=32), Pairs(tmp_path / "pairs")
    expected = [scored.score for scored in score_all(scorer, pairs)]
    found, killed = {}, []
    for scored in score_all(scorer, pairs, num_workers=2):
        found[scored.index] = scored.score
        if not killed:
            killed = _kill_a_worker()
    assert killed, "no worker was found to kill"
    assert [found[index] for index in range(24)] == expected


def _kill_a_worker() -> list[int]:
    """End one of the actors of this test's Ray, which names its processes after them."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for process in psutil.Process().children(recursive=True):
            command = " ".join(process.cmdline()[:1])
            if command.startswith("ray::") and "MapWorker" in command:
                process.kill()
                return [process.pid]
        time.sleep(0.05)
    return []
