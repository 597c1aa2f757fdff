"""The workspace: runs, the MLflow data base, reports; one command finds there what another made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipelines.files import make_folder

DEFAULT = Path("nafnet-workspace")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Paths below one folder; nothing is created until something is written."""

    root: Path

    @classmethod
    def find(cls, given: Path | None = None) -> Workspace:
        """`given`, else NAFNET_WORKSPACE, else ./nafnet-workspace; absolute, as workers run elsewhere."""
        return cls((given or Path(os.environ.get("NAFNET_WORKSPACE", DEFAULT))).absolute())

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def database(self) -> Path:
        return self.root / "mlflow.db"

    @property
    def artifacts(self) -> Path:
        """Where MLflow keeps files when it has no server."""
        return self.root / "mlartifacts"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def exports(self) -> Path:
        """Exported models that are kept, a folder for each network; see `pipelines.export.kept`."""
        return self.root / "exports"

    def run_dir(self, name: str) -> Path:
        """Storage of one training run."""
        return self.runs / name

    def make(self) -> Workspace:
        """Create the folder. Raises `InputError` where it cannot be written."""
        make_folder(self.root)
        return self
