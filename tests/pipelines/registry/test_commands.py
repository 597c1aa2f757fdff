"""`nafnet registry …` as it is typed: tables, JSON, exit codes, one clear line for each mistake."""

from __future__ import annotations

import json
import logging
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nafnet_core import CapabilityError
from pipelines.cli import main
from pipelines.models import open_model
from pipelines.registry import version_of
from pipelines.registry.connection import asking
from pipelines.store import PairStore
from pipelines.workspace import Workspace
from tests.pipelines.registry.brighteners import write_brightener

_LOOSE = ("--max-latency-ratio", 50)


class _Command:
    """Runs `nafnet registry` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys, self._patch = capsys, patch

    def __call__(self, *arguments: object, code: int = 0) -> tuple[str, str]:
        """What it printed, and what it said on stderr."""
        self._patch.setattr(sys, "argv", ["nafnet", "registry", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed, said = self._capsys.readouterr()
        assert ended.value.code == code, said
        return printed, said

    def json(self, *arguments: object, code: int = 0) -> dict:
        return json.loads(self(*arguments, "--json", code=code)[0])


@pytest.fixture
def command(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[_Command]:
    monkeypatch.setenv("NAFNET_WORKSPACE", str(workspace.root))
    monkeypatch.setenv("COLUMNS", "80")
    loggers = [logging.getLogger(name) for name in ("pipelines", "cluster", "nafnet_core")]
    before = [(logger.handlers, logger.level) for logger in loggers]
    yield _Command(capsys, monkeypatch)
    for logger, (handlers, level) in zip(loggers, before, strict=True):
        logger.handlers = handlers
        logger.setLevel(level)


def _models(workspace: Workspace, *strengths: float) -> list[Path]:
    return [write_brightener(workspace.root / f"model-{s}.safetensors", s) for s in strengths]


def test_the_whole_life_of_two_versions(
    command: _Command, workspace: Workspace, store: PairStore, tmp_path: Path
) -> None:
    dim, bright = _models(workspace, 0.3, 0.8)
    assert "Nothing is registered yet" in command("list")[0]
    assert command.json("register", dim, "--on", store.root)["version"] == 1
    assert "champion" in command("promote", "--on", store.root)[0]
    assert version_of(open_model(str(bright), workspace), workspace) is None
    assert "Version 2 is the candidate" in command("register", bright, "--on", store.root)[0]
    found = version_of(open_model(str(bright), workspace), workspace)
    assert found is not None and (found.version, found.aliases) == (2, ("candidate",))
    assert version_of(open_model(str(bright), workspace, train_patch_px=48), workspace) is None
    printed, said = command("promote", "--on", store.root, "--min-gain-db", 20, code=3)
    assert "gain ≥ 20" in printed and said.count("\n") == 1 and "version 2 is not promoted: PSNR" in said
    refused = command.json("promote", "--on", store.root, "--max-ssim-drop", -9, code=3)
    assert refused["refused"] and refused["version"] == 2
    moved = command.json("promote", "--on", store.root, *_LOOSE, "--reason", "brighter")
    assert (moved["before"], moved["version"], moved["number"], moved["forced"]) == (1, 2, 4, False)
    assert "champion already" in command("promote", "--on", store.root)[0]

    listed = command("list")[0]
    assert max(map(len, listed.splitlines())) <= 80
    for told in ("champion", "model-", "+6.4", "+2.5", "store"):
        assert told in listed, told
    history = command("history")[0]
    assert "promote 1 → 2" in history and "brighter" in history and "come to version 1" in history
    assert max(map(len, history.splitlines())) <= 80
    newest = command.json("history", "--limit", 1)
    assert len(newest) == 1 and len(newest[0]["candidate"]["images"]) == 4
    shown = command("show", "champion")[0]
    assert "MODEL_CARD.md" in shown and "promote 1 → 2" in shown
    assert command.json("show", "2")["card"]["report"]["num_images"] == 4
    compared = command("compare", "2", "1", store.root)[0]
    assert "worse on 4, by more than 0.5 dB on 4" in compared and "Where B loses most" in compared
    assert command.json("compare", "1", "2")["gain_db"] > 3

    assert "Version 1 is the champion again, after version 2" in command("rollback", "--reason", "haloes")[0]
    assert "Version 2 is deleted" in command("delete", "2")[0]
    actions = [(move["action"], move["reason"]) for move in command.json("history")]
    assert actions[:2] == [("delete", ""), ("rollback", "haloes")]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("promote", "--on", "STORE"), "there is no candidate yet"),
        (("promote", 7, "--on", "STORE"), "there is no such version (got 7)"),
        (("promote", "--on", "STORE", "--force"), "--force needs --reason"),
        (("promote", "--on", "STORE", "--max-regressed-share", 2), "expected 0 to 1, got 2"),
        (("rollback",), "there is nothing to roll back to (got no champion)"),
        (("show", "champion"), "there is no champion yet"),
        (("show", "best"), "there is no such alias (got best)"),
        (("delete", 3), "there is no such version (got 3)"),
        (("register", "nowhere.safetensors"), "no such model"),
        (("compare", "champion", "candidate", "STORE"), "no version is the champion yet"),
    ],
)
def test_each_mistake_is_one_line(
    command: _Command, store: PairStore, typed: tuple[object, ...], said: str
) -> None:
    arguments = [store.root if part == "STORE" else part for part in typed]
    _, line = command(*arguments, code=2)
    assert line.startswith("nafnet: ") and line.count("\n") == 1 and said in line, line


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:9", "postgresql+psycopg2://me:secret@127.0.0.1:9/registry"]
)
def test_a_server_that_does_not_answer(command: _Command, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for typed in ("list", "history", "rollback"):
        _, said = command(typed, code=4)
        assert said.count("\n") == 1 and "does not answer" in said and "MLFLOW_TRACKING_URI" in said
        assert "secret" not in said


def test_reports_of_versions_without_one_are_not_compared(command: _Command, workspace: Workspace) -> None:
    for path in _models(workspace, 0.3, 0.8):
        command("register", path)
    assert "no report lies with this model (got 1)" in command("compare", "1", "2", code=2)[1]


@pytest.mark.slow
@pytest.mark.parametrize("is_known", [True, False])
def test_a_data_base_that_stays_locked_is_one_line(
    is_known: bool, workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CapabilityError, match="cannot do this now.*locked") as raised:
        with asking(workspace) as client:
            if is_known:
                client.search_registered_models()  # or MLflow looks at its tables first
            connection = sqlite3.connect(workspace.database)
            connection.execute("BEGIN EXCLUSIVE")
            try:
                client.create_registered_model("another")
            finally:
                connection.close()
    assert "\n" not in str(raised.value)
    assert "Traceback" not in capfd.readouterr().err
