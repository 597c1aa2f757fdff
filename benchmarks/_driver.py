"""The driver's part of `prepare` in a process of its own, where only decoding and encoding are left out.

    python benchmarks/_driver.py FOLDER         # of `make_layout`; prints one JSON object

The workers write each shard's note and no shard.
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

_PAIRS_A_SCENE = 1000
_CROPS_A_PAIR = 8  # 512² of a 1280×720 frame


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
        start = time.perf_counter()
        config = prepare.PrepareConfig(out=Path(temporary) / "store")
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
    count = _CROPS_A_PAIR * len(job.refs)
    file = shard_name(job.number, job.config.format)
    note = {
        "info": {"file": file, "pairs": count, "bytes": 200_000_000, "sha256": f"{job.number:064x}"},
        "digests": base64.b64encode(os.urandom(32 * count)).decode(),
        "min_side_px": 512,
        "refused": [],
        "suspects": [],
        "scenes": sorted({ref.scene for ref in job.refs}),
    }
    folder(job.config.out).below(".progress").write(note_name(job.number), json_bytes(note))
    return {"refused": "", "is_input": True}


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
