"""Blur made on the fly: a function of seed and sample number; patches as if cut from a blurred photo."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nafnet_core import InputError
from nafnet_core.blur import Degradation, degrade, draw_degradation
from nafnet_core.transforms import dihedral
from pipelines import prepare
from pipelines.config import BlurSection, DataSection, StoreSection
from pipelines.ingest import PatchBatch, check_blur, data_digests, plan_for, read_patches
from pipelines.plan import SamplePlan, blur_rng
from pipelines.png import encode_png
from pipelines.prepare import PrepareConfig
from pipelines.sources import SharpPhotos
from pipelines.store import PairStore, patch_box
from tests.nafnet_core.test_kernels import HOOK
from tests.pipelines.pairs import piece
from tests.pipelines.test_store import KINDS

ALL = ("shake", "varying", "defocus", "gaussian")
PLAIN = {"max_noise": 0.0, "min_size_px": 4.0, "max_size_px": 12.0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of 150×130. Shared: look, do not touch."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(3):
        (root / f"{number}.png").write_bytes(encode_png(piece(number, 130, 150)))
    return root


@pytest.fixture(scope="module")
def photo_store(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """A store of sharp photos. Shared: look, do not touch."""
    return store_of(photos, tmp_path_factory.mktemp("sharp") / "store", format="lmdb", codec="raw")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one measured kernel."""
    root = tmp_path_factory.mktemp("kernels")
    hook = np.repeat((255 * HOOK / HOOK.max()).astype(np.uint8)[..., None], 3, axis=2)
    (root / "hook.png").write_bytes(encode_png(hook))
    return root


def store_of(photos: Path, out: Path, **options: object) -> PairStore:
    source = SharpPhotos(root=photos)
    config = PrepareConfig(out=out, crop_px=None, pairs_per_shard=2, use_ray=False)
    prepare.run(source, source.pairs(), replace(config, **options))
    return PairStore(out)


def plan_of(store: PairStore, seed: int = 5, augment: bool = False, **blur: object) -> SamplePlan:
    section = StoreSection(path=store.root, blur=BlurSection(**blur))
    return plan_for(DataSection(train=(section,), augment=augment), seed=seed)


def drawn_for(plan: SamplePlan, number: int) -> tuple[Degradation, np.random.Generator]:
    """What a sample that is blurred is blurred by, and what draws the rest."""
    (blur,) = plan.blurs
    assert blur is not None
    rng = blur_rng(int(plan.samples(np.array([number])).seed[0]))
    rng.random()  # whether it stays sharp
    return draw_degradation(rng, **blur.section.ranges()), rng


def read(store: PairStore, plan: SamplePlan, numbers: np.ndarray, patch_px: int = 48) -> PatchBatch:
    return read_patches(plan, [store], numbers, patch_px)


# The pixels


@pytest.mark.parametrize("jpeg", [None, 50])
@pytest.mark.parametrize("kind", [*ALL, "measured"])
def test_a_patch_is_cut_from_the_blurred_photo(
    photo_store: PairStore, kernels: Path, kind: str, jpeg: int | None
) -> None:
    measured = kernels if kind == "measured" else None
    plan = plan_of(photo_store, kinds=(kind,), kernels=measured, min_jpeg_quality=jpeg, **PLAIN)
    batch, planned = read(photo_store, plan, np.arange(12)), plan.samples(np.arange(12))
    for row in range(12):
        photo, rng = photo_store.pair(int(planned.pair[row])).gt, blur_rng(int(planned.seed[row]))
        assert rng.random() >= 0  # whether it stays sharp
        blur = plan.blurs[0]
        assert blur is not None
        degradation = draw_degradation(rng, **blur.section.ranges())
        whole = degrade(photo, degradation, rng, measured_kernels=blur.kernels)
        top, left, height, width = patch_box(
            photo.shape[:2], planned.top_share[row], planned.left_share[row], 48
        )
        window = (slice(top, top + height), slice(left, left + width))
        assert np.array_equal(batch.gt[row], photo[window])
        assert np.array_equal(batch.lq[row], whole[window])
        assert not np.array_equal(batch.lq[row], batch.gt[row])


def test_what_lies_around_a_patch_matters(photo_store: PairStore) -> None:
    plan = plan_of(photo_store, kinds=("defocus",), min_size_px=20.0, max_size_px=20.0, max_noise=0.0)
    batch, worst = read(photo_store, plan, np.arange(12)), []
    for row in range(12):
        degradation, rng = drawn_for(plan, row)
        alone = degrade(batch.gt[row], degradation, rng)
        difference = np.abs(alone.astype(int) - batch.lq[row])
        assert difference[12:-12, 12:-12].max() == 0
        worst.append(difference.max())
    assert np.median(worst) > 10, "patches that were blurred by themselves"


def test_both_sides_are_flipped_and_turned_afterwards(photo_store: PairStore) -> None:
    still = read(photo_store, plan_of(photo_store, kinds=ALL), np.arange(16))
    plan = plan_of(photo_store, kinds=ALL, augment=True)
    turned, variants = read(photo_store, plan, np.arange(16)), plan.samples(np.arange(16)).variant
    assert len(set(variants)) > 4
    for row in range(16):
        for before, after in ((still.lq, turned.lq), (still.gt, turned.gt)):
            assert np.array_equal(dihedral(before[row], int(variants[row])), after[row])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_the_form_of_the_store_changes_nothing(
    photo_store: PairStore, photos: Path, tmp_path: Path, kind: dict[str, str]
) -> None:
    other = store_of(photos, tmp_path / "store", **kind)
    first, second = (
        read(store, plan_of(store, kinds=ALL, min_jpeg_quality=40), np.arange(9))
        for store in (photo_store, other)
    )
    assert np.array_equal(first.lq, second.lq) and np.array_equal(first.gt, second.gt)


# A function of the sample


def test_samples_do_not_depend_on_one_another(photo_store: PairStore) -> None:
    plan, numbers = plan_of(photo_store, kinds=ALL), np.array([0, 1, 2, 7, 100, 10**6])
    together, again = read(photo_store, plan, numbers), read(photo_store, plan, numbers[::-1])
    assert np.array_equal(together.lq, again.lq[::-1])
    for row, number in enumerate(numbers):
        assert np.array_equal(read(photo_store, plan, np.array([number])).lq[0], together.lq[row])


def test_a_fresh_process_makes_the_same_pixels(photo_store: PairStore) -> None:
    code = (
        "import hashlib, numpy as np\n"
        "from pipelines.store import PairStore\n"
        "from tests.pipelines.test_blurring import ALL, plan_of, read\n"
        f"store = PairStore({str(photo_store.root)!r})\n"
        "batch = read(store, plan_of(store, kinds=ALL, min_jpeg_quality=40), np.arange(10))\n"
        "print(hashlib.sha256(batch.lq.tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    batch = read(photo_store, plan_of(photo_store, kinds=ALL, min_jpeg_quality=40), np.arange(10))
    assert done.stdout.strip() == hashlib.sha256(batch.lq.tobytes()).hexdigest()


def test_no_pair_comes_twice(photo_store: PairStore) -> None:
    # The photos are as large as the patch: only the blur can differ.
    plan = plan_of(photo_store, kinds=ALL, max_noise=0.0)
    numbers = np.arange(40 * plan.epoch_samples)
    batch, planned = read(photo_store, plan, numbers, 130), plan.samples(numbers)
    for pair in range(3):
        here = planned.pair == pair
        assert here.sum() == 40
        assert len({image.tobytes() for image in batch.lq[here]}) == 40
    other = read(photo_store, plan_of(photo_store, seed=6, kinds=ALL, max_noise=0.0), numbers[:20], 130)
    assert not np.array_equal(batch.lq[:20], other.lq)


GOLDEN = {
    "defocus": (5.700638365322087, [[[193, 182, 175], [192, 185, 177]], [[193, 183, 176], [195, 185, 177]]]),
    "shake": (7.764515628720707, [[[215, 185, 160], [219, 187, 161]], [[211, 180, 155], [216, 187, 159]]]),
    "varying": (10.702489739997223, [[[109, 92, 34], [112, 94, 49]], [[124, 105, 57], [130, 109, 53]]]),
}


def test_golden_samples(photo_store: PairStore) -> None:
    """Pixels to a level: processors round the last bit of a convolution in their own ways."""
    plan = plan_of(photo_store, seed=1, kinds=ALL)
    batch = read(photo_store, plan, np.arange(3))
    for row, (kind, (size_px, pixels)) in enumerate(GOLDEN.items()):
        drawn, _ = drawn_for(plan, row)
        assert (drawn.kind, drawn.size_px) == (kind, size_px)
        assert np.abs(batch.lq[row, 20:22, 30:32].astype(int) - pixels).max() <= 1


# Which blur


def test_shares_of_kinds_and_of_what_stays_sharp(store: PairStore) -> None:
    # This store has blurred images of its own.
    blur = {"kinds": ("shake", "gaussian"), "sharp_share": 0.25, "own_share": 0.25, "max_noise": 0.0}
    plan, numbers = plan_of(store, **blur), np.arange(600)
    batch, planned = read(store, plan, numbers, 8), plan.samples(numbers)
    counts = {"sharp": 0, "own": 0, "blurred": 0}
    for row in range(len(numbers)):
        own, gt = store.patch(int(planned.pair[row]), planned.top_share[row], planned.left_share[row], 8)
        assert np.array_equal(batch.gt[row], gt)
        if np.array_equal(batch.lq[row], gt):
            counts["sharp"] += 1
        elif np.array_equal(batch.lq[row], own):
            counts["own"] += 1
        else:
            counts["blurred"] += 1
    # Four standard deviations of 600 draws.
    assert counts["sharp"] == pytest.approx(150, abs=42) and counts["own"] == pytest.approx(150, abs=42)
    drawn = [drawn_for(plan, number)[0] for number in range(600)]
    assert sum(d.kind == "shake" for d in drawn) == pytest.approx(300, abs=50)
    sizes = [d.size_px for d in drawn if d.kind == "shake"]
    assert 3 <= min(sizes) < 4 and 14 < max(sizes) <= 15 and np.mean(sizes) == pytest.approx(9, abs=0.9)


def test_a_mixture_blurs_only_what_it_is_told_to(store: PairStore, photo_store: PairStore) -> None:
    sections = (
        StoreSection(path=store.root),
        StoreSection(path=photo_store.root, blur=BlurSection(), weight=9),
    )
    plan, stores = plan_for(DataSection(train=sections, augment=False), seed=0), [store, photo_store]
    batch, planned = read_patches(plan, stores, np.arange(72), 16), plan.samples(np.arange(72))
    assert set(planned.store) == {0, 1}
    for row in np.flatnonzero(planned.store == 0):
        lq, _ = store.patch(int(planned.pair[row]), planned.top_share[row], planned.left_share[row], 16)
        assert np.array_equal(batch.lq[row], lq)


# What is refused, and what is recorded


@pytest.mark.parametrize(
    ("blur", "message"),
    [
        (None, r"a store of sharp photos alone.*--set 'data\.train\.0\.blur\.kinds=\[shake\]'"),
        (BlurSection(own_share=0.1), r"a store of sharp photos alone.*Set data\.train\.0\.blur\.own_share=0"),
    ],
)
def test_sharp_photos_need_blur(photo_store: PairStore, blur: BlurSection | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_blur(DataSection(train=(StoreSection(path=photo_store.root, blur=blur),)))


def test_pairs_may_be_blurred_anew_or_not(store: PairStore, photo_store: PairStore) -> None:
    both = (StoreSection(path=store.root), StoreSection(path=store.root, blur=BlurSection(own_share=0.5)))
    check_blur(DataSection(train=(*both, StoreSection(path=photo_store.root, blur=BlurSection()))))


def test_kernels_travel_with_the_plan_and_name_the_data(
    photo_store: PairStore, kernels: Path, tmp_path: Path
) -> None:
    def section(folder: Path) -> DataSection:
        blur = BlurSection(kinds=("measured",), kernels=folder)
        return DataSection(train=(StoreSection(path=photo_store.root, blur=blur),))

    (tmp_path / "hook.png").write_bytes((kernels / "hook.png").read_bytes())
    data = section(tmp_path)
    plan = plan_for(data, seed=0)
    before = data_digests(data, plan)
    assert len(before) == 2 and before[0] == photo_store.digest
    (tmp_path / "hook.png").unlink()
    batch = read(photo_store, plan, np.arange(4))
    assert np.array_equal(batch.lq, read(photo_store, plan_for(section(kernels), seed=0), np.arange(4)).lq)
    with pytest.raises(InputError, match="no kernels in this folder"):
        plan_for(data, seed=0)
    other = encode_png(np.ascontiguousarray(np.full((3, 3, 3), 255, np.uint8)))
    (tmp_path / "hook.png").write_bytes(other)
    assert data_digests(data, plan_for(data, seed=0))[1] != before[1]
    # Without kernels there is nothing to add.
    plain = DataSection(train=(StoreSection(path=photo_store.root, blur=BlurSection()),))
    assert data_digests(plain, plan_for(plain, seed=0)) == [photo_store.digest]
