from __future__ import annotations

import pickle
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nafnet_core import InputError
from pipelines import packed
from pipelines.packed import Packed, in_order, matched
from pipelines.sources import PairRef, place
from pipelines.sources.base import checked
from pipelines.sources.lmdbs import LmdbImage


def ref(number: int) -> PairRef:
    lq, gt = (Path("/data/train") / side / f"{number:06d}.png" for side in ("blur", "sharp"))
    return PairRef(key=f"{number:06d}", scene=f"{number // 100}", lq=lq, gt=gt)


# As a sequence


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 1000])
def test_it_is_as_a_list_of_the_same(count: int) -> None:
    values = [ref(number) for number in range(count)]
    ours = Packed(iter(values))
    assert len(ours) == count and bool(ours) == bool(values)
    assert list(ours) == values and list(reversed(ours)) == values[::-1]
    assert [ours[index] for index in range(-count, count)] == values * 2
    for cut in (slice(None), slice(250, 260), slice(-3, None), slice(5, 2), slice(None, None, -100)):
        assert ours[cut] == values[cut]
    for index in (count, -count - 1):
        with pytest.raises(IndexError):
            ours[index]


def test_it_grows_at_its_end() -> None:
    ours: Packed[int] = Packed()
    for number in range(600):
        ours.append(number)
        assert ours[-1] == number and len(ours) == number + 1
    ours.extend(range(600, 700))
    assert list(ours) == list(range(700))


def test_images_of_all_kinds_come_back_as_they_were() -> None:
    images = (Path("/a.png"), LmdbImage(Path("/a.lmdb"), "a"), place("s3://bucket/a.png?region=x"), None)
    values = [PairRef(key=str(n), scene="s", lq=images[n % 4], gt=images[n % 3]) for n in range(600)]
    ours = Packed(values)
    assert list(ours) == values
    assert pickle.loads(pickle.dumps(ours[7])) == values[7]  # as Ray's tasks get them


def test_names_of_all_kinds_come_back_as_they_were() -> None:
    names = ["a\nb", "é", "\u2028", "\udcff", "", "日本"] * 100
    assert list(Packed(names)) == names
    assert list(in_order(names)) == sorted(names)


def test_threads_see_the_same() -> None:
    ours = Packed(range(100_000))  # more blocks than are kept
    places = random.Random(0).choices(range(100_000), k=2_000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ours.__getitem__, places, chunksize=100)) == places


# In order, and matched


@given(st.lists(st.integers(-5, 5)))
def test_in_order_is_sorted_and_keeps_equal_ones_as_they_came(numbers: list[int]) -> None:
    values = [(number, place) for place, number in enumerate(numbers)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_RUN", 4)
        assert list(in_order(iter(values), key=lambda value: abs(value[0]))) == sorted(
            values, key=lambda value: abs(value[0])
        )


@given(*[st.lists(st.text("ab", max_size=2))] * 2)
def test_matched_gives_each_name_of_either_side(left: list[str], right: list[str]) -> None:
    sides = [[(name, number) for number, name in enumerate(names)] for names in (left, right)]
    expected = [
        (name, *([number for other, number in side if other == name] for side in sides))
        for name in sorted({*left, *right})
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_RUN", 3)
        assert list(matched(*map(iter, sides))) == expected


# As adapters use it


def test_a_key_of_two_pairs_far_apart_is_told(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.touch()
    refs = [PairRef(key=f"{number:05d}", scene="s", lq=image, gt=image) for number in range(2000)]
    assert [found.key for found in checked(reversed(refs), file=image)] == [r.key for r in refs]
    with pytest.raises(InputError, match=r"two pairs of one name: '.*a\.png' \(got 00003\)"):
        checked([*refs, refs[3]], file=image)


def test_ten_times_the_pairs_take_hardly_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_RUN", 1000)
    monkeypatch.setattr(packed, "_BLOCK", 32)  # of each run that is merged one is open
    monkeypatch.setattr(packed, "_unpacked", lru_cache(1)(packed._unpacked.__wrapped__))

    def peak_bytes(count: int) -> int:
        # Not paths: the interpreter's table of their parts grows by leaps.
        keys = (f"{number % 97:03d}/{number * 7919 % count:06d}" for number in range(count))
        root = Path("/data/train.lmdb")
        refs = (PairRef(key=key, scene=key[:3], lq=None, gt=LmdbImage(root, key)) for key in keys)
        tracemalloc.start()
        try:
            ours = Packed(in_order(refs, key=lambda pair: pair.key))
            assert len(ours) == sum(1 for _ in ours) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak_bytes(1000), peak_bytes(10_000)
    assert many - few < 9000 * 100  # as objects they have 400 bytes each
