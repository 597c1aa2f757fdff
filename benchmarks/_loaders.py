"""What users otherwise read pairs with: PNG in two LMDBs through a DataLoader, and a plain loop."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cv2
import lmdb
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nafnet_core.transforms import dihedral_into
from pipelines.store import PairStore

_MAP_BYTES = 2**40


def write_png_lmdbs(store: PairStore, folder: Path) -> tuple[Path, Path]:
    """The pairs of a store as BasicSR keeps them: `lq.lmdb` and `gt.lmdb`, PNG under the pair's name."""
    folder.mkdir(parents=True, exist_ok=True)
    sides = folder / "lq.lmdb", folder / "gt.lmdb"
    with (
        lmdb.open(str(sides[0]), map_size=_MAP_BYTES) as lq,
        lmdb.open(str(sides[1]), map_size=_MAP_BYTES) as gt,
        lq.begin(write=True) as into_lq,  # one for all: each is synced to the disk
        gt.begin(write=True) as into_gt,
    ):
        for number in range(len(store)):
            pair = store.pair(number)
            for transaction, image in ((into_lq, pair.lq), (into_gt, pair.gt)):
                _, png = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
                transaction.put(b"%08d" % number, png.tobytes())
    return sides


class PngLmdbPairs(Dataset):
    """As BasicSR's PairedImageDataset in training: decode both, crop both, flip and turn both.

    Patches stay uint8, which BasicSR turns into float32 here: that would only slow it down.
    """

    def __init__(self, sides: tuple[Path, Path], num_pairs: int, patch_px: int) -> None:
        self._sides, self._num_pairs, self._patch_px = sides, num_pairs, patch_px
        self._envs: list[lmdb.Environment] = []

    def __len__(self) -> int:
        return self._num_pairs

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if not self._envs:
            self._envs = [
                lmdb.open(str(side), readonly=True, lock=False, readahead=False) for side in self._sides
            ]
        images = []
        for env in self._envs:
            with env.begin(write=False) as transaction:
                value = transaction.get(b"%08d" % number)
            images.append(cv2.imdecode(np.frombuffer(value, np.uint8), cv2.IMREAD_COLOR))
        side = self._patch_px
        top = random.randint(0, images[0].shape[0] - side)
        left = random.randint(0, images[0].shape[1] - side)
        patches = [image[top : top + side, left : left + side] for image in images]
        if random.random() < 0.5:
            patches = [patch[:, ::-1] for patch in patches]
        if random.random() < 0.5:
            patches = [patch[::-1] for patch in patches]
        if random.random() < 0.5:
            patches = [patch.transpose(1, 0, 2) for patch in patches]
        lq, gt = (
            torch.from_numpy(np.ascontiguousarray(patch[..., ::-1].transpose(2, 0, 1))) for patch in patches
        )
        return lq, gt


def data_loader(sides: tuple[Path, Path], num_pairs: int, patch_px: int, batch: int) -> DataLoader:
    """One consumer's loader: one worker process, several batches ahead, workers kept between epochs."""
    return DataLoader(
        PngLmdbPairs(sides, num_pairs, patch_px),
        batch_size=batch,
        shuffle=True,
        num_workers=1,
        prefetch_factor=4,
        persistent_workers=True,
        drop_last=True,
    )


def plain_loop(root: Path, patch_px: int, batch: int, seed: int) -> Any:
    """Batches from the memory-mapped raw shards of a store, as fast as one process copies them."""
    rng = np.random.default_rng(seed)
    shards = []
    for path in sorted(root.glob("*.lmdb")):
        env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)
        shards.append((env, (env.stat()["entries"] - 1) // 2))
    side = 0
    while True:
        lq, gt = (np.empty((batch, patch_px, patch_px, 3), np.uint8) for _ in range(2))
        for row in range(batch):
            env, num_pairs = shards[rng.integers(len(shards))]
            number, variant = rng.integers(num_pairs), rng.integers(8)
            with env.begin(buffers=True) as transaction:
                for name, out in ((b"lq", lq), (b"gt", gt)):
                    flat = np.frombuffer(transaction.get(b"%08d/%s" % (number, name)), np.uint8)
                    side = side or int((len(flat) // 3) ** 0.5)
                    image = flat.reshape(side, side, 3)
                    if name == b"lq":
                        top, left = rng.integers(side - patch_px + 1, size=2)
                    dihedral_into(out[row], image[top : top + patch_px, left : left + patch_px], int(variant))
        yield lq, gt
