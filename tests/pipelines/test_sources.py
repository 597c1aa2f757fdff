from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nafnet_core import InputError
from pipelines.images import read_rgb_u8
from pipelines.sources import FolderPairs, GoProPairs, PairRef, find_source, hold_out


def touch(root: Path, *names: str) -> Path:
    """Adapters list paths and decode nothing: empty files are enough."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def folders(root: Path, lq_name: str = "{}") -> FolderPairs:
    return FolderPairs(lq_dir=root / "blur", gt_dir=root / "sharp", lq_name=lq_name)


def listed(refs: list[PairRef], root: Path) -> list[tuple[str, str, str, str]]:
    return [
        (ref.key, ref.scene, ref.lq.relative_to(root).as_posix(), ref.gt.relative_to(root).as_posix())
        for ref in refs
    ]


# Two folders


def test_pairs_are_matched_by_name_whatever_the_suffix(tmp_path: Path) -> None:
    touch(tmp_path, "blur/a.png", "sharp/a.png", "blur/b.v2.jpg", "sharp/b.v2.PNG")
    assert listed(folders(tmp_path).pairs(), tmp_path) == [
        ("a", "a", "blur/a.png", "sharp/a.png"),
        ("b.v2", "b.v2", "blur/b.v2.jpg", "sharp/b.v2.PNG"),
    ]


def test_subfolder_is_the_scene(tmp_path: Path) -> None:
    touch(tmp_path, "blur/s1/x/1.png", "sharp/s1/x/1.png", "blur/s2/1.png", "sharp/s2/1.png")
    assert listed(folders(tmp_path).pairs(), tmp_path) == [
        ("s1/x/1", "s1/x", "blur/s1/x/1.png", "sharp/s1/x/1.png"),
        ("s2/1", "s2", "blur/s2/1.png", "sharp/s2/1.png"),
    ]


def test_pairs_are_sorted_by_key(tmp_path: Path) -> None:
    # Paths sort otherwise than keys: by part, and with the suffix. The order decides what a store holds
    # where, so it must not change with the suffix that a copy of the data has.
    names = ["a", "a-1", "a.b", "a/1", "a-b/1", "A", "10", "9"]
    touch(tmp_path, *(f"{side}/{name}.png" for side in ("blur", "sharp") for name in names))
    assert [ref.key for ref in folders(tmp_path).pairs()] == sorted(names)


def test_blurred_files_named_after_the_sharp_ones(tmp_path: Path) -> None:
    touch(tmp_path, "blur/1_blur.png", "sharp/1.png", "blur/s/2_blur.png", "sharp/s/2.png")
    refs = folders(tmp_path, "{}_blur").pairs()
    assert listed(refs, tmp_path) == [
        ("1", "1", "blur/1_blur.png", "sharp/1.png"),
        ("s/2", "s", "blur/s/2_blur.png", "sharp/s/2.png"),
    ]


@pytest.mark.parametrize("lq_name", ["{stem}_blur", "{1}", "{", "blur"])
def test_name_that_is_no_template(tmp_path: Path, lq_name: str) -> None:
    touch(tmp_path, "blur/1_blur.png", "sharp/1.png", "blur/2_blur.png", "sharp/2.png")
    with pytest.raises(InputError, match=r"\{\}_blur"):
        folders(tmp_path, lq_name).pairs()


def test_unpaired_images_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "blur/1.png", "sharp/1.png", "blur/only-blurred.png", "sharp/only-sharp.png")
    with pytest.raises(InputError, match="^2 images without a partner.*for each, as 1 others") as caught:
        folders(tmp_path).pairs()
    assert "blur/only-blurred.png" in str(caught.value) and "sharp/only-sharp.png" in str(caught.value)


def test_a_name_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    touch(tmp_path, "blur/1.png", "sharp/1.png")
    for side in (b"blur", b"sharp"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + side + b"/\xff.png")).touch()
    with pytest.raises(InputError, match=r"a file name that is not UTF-8: '.*\\udcff.png'. Rename") as caught:
        folders(tmp_path).pairs()
    str(caught.value).encode()


def test_of_many_unpaired_images_some_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "blur/1.png", *(f"sharp/{number}.png" for number in range(1, 100)))
    with pytest.raises(InputError, match="^98 images without a partner") as caught:
        folders(tmp_path).pairs()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("side", ["blur", "sharp"])
def test_missing_and_empty_folder(tmp_path: Path, side: str) -> None:
    other = {"blur": "sharp", "sharp": "blur"}[side]
    touch(tmp_path, f"{other}/1.png")
    with pytest.raises(InputError, match=f"no such folder: '{tmp_path}/{side}'"):
        folders(tmp_path).pairs()
    touch(tmp_path, f"{side}/notes.txt")
    with pytest.raises(InputError, match=f"no images in this folder: '{tmp_path}/{side}'"):
        folders(tmp_path).pairs()


@pytest.mark.parametrize("side", ["blur", "sharp"])
def test_two_images_of_one_name_are_refused(tmp_path: Path, side: str) -> None:
    touch(tmp_path, "blur/1.png", "sharp/1.png", f"{side}/1.jpg")
    with pytest.raises(InputError, match=r"two images of one name: .*1\.png.*1\.jpg"):
        folders(tmp_path).pairs()


def test_options_are_json(tmp_path: Path) -> None:
    options = folders(tmp_path).options()
    assert json.loads(json.dumps(options)) == {
        "lq_dir": f"{tmp_path}/blur",
        "gt_dir": f"{tmp_path}/sharp",
        "lq_name": "{}",
    }


# Recognising a layout


@pytest.mark.parametrize(
    ("lq", "gt"), [("blur", "sharp"), ("lq", "gt"), ("input", "target"), ("blurry", "groundtruth")]
)
@pytest.mark.parametrize("below", [".", "test"])
def test_usual_folder_names_are_found(tmp_path: Path, below: str, lq: str, gt: str) -> None:
    touch(tmp_path, f"{below}/{lq}/1.png", f"{below}/{gt}/1.png")
    source = find_source(tmp_path, split="test")
    assert isinstance(source, FolderPairs)
    assert (source.lq_dir, source.gt_dir) == (tmp_path / below / lq, tmp_path / below / gt)
    assert len(source.pairs()) == 1


def test_split_chooses_the_subfolder(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/{side}/{split}.png" for split in ("train", "test") for side in ("lq", "gt")))
    for split in ("train", "test"):
        assert [ref.key for ref in find_source(tmp_path, split=split).pairs()] == [split]


def test_template_is_handed_on(tmp_path: Path) -> None:
    touch(tmp_path, "blur/1_blur.png", "sharp/1.png")
    assert len(find_source(tmp_path, split="train", lq_name="{}_blur").pairs()) == 1


@pytest.mark.parametrize("names", [[], ["blur/1.png"], ["sharp/1.png"], ["a/1.png", "b/1.png"]])
def test_unknown_layout(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(InputError, match="no pairs found.*blur and sharp.*--lq BLURRED --gt SHARP"):
        find_source(tmp_path, split="train")


def test_no_source_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        find_source(tmp_path / "nothing", split="train")


# GoPro


def gopro(root: Path) -> Path:
    for split, sequences in {"train": ("GOPR0372_07_00", "GOPR0384"), "test": ("GOPR0385_11_01",)}.items():
        for sequence in sequences:
            names = [
                f"{side}/{frame:06}.png" for side in ("blur", "blur_gamma", "sharp") for frame in (47, 48)
            ]
            touch(root, *(f"{split}/{sequence}/{name}" for name in names))
    return root


def test_gopro_is_recognised(tmp_path: Path) -> None:
    source = find_source(gopro(tmp_path), split="train")
    assert isinstance(source, GoProPairs) and source.adapter == "gopro"
    folder = "train/GOPR0384"
    assert listed(source.pairs(), tmp_path)[2:] == [
        ("GOPR0384/000047", "GOPR0384", f"{folder}/blur/000047.png", f"{folder}/sharp/000047.png"),
        ("GOPR0384/000048", "GOPR0384", f"{folder}/blur/000048.png", f"{folder}/sharp/000048.png"),
    ]
    keys = [ref.key for ref in source.pairs()]
    assert len(keys) == 4 and keys == sorted(keys)
    assert len(find_source(tmp_path, split="test").pairs()) == 2


def test_gopro_with_the_other_blur(tmp_path: Path) -> None:
    source = find_source(gopro(tmp_path), split="test", blur="blur_gamma")
    assert {ref.lq.parent.name for ref in source.pairs()} == {"blur_gamma"}
    # The two give different scores: the manifest must say which it was.
    assert source.options()["blur"] == "blur_gamma"


def test_gopro_with_a_lost_frame(tmp_path: Path) -> None:
    (gopro(tmp_path) / "train/GOPR0384/sharp/000047.png").unlink()
    with pytest.raises(InputError, match="without a partner.*GOPR0384/blur/000047.png"):
        find_source(tmp_path, split="train").pairs()


def test_gopro_without_sequences(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no GoPro sequences"):
        GoProPairs(root=gopro(tmp_path), split="val").pairs()


@pytest.mark.skipif("NAFNET_DATA" not in os.environ, reason="NAFNET_DATA is not set")
def test_gopro_as_published() -> None:
    root = Path(os.environ["NAFNET_DATA"]) / "gopro" / "GOPRO_Large"
    if not root.is_dir():
        pytest.skip(f"no GOPRO_Large in {root.parent}")
    split = "test" if (root / "test").is_dir() else "train"
    source = find_source(root, split=split)
    assert isinstance(source, GoProPairs)
    refs = source.pairs()
    assert refs and all(ref.key.startswith(f"{ref.scene}/") for ref in refs)
    lq, gt = read_rgb_u8(refs[0].lq), read_rgb_u8(refs[0].gt)
    assert lq.shape == gt.shape == (720, 1280, 3)
    # The same scene, and not the same picture.
    assert 0 < abs(lq.astype(int) - gt).mean() < 40


# Holding out


def refs_of(scenes: list[int]) -> list[PairRef]:
    return [
        PairRef(key=f"s{scene}/{number}", scene=f"s{scene}", lq=Path("lq"), gt=Path("gt"))
        for number, scene in enumerate(scenes)
    ]


@given(
    scenes=st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda s: len(set(s)) > 1),
    share=st.floats(0, 1),
)
def test_hold_out_splits_by_scene(scenes: list[int], share: float) -> None:
    refs = refs_of(scenes)
    train, test = hold_out(refs, share, test=False), hold_out(refs, share, test=True)
    assert train and test
    assert sorted([*train, *test], key=refs.index) == refs
    assert not {ref.scene for ref in train} & {ref.scene for ref in test}
    # The order of the files changes nothing: two machines list folders in two orders.
    assert set(hold_out(refs[::-1], share, test=True)) == set(test)
    held, known = len({ref.scene for ref in test}), len(set(scenes))
    assert held == max(1, min(known - 1, math.ceil(share * known)))


def test_hold_out_is_the_same_everywhere() -> None:
    # A hash that differed by process, as Python's does, would leak test scenes into training.
    refs = refs_of(list(range(10)))
    assert [ref.scene for ref in hold_out(refs, 0.3, test=True)] == ["s5", "s7", "s8"]
    # A larger share holds out the same scenes and more.
    assert set(hold_out(refs, 0.3, test=True)) < set(hold_out(refs, 0.6, test=True))


def test_one_scene_cannot_be_split() -> None:
    with pytest.raises(InputError, match="expected two scenes, got .*s3"):
        hold_out(refs_of([3, 3, 3]), 0.5, test=True)
