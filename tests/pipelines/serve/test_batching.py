"""The network's thread: batches over requests, models that change, images that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nafnet_core import tiling
from pipelines import Restorer
from pipelines.restorer import RestoreSettings
from pipelines.serve.batching import NetworkThread, Served
from tests.nafnet_core.networks import photo
from tests.pipelines.serve.conftest import write_model


def _served(path: Path, *, tile_batch: int = 1, tile_px: int = 1024) -> Served:
    settings = RestoreSettings(precision="fp32", tile_px=tile_px, tile_batch=tile_batch)
    return Served(restorer=Restorer(str(path), settings), label=path.name, version=None, digest="")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[int], threading.Event]]:
    """Tiles in each pass through the network, and what the first one waits for."""
    sizes: list[int] = []
    go = threading.Event()

    def counting(model: Any, images: Any, *rest: Any, original: Any = tiling._run) -> Any:
        sizes.append(len(images))
        go.wait(20)
        return original(model, images, *rest)

    monkeypatch.setattr(tiling, "_run", counting)
    yield sizes, go
    go.set()


def test_equal_tiles_of_several_requests_share_a_batch(
    weights: Path, passes: tuple[list[int], threading.Event]
) -> None:
    sizes, go = passes
    network = NetworkThread(_served(weights, tile_batch=4))
    images = [np.roll(photo(48, 64), shift, axis=1) for shift in range(6)]
    first = network.submit(images[0])
    while not sizes:  # it runs alone: nobody else was there
        time.sleep(0.001)
    others = [network.submit(image) for image in images[1:]]
    go.set()
    answers = [future.result(20) for future in (first, *others)]
    network.close()
    assert sizes == [1, 4, 1]
    restorer = Restorer(str(weights), RestoreSettings(precision="fp32"))
    for image, answer in zip(images, answers, strict=True):
        # In another batch a level may differ.
        assert np.abs(answer.restoration.image.astype(int) - restorer(image)).max() <= 1


def test_tiles_of_one_image_and_the_next_share_a_batch(
    weights: Path, passes: tuple[list[int], threading.Event]
) -> None:
    sizes, go = passes
    network = NetworkThread(_served(weights, tile_batch=3, tile_px=192))
    blocker = network.submit(photo(40, 40))
    futures = [network.submit(photo(184, 304)) for _ in range(3)]  # of two tiles each
    go.set()
    results = [future.result(20).restoration for future in (blocker, *futures)]
    network.close()
    assert [result.num_tiles for result in results] == [1, 2, 2, 2]
    assert sizes == [1, 3, 3]


def test_models_change_between_images_and_none_is_lost(weights: Path, tmp_path: Path) -> None:
    models = [_served(weights), _served(write_model(tmp_path / "other.safetensors", 2))]
    image = photo(40, 40)
    expected = {each.label: each.restorer(image) for each in models}
    assert not np.array_equal(*expected.values())
    fresh = [_served(weights), _served(tmp_path / "other.safetensors")]
    network = NetworkThread(fresh[0])
    futures = []
    for turn in range(40):
        futures += [network.submit(image) for _ in range(3)]
        futures[-3].result(20)
        network.swap(fresh[(turn + 1) % 2])
    answers = [future.result(20) for future in futures]
    network.close()
    for answer in answers:
        assert np.array_equal(answer.restoration.image, expected[answer.served.label])
    assert {answer.served.label for answer in answers} == set(expected)


def test_an_image_that_fails_fails_alone(weights: Path, passes: tuple[list[int], threading.Event]) -> None:
    sizes, go = passes
    network = NetworkThread(_served(weights, tile_batch=4))
    first = network.submit(photo(40, 40))
    while not sizes:
        time.sleep(0.001)
    wrong: Any = np.zeros((40, 40, 3), np.float64)
    good, bad = network.submit(photo(40, 40)), network.submit(wrong)
    last = network.submit(photo(40, 40))
    go.set()
    with pytest.raises(ValueError, match="uint8"):
        bad.result(20)
    for future in (first, good, last):
        assert future.result(20).restoration.image.shape == (40, 40, 3)
    assert network.is_alive
    network.close()


def test_what_is_cancelled_before_its_turn_is_not_run(
    weights: Path, passes: tuple[list[int], threading.Event]
) -> None:
    sizes, go = passes
    network = NetworkThread(_served(weights))
    first = network.submit(photo(40, 40))
    while not sizes:
        time.sleep(0.001)
    dropped, last = network.submit(photo(40, 40)), network.submit(photo(40, 40))
    assert dropped.cancel()
    go.set()
    assert first.result(20) and last.result(20)
    network.close()
    assert len(sizes) == 2


def test_closing_answers_what_is_queued(weights: Path) -> None:
    network = NetworkThread(_served(weights))
    futures = [network.submit(photo(64, 64)) for _ in range(5)]
    network.close()
    assert all(future.done() and future.result().queue_s >= 0 for future in futures)
