"""The curves of the bundled model's runs, exported from MLflow: curves.csv and curves.png beside this file.

    python curves.py nafnet-workspace mobile-v1-first:72600 mobile-v1-second:120000 mobile-v1-third:104000 …

Runs in their order, each beginning with the weights of the one before; `:SAMPLES` is where that was taken.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipelines.pictures import curves  # noqa: E402
from pipelines.tracking import mlflow_client  # noqa: E402
from pipelines.workspace import Workspace  # noqa: E402

_PANELS = {"train/loss": "L1 loss", "train/lr": "learning rate", "val/psnr_db": "validation PSNR, dB"}
_EVERY = 20  # rows of training come every two seconds


def main() -> None:
    workspace, folder = Workspace(Path(sys.argv[1]).absolute()), Path(__file__).resolve().parent
    client = mlflow_client(workspace)
    rows: list[tuple[str, str, int, float]] = []
    ends: list[int] = []
    for spec in sys.argv[2:]:
        name, _, until = spec.partition(":")
        run_id = json.loads((workspace.run_dir(name) / "tracking.json").read_text())["run_id"]
        begin = ends[-1] if ends else 0
        last = 0
        for metric in (*_PANELS, "val/ssim", "val/gain_db"):
            history = sorted(client.get_metric_history(run_id, metric), key=lambda point: point.step)
            kept = [point for point in history if not until or point.step <= int(until)]
            kept = kept if metric.startswith("val/") else kept[::_EVERY]
            rows += [(name, metric, begin + point.step, point.value) for point in kept]
            last = max([last, *(point.step for point in kept)])
        ends.append(begin + (int(until) if until else last))
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "metric", "samples", "value"])
        writer.writerows((run, metric, samples, f"{value:.6g}") for run, metric, samples, value in rows)
    series = {
        label: [(samples, value) for _, metric, samples, value in rows if metric == wanted]
        for wanted, label in _PANELS.items()
    }
    curves(folder / "curves.png", series, title="mobile-v1", marks=ends[:-1])


if __name__ == "__main__":
    main()
