"""Sharp photos alone: from a folder to a store, and to those who ask for pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nafnet_core import InputError
from pipelines import inspect, prepare
from pipelines.evaluate import Pairs
from pipelines.lmdb_source import read_lmdb_pairs
from pipelines.png import encode_png
from pipelines.prepare import PrepareConfig, PrepareResult
from pipelines.shards import Pair
from pipelines.sources import SharpPhotos
from pipelines.store import MANIFEST, QUARANTINE, SUSPECTS, PairStore, digest_of
from pipelines.workspace import Workspace
from tests.pipelines.pairs import make_store, piece, write_pairs
from tests.pipelines.test_inspect import silent
from tests.pipelines.test_store import KINDS

NAMES = ["a/1", "a/2", "b/1", "c"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of 96×72. Shared: look, do not touch."""
    return write_photos(tmp_path_factory.mktemp("photos"))


def write_photos(root: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(piece(number)))
    return root


def prepared(root: Path, out: Path, **options: Any) -> PrepareResult:
    source = SharpPhotos(root=root)
    config = PrepareConfig(out=out, crop_px=32, stride_px=32, pairs_per_shard=2, use_ray=False)
    return prepare.run(source, source.pairs(), replace(config, **options))


# The folder


def test_photos_of_a_folder_by_their_paths(photos: Path) -> None:
    refs = SharpPhotos(root=photos).pairs()
    assert [(ref.key, ref.scene, ref.lq) for ref in refs] == [
        ("a/1", "a", None), ("a/2", "a", None), ("b/1", "b", None), ("c", "c", None)
    ]  # fmt: skip
    assert [ref.gt for ref in refs] == [photos / f"{name}.png" for name in NAMES]


def test_pairs_are_not_taken_for_sharp_photos(tmp_path: Path) -> None:
    write_pairs(tmp_path, ["1", "2"])
    with pytest.raises(InputError, match=r"blurred images in this folder.*got pairs \(folders\).*--sharp"):
        SharpPhotos(root=tmp_path).pairs()
    assert len(SharpPhotos(root=tmp_path / "sharp").pairs()) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no such folder"),
        (lambda root: root.write_text("x"), "not a folder"),
        (lambda root: root.mkdir(), "no photos in this folder"),
    ],
)
def test_a_folder_without_photos_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "photos")
    with pytest.raises(InputError, match=message):
        SharpPhotos(root=tmp_path / "photos").pairs()


# The store


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_each_photo_is_kept_once(photos: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    result = prepared(photos, tmp_path / "store", crop_px=None, **kind)
    store = PairStore(tmp_path / "store")
    assert store.manifest == result.manifest and store.manifest.sides == ("gt",)
    assert result.suspects == result.refused == () and (store.root / SUSPECTS).read_text() == ""
    for number, name in enumerate(NAMES):
        pair = store.pair(number)
        assert (pair.key, pair.lq is pair.gt) == (name, True) and store.size(number) == (72, 96)
        assert np.array_equal(pair.gt, piece(number))
        lq, gt = store.patch(number, 0.4, 0.7, 16)
        assert np.array_equal(lq, gt) and np.array_equal(gt, piece(number)[22:38, 56:72])
    # One copy of the pixels on the disk, not two.
    both = make_store(write_pairs(tmp_path / "pairs", NAMES), tmp_path / "both", crop_px=None, **kind)
    sizes = [sum(shard.bytes for shard in m.shards) for m in (store.manifest, both.manifest)]
    assert sizes[0] < 0.75 * sizes[1]


def test_digest_is_of_the_photos_whatever_the_form(photos: Path, tmp_path: Path) -> None:
    made = [prepared(photos, tmp_path / f"{n}", **kind).manifest for n, kind in enumerate(KINDS)]
    made.append(prepared(photos, tmp_path / "large", pairs_per_shard=9).manifest)
    assert len({manifest.digest for manifest in made}) == 1 and made[0].num_pairs == 36
    store = PairStore(tmp_path / "0")
    one_by_one = b"".join(store.pair(index).digest(("gt",)) for index in range(36))
    assert store.digest == digest_of(one_by_one)
    # And not that of the same photos as pairs with themselves.
    pair = store.pair(0)
    again = Pair(key=pair.key, scene=pair.scene, lq=pair.gt.copy(), gt=pair.gt)
    assert len({pair.digest(("gt",)), pair.digest(), again.digest()}) == 2


def test_a_store_of_before_has_both_sides(own_store: Path) -> None:
    manifest = json.loads((own_store / MANIFEST).read_text())
    assert manifest.pop("sides") == ["lq", "gt"]
    (own_store / MANIFEST).write_text(json.dumps(manifest))
    store = PairStore(own_store)
    assert store.manifest.sides == ("lq", "gt") and not store.pair(0).is_sharp_alone
    for sides in ([], ["lq"], ["gt", "lq"], ["gt", "depth"]):
        (own_store / MANIFEST).write_text(json.dumps({**manifest, "sides": sides}))
        with pytest.raises(InputError, match="damaged manifest"):
            PairStore(own_store)


def test_bad_photos_go_to_quarantine_and_exif_turns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_photos(tmp_path / "photos")
    (root / "d.png").write_bytes((root / "c.png").read_bytes())
    (root / "e.png").write_bytes((root / "c.png").read_bytes()[:500])
    Image.fromarray(piece(7)).convert("L").save(root / "gray.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(piece(8)).save(root / "turned.png", exif=exif)
    prepared(root, tmp_path / "store", crop_px=None)
    rows = [json.loads(line) for line in (tmp_path / "store" / QUARANTINE).read_text().splitlines()]
    assert [row["key"] for row in rows] == ["d", "e"] and all("lq" not in row for row in rows)
    assert "byte for byte the photo 'c'" in rows[0]["reason"] and "damaged or truncated" in rows[1]["reason"]
    store = PairStore(tmp_path / "store")
    assert [store.pair(n).key for n in range(len(store))] == [*NAMES, "gray", "turned"]
    assert store.size(5) == (96, 72) and np.ptp(store.pair(4).gt, axis=2).max() == 0
    assert not caplog.records
    for name in "de":
        (root / f"{name}.png").unlink()
    with pytest.raises(InputError, match=r"smaller than a crop.*a/1\.png.*expected 80 px"):
        prepared(root, tmp_path / "strict", crop_px=80, strict=True)


# Those who ask for pairs


@pytest.mark.parametrize("ask", [Pairs, lambda root: read_lmdb_pairs(root)], ids=["evaluate", "Ray Data"])
def test_without_blurred_images_pairs_are_refused(photos: Path, tmp_path: Path, ask: Any) -> None:
    prepared(photos, tmp_path / "store", format="lmdb", codec="raw")
    with pytest.raises(InputError, match=r"a store of sharp photos alone.*expected blurred/sharp.*synth"):
        ask(tmp_path / "store")


def test_inspect_shows_what_there_is(photos: Path, tmp_path: Path) -> None:
    prepared(photos, tmp_path / "store")
    config = inspect.InspectConfig(what=str(tmp_path / "store"), workspace=Workspace(tmp_path), deep=True)
    result = inspect.run(config, show=silent)
    assert result.problems == result.notes == () and result.facts["sides"] == ("gt",)
    assert result.statistics is not None and result.statistics["sharpness_sharp"]["median"] > 0
    assert result.statistics["psnr_db"] is result.statistics["sharpness_blurred"] is None
    assert [picture.name for picture in result.pictures] == ["pairs.png", "histograms.png"]
