"""Ray's cluster launcher (`ray up`, `ray down`): Ray starts and ends the machines, and its output is read.

launch = read(Path("ray_cluster.yaml"))
up(launch, on_line=print)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from cluster.launch_file import COLOURS, Launch
from nafnet_core.errors import CapabilityError, StoppedError

_SHOWN = 160  # characters of what the launcher says
# A traceback is for the log; of it, the last line is for people. Nor are ssh's remarks on each command.
_TRACEBACK = "Traceback (most recent call last)"
_RAISED = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Exit|Timeout))\b:? ?(.*)")
_NOISE = re.compile(
    r"^(Shared connection to|Warning: Permanently added|During handling of the above|The above exception was)"
    r"|refers to a file|please use a directory"
)
# What the launcher ends with → what that means, and what to do.
_KNOWN = (
    (r"Unable to locate credentials|NoCredentials|PartialCredentials",
     "no AWS credentials were found", "Run `aws configure`, or set AWS_PROFILE"),
    (r"ProfileNotFound", "no such AWS profile", "See `aws configure list-profiles`, and AWS_PROFILE"),
    (r"pip install boto3|No module named 'boto",
     "Ray needs boto3 to talk to AWS", "pip install -c constraints.txt boto3"),
    (r"AuthFailure|InvalidClientTokenId|ExpiredToken|SignatureDoesNotMatch|RequestExpired",
     "AWS does not accept these credentials", "Look at `aws sts get-caller-identity`"),
    (r"UnauthorizedOperation|AccessDenied", "AWS does not allow that to these credentials",
     "docs/cluster.md lists what is needed"),
    (r"EndpointConnectionError|ConnectTimeout|Could not connect to the endpoint",
     "AWS cannot be reached from here", "Look at the network, a proxy, and provider.region"),
    (r"InvalidAMIID|InvalidParameterValue.*[Ii]mage", "AWS does not know this machine image",
     "Look it up for provider.region, as the file says, and set ImageId"),
    (r"Invalid IAM Instance Profile|InvalidInstanceProfile", "AWS does not know this instance profile",
     "docs/cluster.md has the commands that make it"),
    (r"VcpuLimitExceeded|MaxSpotInstanceCountExceeded|LimitExceeded",
     "the account's quota is used up", "Ask for more in Service Quotas, or lower max_workers"),
    (r"InsufficientInstanceCapacity|SpotMaxPriceTooLow", "AWS has no such machine to give now",
     "Try another availability_zone or InstanceType"),
    (r"No usable subnets", "no subnet for these machines", "Set SubnetIds, or another availability_zone"),
)  # fmt: skip


def up(launch: Launch, *, on_line: Callable[[str], None]) -> None:
    """Start the head, or bring it up to date; it starts the workers.

    Raises:
        CapabilityError: the launcher failed.
        StoppedError: Ctrl-C.
    """
    _run(launch, "up", "--no-config-cache", on_line=on_line)


def down(launch: Launch, *, on_line: Callable[[str], None]) -> None:
    """End all machines of the cluster. Raises as `up`."""
    _run(launch, "down", on_line=on_line)


def _run(launch: Launch, verb: str, *options: str, on_line: Callable[[str], None]) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", verb, "--yes", *options]
    command += ["--log-style", "pretty", "--log-color", "false", str(launch.file.absolute())]
    handle, name = tempfile.mkstemp(prefix=f"nafnet-cluster-{verb}-", suffix=".log")
    log = Path(name)
    with os.fdopen(handle, "w") as copy, _started(command, launch.file.absolute().parent) as process:
        assert process.stdout is not None
        try:
            for line in _for_people(process.stdout, copy):
                on_line(line)
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it got the same signal
            raise StoppedError(
                f"stopped, which ends no machine that is there by now; all of it is in {log}",
                fix=f"End them with `nafnet cluster down {launch.file}`",
            ) from None
    if code:
        raise _explained(launch, verb, log)
    log.unlink()


def _started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    # In the file's own folder, so that its relative paths mean the same from everywhere.
    return subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _for_people(lines: Iterable[str], copy: TextIO) -> Iterator[str]:
    """Copy all lines; those that tell a person something go on."""
    in_traceback = False
    for raw in lines:
        copy.write(raw)
        line = COLOURS.sub("", raw).rstrip()
        if _TRACEBACK in line:
            in_traceback = True
        elif in_traceback and not line.startswith(" "):
            in_traceback = False  # the exception itself
        elif not in_traceback and line.strip() and not _NOISE.search(line):
            yield line


def _explained(launch: Launch, verb: str, log: Path) -> CapabilityError:
    text = COLOURS.sub("", log.read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not _NOISE.search(line)]
    raised = [match for match in map(_RAISED.match, lines) if match]
    got = f"{raised[-1][1]}: {raised[-1][2]}" if raised else lines[-1] if lines else "nothing"
    more = f"All of it: {log}"
    if verb == "up" and "Launched a new head node" in text and launch.provider != "local":
        more += f". A machine was started: end it with `nafnet cluster down {launch.file}`"
    for pattern, what, fix in _KNOWN:
        if re.search(pattern, text):
            return CapabilityError(what, file=launch.file, got=got[:_SHOWN], fix=f"{fix}. {more}")
    # A command that failed on a machine: Ray tells only that, its own words came before.
    before = _said_before(lines)
    return CapabilityError(
        f"Ray's cluster launcher could not bring the cluster {verb}",
        file=launch.file,
        got=(before or got)[:_SHOWN],
        fix=more,
    )


def _said_before(lines: list[str]) -> str | None:
    """The last line before Ray's own that a command failed."""
    for number, line in enumerate(lines):
        if "update-failed" in line:
            return lines[number - 1] if number else None
    return None
