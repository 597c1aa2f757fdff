"""What MODEL means on the command line: a weights file, a run, a registered version, the bundled one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nafnet_core import CapabilityError, InputError
from nafnet_core.foreign import ForeignNetwork
from nafnet_core.model import NAFNet
from nafnet_core.weights import load_model
from pipelines.checkpoint import LEDGER, CheckpointLedger
from pipelines.files import sha256
from pipelines.tracking import fluent, mlflow_client, tracking_uri
from pipelines.tracking.client import reason
from pipelines.urls import public
from pipelines.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient

_REGISTRY = "models:/"
REGISTERED_NAME = "nafnet-deblur"
CHAMPION = f"{_REGISTRY}{REGISTERED_NAME}@champion"
BUNDLED_NAME = "mobile-v1"
BUNDLED = Path(__file__).parent / "bundled" / f"{BUNDLED_NAME}.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
EXPORTED_SUFFIXES = (".onnx", ".xml")
"""Of files that `pipelines.export.open_runnable` takes beside weights."""
WEIGHTS_IN_VERSION = "artifacts/model.safetensors"
_NO_ANSWER = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR")
# MLflow's answers to an alias of no model, and to no such alias of a model.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A network ready to run, and where it came from."""

    model: NAFNet | ForeignNetwork
    """fp32, eval mode, on the CPU; a `ForeignNetwork` only from `pipelines.export.open_exported`."""
    label: str
    """What to call it in tables and records."""
    weights: Path
    digest: str
    """SHA-256 of the weights file; of an exported model's, over all of its files."""
    metadata: dict[str, Any]
    version: str | None = None
    """`models:/NAME/VERSION` where it is a registered one, also of an alias; else None."""

    @property
    def train_patch_px(self) -> int | None:
        """Patch side in training, for local statistics; None where the file does not say."""
        return self.metadata.get("train_patch_px")

    @property
    def weights_digest(self) -> str:
        """SHA-256 of the weights file; of an exported model, of the one that it was made of."""
        is_foreign = isinstance(self.model, ForeignNetwork)
        return self.metadata["export"]["weights_sha256"] if is_foreign else self.digest

    @property
    def backend(self) -> str:
        """What runs it: `torch`, or the runtime that it was exported for."""
        return self.metadata["export"]["runtime"] if isinstance(self.model, ForeignNetwork) else "torch"

    @property
    def fixed_precision(self) -> str | None:
        """What an exported model computes in, and a quantised one; None of weights that leave it open."""
        if isinstance(self.model, ForeignNetwork):
            return self.metadata["export"]["precision"]
        return "fp32" if self.model.config.int8_layers else None

    def check_rgb(self) -> None:
        """Raise `InputError` where its images have other channels than RGB."""
        if (channels := self.model.config.img_channel) != 3:
            raise InputError("the model does not restore RGB", file=self.label, got=f"{channels} channels")

    def check_travels(self) -> None:
        """Raise `InputError` where no other process can have it: an exported one lives in its runtime."""
        if isinstance(self.model, ForeignNetwork):
            raise InputError(
                "an exported model runs in this process alone", file=self.weights,
                got="--workers or --address", fix="Name the weights, or drop these",
            )  # fmt: skip


def is_exported(spec: str | None) -> bool:
    """Whether this names an exported file, which has a back end and a precision of its own."""
    return spec is not None and Path(spec).suffix in EXPORTED_SUFFIXES


def open_model(
    spec: str | None,
    workspace: Workspace,
    *,
    train_patch_px: int | None = None,
    fetched_to: Path | None = None,
) -> LoadedModel:
    """Load what `spec` names.

    Args:
        spec: a `.safetensors` or official `.pth`, a run's folder or its name in the workspace,
            `models:/NAME@ALIAS` or `models:/NAME/VERSION`, or `mobile-v1`, which comes with this package.
            None takes the workspace's champion, and where there is none, `mobile-v1`.
        workspace: where runs and the registry are.
        train_patch_px: patch side in training, instead of what the file says (an official `.pth` says
            nothing); 0 turns local statistics off.
        fetched_to: folder for the files of a registered version; None takes them where they are, or has
            MLflow fetch them to a temporary folder that stays.

    Raises:
        InputError: there is no such model, or it is no NAFNet.
    """
    label, weights, version = _found(spec, workspace, fetched_to)
    model, metadata = load_model(weights)
    if train_patch_px is not None:
        metadata = {**metadata, "train_patch_px": train_patch_px or None}
    return LoadedModel(
        model=model,
        label=label,
        weights=weights,
        digest=sha256(weights),
        metadata=metadata,
        version=version,
    )


def find_weights(
    spec: str | None, workspace: Workspace, *, fetched_to: Path | None = None
) -> tuple[str, Path]:
    """Label and weights file of `spec`; see `open_model`."""
    return _found(spec, workspace, fetched_to)[:2]


def _found(spec: str | None, workspace: Workspace, fetched_to: Path | None) -> tuple[str, Path, str | None]:
    """Label, weights file, and `models:/NAME/VERSION` of a registered one."""
    if spec is None:
        spec = BUNDLED_NAME if champion_version(workspace) is None else CHAMPION
    if spec.startswith(_REGISTRY):
        return _registered(spec, workspace, fetched_to)
    for folder in (Path(spec), workspace.run_dir(spec), workspace.root / spec):  # also as `runs/NAME`
        if (folder / "checkpoints" / LEDGER).is_file():
            ledger = CheckpointLedger(folder)
            best = ledger.best()
            assert best is not None, "a ledger has at least one entry"
            return f"run {folder.name} at {best.samples} samples", ledger.weights(best), None
    path = Path(spec)
    if spec == BUNDLED_NAME and not path.exists():
        return f"{BUNDLED_NAME}, which comes with this package", BUNDLED, None
    if not path.exists():
        raise InputError(
            "no such model", file=spec, expected="a file, a run, or models:/NAME@ALIAS",
            fix="`nafnet registry list` shows what is registered",
        )  # fmt: skip
    if path.is_dir():
        raise InputError("no checkpoints in this folder", file=path, expected="a training run")
    return path.name, path, None


def is_unmade(workspace: Workspace) -> bool:
    """Whether the registry is a data base of the workspace's that nothing was written to yet."""
    return not workspace.database.exists() and tracking_uri(workspace).startswith("sqlite:")


def is_model(spec: str, workspace: Workspace) -> bool:
    """Whether a text names a model, where it might name a folder of images or a store as well.

    It does if it is `models:/…`, ends as a weights or exported file does, or is a run's folder; or
    `mobile-v1` or the name of a run in the workspace, unless there is something of that name here.

    Raises:
        InputError: both, a run in the workspace and something else here.
    """
    if spec.startswith(_REGISTRY) or spec.endswith((*WEIGHT_SUFFIXES, *EXPORTED_SUFFIXES)):
        return True
    path = Path(spec)
    if (path / "checkpoints" / LEDGER).is_file():
        return True
    if spec == BUNDLED_NAME:
        return not path.exists()
    is_name = path.name == spec and (workspace.run_dir(spec) / "checkpoints" / LEDGER).is_file()
    if is_name and path.exists():
        raise InputError(
            "this is a run in the workspace, and something else here as well",
            got=spec,
            fix=f"Write {workspace.run_dir(spec)} for the run, ./{spec} for what is here",
        )
    return is_name


def alias_version(client: MlflowClient, alias: str) -> int | None:
    """Version that an alias of the registered model points at; None where there is none.

    Raises:
        MlflowException: the registry does not answer, of which nothing must be concluded.
    """
    from mlflow.exceptions import MlflowException

    try:
        return int(client.get_model_version_by_alias(REGISTERED_NAME, alias).version)
    except MlflowException as error:
        if error.error_code in _NOT_THERE:
            return None
        raise


def champion_version(workspace: Workspace) -> int | None:
    """Version that is the champion; None where there is none, or no registry yet, of which none is made.

    Raises:
        CapabilityError: the registry does not answer.
    """
    if is_unmade(workspace):
        return None
    client = mlflow_client(workspace)
    from mlflow.exceptions import MlflowException

    try:
        return alias_version(client, "champion")
    except MlflowException as error:
        raise _no_answer(error, client) from error


def _no_answer(error: Exception, client: MlflowClient) -> CapabilityError:
    uri = str(client.tracking_uri)
    return CapabilityError("the registry does not answer", file=public(uri), got=reason(error, uri))


def _registered(spec: str, workspace: Workspace, fetched_to: Path | None) -> tuple[str, Path, str]:
    client = mlflow_client(workspace)
    import mlflow
    from mlflow.exceptions import MlflowException

    name, _, version = spec.removeprefix(_REGISTRY).partition("/")
    name, _, alias = name.partition("@")
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else None
        version = found.version if found else version
        with fluent(client):
            folder = mlflow.artifacts.download_artifacts(
                artifact_uri=f"{_REGISTRY}{name}/{version}", dst_path=fetched_to and str(fetched_to)
            )
    except MlflowException as error:
        if error.error_code in _NO_ANSWER:
            raise _no_answer(error, client) from error
        raise InputError(
            f"no version is the {alias} yet" if alias else "no such registered model",
            file=spec,
            got=None if alias else str(error).splitlines()[0][:150],
            fix="`nafnet registry list` shows what is registered",
        ) from error
    label = f"{name} version {version}" + (f" ({alias})" if alias else "")
    return label, Path(folder) / WEIGHTS_IN_VERSION, f"{_REGISTRY}{name}/{version}"
