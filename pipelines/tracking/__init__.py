"""MLflow and TensorBoard: one client, on the driver; rank 0's journal in the run's storage is what it sends.

`client.py` opens and checks MLflow's store; `tracker.py` draws a run's journal for TensorBoard and has
`sender.py`, a thread, send it to MLflow; `state.py` keeps in the run's folder how far both are. A row counts
as sent once the server took it, so a server that is away loses nothing. A restarted run goes on in the same
MLflow run.
"""

from pipelines.tracking.client import check_database, fluent, make_experiment, mlflow_client, tracking_uri
from pipelines.tracking.machine import machine_tags
from pipelines.tracking.opening import DataSet, Opening, flattened
from pipelines.tracking.rows import Row, read_rows
from pipelines.tracking.state import TRACKING
from pipelines.tracking.tracker import Tracker

__all__ = [
    "TRACKING",
    "DataSet",
    "Opening",
    "Row",
    "Tracker",
    "check_database",
    "flattened",
    "fluent",
    "machine_tags",
    "make_experiment",
    "mlflow_client",
    "read_rows",
    "tracking_uri",
]
