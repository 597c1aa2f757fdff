"""Data sets in their own layouts, and lists: made copies of the layouts, most of empty files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nafnet_core import InputError
from pipelines.prepare import PrepareConfig, run
from pipelines.sources import (
    HidePairs,
    ListedPairs,
    PairRef,
    RealBlurPairs,
    RedsPairs,
    Source,
    find_source,
    hold_out,
)
from tests.pipelines.pairs import write_pairs
from tests.pipelines.test_sources import listed, touch


def message(source: Source) -> str:
    with pytest.raises(InputError) as caught:
        source.pairs()
    return str(caught.value)


# REDS


@pytest.mark.parametrize("inner", ["", "train/"])
def test_reds(tmp_path: Path, inner: str) -> None:
    for sequence in ("000", "001"):
        touch(tmp_path, *(f"{inner}train_sharp/{sequence}/0000000{n}.png" for n in range(2)))
        touch(tmp_path, *(f"{inner}train_blur/{sequence}/0000000{n}.png" for n in range(2)))
        touch(tmp_path, *(f"{inner}train_blur_jpeg/{sequence}/0000000{n}.jpg" for n in range(2)))
    source = find_source(tmp_path, split="train")
    assert isinstance(source, RedsPairs) and source.adapter == "reds"
    assert listed(source.pairs(), tmp_path)[1] == (
        "000/00000001",
        "000",
        f"{inner}train_blur/000/00000001.png",
        f"{inner}train_sharp/000/00000001.png",
    )
    assert len({ref.scene for ref in source.pairs()}) == 2 and len(source.pairs()) == 4
    jpeg = find_source(tmp_path, split="train", blur="blur_jpeg")
    assert listed(jpeg.pairs(), tmp_path)[3][2] == f"{inner}train_blur_jpeg/001/00000001.jpg"
    assert "no such folder" in message(RedsPairs(root=tmp_path, split="train", blur="blur_comp"))


# HIDE


def test_hide(tmp_path: Path) -> None:
    touch(tmp_path, "train/1fromGOPR0950.png", "train/20fromGOPR0950.png", "train/7fromGOPR1084.png")
    touch(tmp_path, "test/test-close-ups/3fromGOPR0999.png", "test/test-long-shot/4fromGOPR1000.png")
    for path in list(tmp_path.rglob("*.png")):
        touch(tmp_path, f"GT/{path.name}")
    train, test = (find_source(tmp_path, split=split) for split in ("train", "test"))
    assert isinstance(train, HidePairs) and train.adapter == "hide"
    assert listed(train.pairs(), tmp_path)[0] == (
        "1fromGOPR0950",
        "GOPR0950",
        "train/1fromGOPR0950.png",
        "GT/1fromGOPR0950.png",
    )
    assert {ref.scene for ref in train.pairs()} == {"GOPR0950", "GOPR1084"}
    assert [ref.lq.parent.name for ref in test.pairs()] == ["test-close-ups", "test-long-shot"]
    (tmp_path / "GT/3fromGOPR0999.png").unlink()
    assert "1 images are listed and not there" in message(test)


def test_hide_with_lists_of_its_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["1fromGOPR0950", "20fromGOPR0950", "3fromGOPR0999", "4fromGOPR1000", "5fromGOPR1000"]
    for name in names:
        touch(tmp_path, f"blurred/{name}.png", f"GT/{name}.png")
    (tmp_path / "train.txt").write_text("blurred/1fromGOPR0950.png\n\n20fromGOPR0950.png 12 34 56 78\n")
    (tmp_path / "test-close-ups.txt").write_text("3fromGOPR0999\n")
    (tmp_path / "test-long-shot.txt").write_text("test/test-long-shot/4fromGOPR1000.png\n")
    train, test = (find_source(tmp_path, split=split) for split in ("train", "test"))
    assert isinstance(train, HidePairs) and isinstance(test, HidePairs)
    assert [ref.key for ref in train.pairs()] == names[:2]
    assert listed(test.pairs(), tmp_path)[1] == (
        "4fromGOPR1000",
        "GOPR1000",
        "blurred/4fromGOPR1000.png",
        "GT/4fromGOPR1000.png",
    )
    (tmp_path / "test.txt").write_text("5fromGOPR1000.png\n")  # of the whole, where there is one
    assert [ref.key for ref in test.pairs()] == names[4:]
    assert not caplog.records
    (tmp_path / "train.txt").write_text("1fromGOPR0950.png\n4fromGOPR1000.png\n")
    assert len(train.pairs()) == 2
    assert "1 videos of HIDE are in train and in another split: GOPR1000" in caplog.text
    (tmp_path / "train.txt").write_text("1fromGOPR0950.png\n5fromGOPR1000.png\n")
    assert "1 images are in this split and in another one" in message(train)
    (tmp_path / "train.txt").write_text("99fromGOPR0950.png\n")
    assert "2 images are listed and not there" in message(train)  # the blurred one and its sharp one


# Names that are not UTF-8


def test_hide_with_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"1from\xff\xfe.png")
    touch(tmp_path, f"train/{name}", f"GT/{name}")
    text = message(find_source(tmp_path, split="train"))
    assert text.startswith("a file name that is not UTF-8: ") and r"GT/1from\udcff\udcfe.png" in text
    text.encode()


def test_gopro_with_a_sequence_that_is_not_utf8(tmp_path: Path) -> None:
    touch(tmp_path, *(os.fsdecode(b"train/\xff/" + side + b"/1.png") for side in (b"blur", b"sharp")))
    assert r"not UTF-8: '" in (text := message(find_source(tmp_path, split="train")))
    assert text.endswith(r"train/\udcff'. Rename it")


def test_a_scene_that_is_not_utf8_is_not_split(tmp_path: Path) -> None:
    scene = os.fsdecode(b"\xff")
    refs = [PairRef(key=name, scene=name, lq=None, gt=tmp_path / name) for name in ("a", scene)]
    with pytest.raises(InputError, match=r"a file name that is not UTF-8: '.*\\udcff'. Rename it"):
        hold_out(refs, 0.5, test=True)


# A scene on both sides


def test_gopro_sequence_on_both_sides_is_refused(tmp_path: Path) -> None:
    for split, sequence in (("train", "A"), ("train", "B"), ("test", "B")):
        touch(tmp_path, *(f"{split}/{sequence}/{side}/1.png" for side in ("blur", "sharp")))
    for split in ("train", "test"):
        text = message(find_source(tmp_path, split=split))
        assert "1 sequences are in this split and in another one" in text and "got B" in text


def test_reds_counts_the_sequences_of_each_part_anew(tmp_path: Path) -> None:
    for split in ("train", "val"):
        touch(tmp_path, *(f"{split}_{side}/000/00000000.png" for side in ("blur", "sharp")))
    assert len(find_source(tmp_path, split="train").pairs()) == 1


def test_realblur_scene_on_both_sides_is_refused(tmp_path: Path) -> None:
    realblur(tmp_path)
    train, test = (tmp_path / f"RealBlur_J_{split}_list.txt" for split in ("train", "test"))
    assert find_source(tmp_path, split="train").pairs()
    test.write_text(test.read_text() + "\n" + train.read_text().split("\n")[0])
    text = message(find_source(tmp_path, split="test"))
    assert "1 scenes are in this split and in another one" in text and "scene001" in text


def test_list_with_a_scene_or_a_sharp_file_on_both_sides_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{side}/{n}.png" for side in ("b", "s") for n in range(3)))
    path = tmp_path / "list.csv"
    lines = ["b/0.png,s/0.png,train,x", "b/1.png,s/1.png,test,y", "b/2.png,s/2.png,,x"]

    def write(*rows: str) -> ListedPairs:
        path.write_text("\n".join(["lq,gt,split,scene", *rows]))
        return ListedPairs(path=path, split="train")

    assert len(write(*lines).pairs()) == 2
    assert "1 scenes are in this split" in message(write(*lines, "b/2.png,s/2.png,test,x"))
    assert "1 sharp images are in this split" in message(write(*lines, "b/2.png,s/0.png,test,z"))
    # One folder for all is no scene that anybody named.
    path.write_text("lq,gt,split\nb/0.png,s/0.png,train\nb/1.png,s/1.png,test\n")
    assert len(ListedPairs(path=path, split="train").pairs()) == 1


# RealBlur


def realblur(root: Path, subset: str = "J") -> Path:
    folder = f"RealBlur-{subset}_ECC_IMCORR_centroid_itensity_ref"
    for split, scenes in (("train", (1, 4)), ("test", (2,))):
        lines = []
        for scene in scenes:
            for number in (1, 2):
                gt = f"{folder}/scene{scene:03d}/gt/gt_{number}.png"
                lq = f"{folder}/scene{scene:03d}/blur/blur_{number}.png"
                touch(root, gt, lq)
                lines.append(f"{gt} {lq} ")
        (root / f"RealBlur_{subset}_{split}_list.txt").write_text("\r\n".join(lines) + "\n\n")
    return root


def test_realblur(tmp_path: Path) -> None:
    source = find_source(realblur(tmp_path), split="train")
    assert isinstance(source, RealBlurPairs) and source.subset == "J" and source.adapter == "realblur"
    folder = "RealBlur-J_ECC_IMCORR_centroid_itensity_ref"
    assert listed(source.pairs(), tmp_path)[2] == (
        "scene004/blur_1",
        "scene004",
        f"{folder}/scene004/blur/blur_1.png",
        f"{folder}/scene004/gt/gt_1.png",
    )
    assert len(source.pairs()) == 4
    assert {ref.scene for ref in find_source(tmp_path, split="test").pairs()} == {"scene002"}
    assert "no list of this part" in message(find_source(tmp_path, split="val"))


def test_realblur_with_both_parts_wants_to_know_which(tmp_path: Path) -> None:
    realblur(realblur(tmp_path), "R")
    with pytest.raises(InputError, match=r"which part of RealBlur\?.*J and R.*--blur J or --blur R"):
        find_source(tmp_path, split="train")
    with pytest.raises(InputError, match=r"which part of RealBlur\?.*blur_gamma"):
        find_source(tmp_path, split="train", blur="blur_gamma")
    source = find_source(tmp_path, split="test", blur="R")
    assert isinstance(source, RealBlurPairs) and source.subset == "R"
    assert all("RealBlur-R" in str(ref.lq) for ref in source.pairs())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("scene001/gt/gt_1.png\n", "line 1 is no pair"),
        # The two sides the other way round would train a network to blur.
        ("scene001/blur/blur_1.png scene001/gt/gt_1.png\n", "line 1 is no pair"),
        ("\n\n", "an empty list"),
        ("scene001/gt/gt_1.png scene001/blur/blur_1.png\n", "2 images are listed and not there"),
    ],
)
def test_realblur_with_a_bad_list(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "RealBlur_J_train_list.txt").write_text(text)
    assert expected in message(find_source(tmp_path, split="train"))


# Lists


@pytest.fixture
def images(tmp_path: Path) -> Path:
    touch(tmp_path, *(f"{side}/{scene}/{n}.png" for side in "ab" for scene in "xy" for n in range(2)))
    return tmp_path


def test_list_of_csv(images: Path) -> None:
    path = images / "pairs.csv"
    path.write_text(
        "\ufefflq,gt,split\na/x/0.png,b/x/0.png,\na/x/1.png, b/x/1.png,train\na/y/0.png,b/y/0.png,test\n"
    )
    source = find_source(path, split="train")
    assert isinstance(source, ListedPairs) and source.adapter == "list"
    assert listed(source.pairs(), images) == [
        ("a/x/0", str(images / "b/x"), "a/x/0.png", "b/x/0.png"),
        ("a/x/1", str(images / "b/x"), "a/x/1.png", "b/x/1.png"),
    ]
    assert [ref.key for ref in find_source(path, split="test").pairs()] == ["a/x/0", "a/y/0"]


def test_list_of_json_lines(images: Path) -> None:
    rows = [
        {"lq": "a/y/1.png", "gt": str(images / "b/y/1.png"), "scene": "s2", "key": "last"},
        {"lq": "a/x/0.png", "gt": "b/x/0.png", "scene": "s1", "split": None},
    ]
    path = images / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert listed(find_source(path, split="val").pairs(), images) == [
        ("a/x/0", "s1", "a/x/0.png", "b/x/0.png"),
        ("last", "s2", "a/y/1.png", "b/y/1.png"),
    ]
    assert {ref.key for ref in hold_out(find_source(path, split="val").pairs(), 0.5, test=True)} < {
        "a/x/0",
        "last",
    }


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.csv", "blurred,gt\na/x/0.png,b/x/0.png\n", "line 1, the header, names other columns"),
        ("p.csv", "lq,gt,weight\na/x/0.png,b/x/0.png,3\n", "line 1, the header, names other columns"),
        ("p.csv", "lq,gt\na/x/0.png,\n", "line 2 is no pair"),
        ("p.csv", "lq,gt\n", "no pairs of split train"),
        ("p.csv", "", "no pairs of split train"),
        ("p.csv", "lq,gt\na/x/0.png,b/x/9.png\n", "1 images are listed and not there"),
        ("p.csv", "lq,gt\na/x/0.png,b/x/0.png\na/x/0.png,b/x/0.png\n", "two pairs of one name"),
        ("p.jsonl", '{"lq": "a/x/0.png"\n', "line 1 is not JSON"),
        ("p.jsonl", "[1, 2]\n", "line 1 is no pair"),
    ],
)
def test_bad_lists_are_refused_by_line(images: Path, name: str, text: str, expected: str) -> None:
    (images / name).write_text(text)
    assert expected in message(find_source(images / name, split="train"))


def test_list_that_is_no_text(images: Path) -> None:
    (images / "p.csv").write_bytes(b"\xff\xfe\x00\x81")
    assert "not a text file" in message(find_source(images / "p.csv", split="train"))


def test_realblur_list_that_is_no_text(tmp_path: Path) -> None:
    (realblur(tmp_path) / "RealBlur_J_train_list.txt").write_bytes("sc\xe8ne".encode("latin-1"))
    line = message(find_source(tmp_path, split="train"))
    assert "not a text file" in line and "RealBlur_J_train_list.txt" in line


def test_line_separators_in_a_list_are_part_of_a_name(images: Path) -> None:
    row = {"lq": "a/x/0.png", "gt": "b/x/0.png", "key": "one\u2028two"}
    (images / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
    assert [ref.key for ref in find_source(images / "p.jsonl", split="train").pairs()] == [row["key"]]


def test_a_store_from_a_list(tmp_path: Path) -> None:
    """Through `prepare`, with real pixels."""
    refs: list[PairRef] = write_pairs(tmp_path, ["one/1", "one/2", "two/1"]).pairs()
    path = tmp_path / "pairs.csv"
    path.write_text("lq,gt,scene\n" + "".join(f"{ref.lq},{ref.gt},{ref.scene}\n" for ref in refs[:2]))
    source = find_source(path, split="train")
    result = run(source, source.pairs(), PrepareConfig(out=tmp_path / "store", crop_px=None, use_ray=False))
    assert result.manifest.num_pairs == 2 and result.manifest.adapter == "list"
    assert result.manifest.adapter_options == {"path": str(path), "split": "train"}
