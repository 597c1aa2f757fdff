"""The commands of the pages below, parsed as they would be run; the rest needs a cloud."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import jobs
from pipelines.cli.parsing import options_of

_ROOT = Path(__file__).resolve().parents[2]
_PAGES = ("docs/cluster.md", "docs/serving.md", "README.md")


def _commands(program: str) -> list[list[str]]:
    """Each call of a program in the pages' blocks of shell, in words."""
    found = []
    for page in _PAGES:
        for block in re.findall(r"```sh\n(.*?)```", (_ROOT / page).read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.replace(" …", ""), comments=True)
                for part in _parts(words):
                    if part[:1] == [program]:
                        found.append(part[1:])
    return found


def _parts(words: list[str]) -> list[list[str]]:
    """The commands of a line that are joined by `&&` or `|`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


@pytest.mark.parametrize("words", _commands("nafnet"), ids=shlex.join)
def test_a_command_of_ours_is_understood(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.yaml", "job.yaml"):
        Path(name).write_text((_ROOT / "configs" / "mobile.yaml").read_text())
    options_of(words)
    if words[:2] == ["cluster", "submit"]:
        jobs._checked(words[words.index("--") + 1 :])


def test_the_pages_have_commands() -> None:
    assert len(_commands("nafnet")) > 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("words", _commands("ray"), ids=shlex.join)
def test_a_command_of_rays_exists(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    command: Any = cli.commands[words[0]]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known
