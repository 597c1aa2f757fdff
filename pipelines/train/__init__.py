"""One training run: NAFNet with DDP on Ray Train.

    nafnet train --config gopro_width32 --data stores/gopro/train --val stores/gopro/test
    nafnet train --config mobile --data store/ --set budget.minutes=3      # a laptop
    nafnet train --config gopro_width64 --dry-run                          # seconds, without data

`checks.py`, `record.py` and `driver.py` run where the command does: they refuse what cannot be, start the
workers, send their journal to MLflow and TensorBoard, and turn Ctrl-C into a checkpoint. `worker.py`,
`loop.py`, `trainer.py`, `journal.py` and `validation.py` run in the workers.
"""

from pipelines.train.checks import check
from pipelines.train.driver import TrainResult, run
from pipelines.train.trial import DryRun, dry_run

__all__ = ["DryRun", "TrainResult", "check", "dry_run", "run"]
