"""The file of Ray's cluster launcher, checked before the first machine is started.

launch = read(Path("ray_cluster.yaml"))
check_ready(launch)
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nafnet_core.errors import CapabilityError, InputError

DEFAULT_FILE = Path("ray_cluster.yaml")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_TO_FILL_IN = "FILL-IN"
_SSH_TIMEOUT_S = 10
_SHOWN = 160  # characters of what a library says


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Machines of one kind in a launcher's file."""

    name: str
    machine: str
    """Type of the provider's, or addresses."""
    least: int
    most: int
    is_head: bool = False
    is_spot: bool = False


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a launcher's file says."""

    file: Path
    name: str
    provider: str
    groups: tuple[NodeGroup, ...]
    content: dict[str, Any]
    """The file, as it was read."""


def read(file: Path) -> Launch:
    """A launcher's file, checked by Ray's own loader and schema.

    Raises:
        InputError: no such file, or what is wrong with it, in Ray's words.
    """
    if not file.is_file():
        raise InputError("no such file", file=file, expected="a file of Ray's cluster launcher")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError("not a YAML file", file=file, got=str(error)[:_SHOWN]) from error
    if not isinstance(content, dict) or not isinstance(content.get("provider"), dict):
        raise InputError(
            "not a file of Ray's cluster launcher",
            file=file,
            expected="`cluster_name`, `provider`, and what else a cluster is",
        )
    prepared = _prepared(content, file)
    head = prepared.get("head_node_type")
    groups = [
        _group(name, kind, is_head=name == head)
        for name, kind in prepared.get("available_node_types", {}).items()
    ]
    if content["provider"]["type"] == "local":
        # One kind for all, and more of it than was written: Ray's own way to hold addresses.
        hosts = content["provider"]
        groups = [
            NodeGroup(name="head", machine=str(hosts.get("head_ip")), least=1, most=1, is_head=True),
            NodeGroup(
                name="workers",
                machine=", ".join(hosts.get("worker_ips", [])),
                least=min(prepared["max_workers"], len(hosts.get("worker_ips", []))),
                most=prepared["max_workers"],
            ),
        ]
    return Launch(
        file=file,
        name=str(prepared["cluster_name"]),
        provider=str(content["provider"]["type"]),
        groups=tuple(sorted(groups, key=lambda group: not group.is_head)),
        content=content,
    )


def _group(name: str, kind: dict[str, Any], *, is_head: bool) -> NodeGroup:
    node = kind.get("node_config") or {}
    market = (node.get("InstanceMarketOptions") or {}).get("MarketType")
    return NodeGroup(
        name=name,
        machine=str(node.get("InstanceType") or node.get("machineType") or ""),
        least=1 if is_head else int(kind.get("min_workers", 0)),
        most=1 if is_head else int(kind.get("max_workers", 0)),
        is_head=is_head,
        is_spot=market == "spot",
    )


def _prepared(content: dict[str, Any], file: Path) -> dict[str, Any]:
    """The file with Ray's defaults, checked. Nobody is asked, and no cloud's library is needed."""
    import click
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    said = io.StringIO()
    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)  # what it fills in is of no interest
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            prepared = prepare_config(content)
            for kind in (prepared.get("available_node_types") or {}).values():
                if isinstance(kind, dict):
                    kind.setdefault("resources", {})  # clouds fill them in, once they are asked
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        raise InputError(
            "Ray's cluster launcher refuses this file",
            file=file,
            got=f"{error.json_path.removeprefix('$').removeprefix('.') or 'top level'}: "
            f"{error.message[:_SHOWN]}",
        ) from error
    except (click.ClickException, SystemExit) as error:  # Ray has printed why
        lines = COLOURS.sub("", said.getvalue()).strip().splitlines()
        raise InputError(
            "Ray's cluster launcher refuses this file",
            file=file,
            got=lines[-1].partition(" -- ")[2] or lines[-1] if lines else error,
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        got = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError("Ray's cluster launcher refuses this file", file=file, got=got) from error
    return prepared


def check_ready(launch: Launch) -> None:
    """Look for what would fail after minutes, on machines that are paid for by then.

    Raises:
        InputError: something in the file is still to be filled in, or a file that it names is not there.
        CapabilityError: no `ssh` or `rsync` here, or no way to the head.
    """
    for key, value in _strings(launch.content):
        if _TO_FILL_IN in value:
            raise InputError(
                "still to be filled in",
                file=launch.file,
                got=f"{key}: {value}",
                fix="The file says with what",
            )
    for program in ("ssh", "rsync"):
        if shutil.which(program) is None:
            raise CapabilityError(
                f"Ray's cluster launcher needs `{program}` here", fix=f"Install it: apt-get install {program}"
            )
    places = dict(launch.content.get("file_mounts") or {})
    key = (launch.content.get("auth") or {}).get("ssh_private_key")
    for name, place in [*places.items(), *([("auth.ssh_private_key", key)] if key else [])]:
        path = launch.file.parent / Path(str(place)).expanduser()
        if not path.exists():
            raise InputError(
                f"no such file, though {name!r} asks for it",
                file=place,
                fix="Make a token: ray get-auth-token --generate" if path.name == "auth_token" else None,
            )
    if launch.provider == "local":
        _check_way_to_head(launch)


def _strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content if isinstance(content, list) else ())
    )
    for name, value in items:
        yield from _strings(value, f"{key}.{name}" if key else str(name))


def _check_way_to_head(launch: Launch) -> None:
    """By SSH as the launcher itself would: it tries for a quarter of an hour."""
    auth, hosts = launch.content.get("auth") or {}, launch.content["provider"]
    if not hosts.get("worker_ips"):
        raise InputError("no machines to work", file=launch.file, expected="provider.worker_ips", got="none")
    target = f"{auth.get('ssh_user', 'ubuntu')}@{hosts.get('external_head_ip') or hosts['head_ip']}"
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": _SSH_TIMEOUT_S,
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": os.devnull,
        "LogLevel": "ERROR",
    }
    if auth.get("ssh_private_key"):
        options["IdentitiesOnly"] = "yes"
    if auth.get("ssh_proxy_command"):
        options["ProxyCommand"] = auth["ssh_proxy_command"]
    command = ["ssh", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    if auth.get("ssh_private_key"):
        command += ["-i", str(launch.file.parent / Path(auth["ssh_private_key"]).expanduser())]
    tried = subprocess.run(
        [*command, target, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if tried.returncode:
        lines = tried.stderr.strip().splitlines()
        raise CapabilityError(
            "the head cannot be reached by SSH",
            file=target,
            got=lines[-1] if lines else f"exit code {tried.returncode}",
            fix="Look at provider.head_ip, auth.ssh_user and auth.ssh_private_key",
        )
