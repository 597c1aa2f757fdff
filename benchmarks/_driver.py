"""The driver's part of `prepare` in a process of its own, from the folders to the manifest.

    python benchmarks/_driver.py FOLDER         # of `make_layout`; prints one JSON object

It goes on with a store of which all but 2,000 shards are there, as after an interruption. Workers write the
notes of those, and no shard: only decoding and encoding are left out.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from pipelines import prepare  # noqa: E402
from pipelines.files import json_bytes  # noqa: E402
from pipelines.notes import note_name, shard_name  # noqa: E402
from pipelines.sources import find_source  # noqa: E402
from pipelines.storage import folder  # noqa: E402
from pipelines.store import PROGRESS  # noqa: E402

_PAIRS_A_SCENE = 1000
_CROPS_A_PAIR = 8  # 512² of a 1280×720 frame
_SHARDS_BY_WORKERS = 2000  # several waves; the rest would be more of the same, for ten minutes


def make_layout(root: Path, num_pairs: int) -> None:
    """Two folders of pairs whose sharp images all differ in content, and hardly in size.

    So each is looked into, and none is a duplicate. The blurred ones, not looked at then, are links.
    """
    for number in range(num_pairs):
        scene, name = f"{number // _PAIRS_A_SCENE:05d}", f"{number % _PAIRS_A_SCENE:06d}.png"
        blurred = root / "blur" / scene / "000000.png"
        if number % _PAIRS_A_SCENE == 0:
            (root / "sharp" / scene).mkdir(parents=True)
            blurred.parent.mkdir(parents=True)
            blurred.touch()
        else:
            os.link(blurred, blurred.with_name(name))
        (root / "sharp" / scene / name).write_bytes(b"%d" % number)


def measured(layout: Path) -> dict[str, float]:
    """What this file prints, run in a fresh process: peaks would mix."""
    command = [sys.executable, str(Path(__file__)), str(layout)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from cluster.connect import connect

    prepare._write_row = _note_only
    source = find_source(Path(sys.argv[1]), split="train")
    with connect(), tempfile.TemporaryDirectory() as temporary:
        start, steps = time.perf_counter(), []
        refs = source.pairs()
        listed_s = time.perf_counter() - start
        config = prepare.PrepareConfig(out=Path(temporary) / "store")
        _write_rest(config, len(refs))
        start = time.perf_counter()
        manifest = prepare.run(
            source, refs, config, on_progress=lambda *_: steps.append(time.perf_counter() - start)
        ).manifest
        total_s = time.perf_counter() - start
    assert manifest.num_pairs == _CROPS_A_PAIR * len(refs) and not manifest.num_refused
    # Not `ru_maxrss`, which a child inherits from the process that started it.
    status = Path("/proc/self/status").read_text()
    peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
    figures = {"peak_mib": peak_mib, "listed_s": listed_s, "begun_s": steps[0], "total_s": total_s}
    print(json.dumps(figures))


def _note_only(row: dict[str, Any]) -> dict[str, Any]:
    job = row["job"]
    note = _note(job.number, len(job.refs), sorted({ref.scene for ref in job.refs}))
    folder(job.config.out).below(PROGRESS).write(note_name(job.number), note)
    return {"refused": "", "is_input": True}


def _write_rest(config: prepare.PrepareConfig, num_pairs: int) -> None:
    progress = Path(config.out) / PROGRESS
    progress.mkdir(parents=True)
    for start in range(_SHARDS_BY_WORKERS * config.pairs_per_shard, num_pairs, config.pairs_per_shard):
        number, count = start // config.pairs_per_shard, min(config.pairs_per_shard, num_pairs - start)
        (progress / note_name(number)).write_bytes(_note(number, count, [f"{start // _PAIRS_A_SCENE:05d}"]))
        (Path(config.out) / shard_name(number, config.format)).touch()


def _note(number: int, num_pairs: int, scenes: list[str]) -> bytes:
    """What is written down of a shard whose file is empty."""
    count = _CROPS_A_PAIR * num_pairs
    info = {"file": shard_name(number, "parquet"), "pairs": count, "bytes": 0, "sha256": f"{number:064x}"}
    digests = base64.b64encode(os.urandom(32 * count)).decode()
    rows = {"refused": [], "suspects": [], "scenes": scenes}
    return json_bytes({"info": info, "digests": digests, "min_side_px": 512, **rows})


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
