"""What a service is run with: where it listens, what it takes, and what its pixels depend on."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nafnet_core.errors import CapabilityError, InputError
from nafnet_core.tiling import MAX_TILE_PX
from pipelines.images import MAX_MEGAPIXELS
from pipelines.models import CHAMPION, is_exported

_MIN_TOKEN_CHARS = 16
# Uploads that are held at a time, as a multiple of the largest one.
_UPLOADS_HELD = 4


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Raises `InputError` where that cannot be."""

    model: str = CHAMPION
    """Weights, a run, or `models:/NAME@ALIAS`, of which the alias is followed."""
    workspace: Path
    """Where runs and the registry are. Without MLFLOW_TRACKING_URI every node must have this path."""
    host: str = "127.0.0.1"
    port: int = 8000
    token_digest: str | None = None
    """SHA-256 of the token, in hex: the token itself stays in the driver. None asks for none."""
    replicas: int = 1
    """Processes with a network each."""
    threads: int | None = None
    """CPU threads of each network; None shares the machine's cores out among the replicas."""
    max_queue: int = 32
    """Requests that a replica has at a time; more are told to come back (429)."""
    max_mib: float = 32.0
    """Largest upload."""
    max_megapixels: float = 50.0
    """Largest image, by its header."""
    timeout_s: float = 120.0
    """From the end of the upload to the answer; and for the upload."""
    train_patch_px: int | None = None
    """Patch side in training, instead of what the model says; 0 turns local statistics off."""
    backend: str | None = None
    """Torch, or a runtime whose export is kept of each version; `auto` is settled once, when the service
    starts. None: torch, or an exported file's own."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "fp32"
    """As reports are made in fp32, so is what is served, unless told otherwise; `auto` is an exported file's
    own."""
    tile_px: int = MAX_TILE_PX
    """Side of a tile. Not by free memory: the same photo gets the same pixels at any time."""
    tile_batch: int | None = None
    """Equal tiles in one pass, of one request or several; None takes 1 on a CPU, where more gain nothing,
    and 8 on a GPU."""
    poll_s: float = 2.0
    """How often the alias is looked at."""

    def __post_init__(self) -> None:
        for what, value, least in (
            ("replicas", self.replicas, 1),
            ("requests in the queue", self.max_queue, 1),
            ("tiles at a time", self.tile_batch or 1, 1),
        ):
            if value < least:
                raise InputError(what, expected=f"{least} or more", got=value)
        if not 0 < self.max_megapixels <= MAX_MEGAPIXELS:
            expected = f"above 0, at most {MAX_MEGAPIXELS}"
            raise InputError("megapixels", expected=expected, got=self.max_megapixels)
        for what, number in (
            ("MiB of an upload", self.max_mib),
            ("seconds to the time-out", self.timeout_s),
            ("seconds between looks at the alias", self.poll_s),
        ):
            if not number > 0:
                raise InputError(what, expected="above 0", got=number)
        if self.precision not in ("auto", "fp32", "bf16", "fp16", "int8"):
            raise InputError("unknown precision", expected="fp32, bf16, fp16, int8", got=self.precision)
        if self.precision == "auto" and not is_exported(self.model):
            raise InputError("a service has one precision", expected="fp32, bf16", got=self.precision)
        if self.token_digest is None and not is_loopback(self.host):
            raise InputError(
                "without a token the service is for this machine only",
                expected="a loopback address, as 127.0.0.1",
                got=f"--host {self.host}",
                fix="Give it one: --token-file FILE, or NAFNET_TOKEN in the environment",
            )

    @property
    def max_bytes(self) -> int:
        """Largest upload."""
        return int(self.max_mib * 2**20)

    @property
    def max_bytes_held(self) -> int:
        """All uploads that a proxy, or a replica, holds at a time."""
        return _UPLOADS_HELD * self.max_bytes

    @property
    def address(self) -> str:
        """Where a browser on this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{self.port}"


def digest_of(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def read_token(file: Path | None, environment: str | None) -> str | None:
    """Digest of the token in `file`, else of `environment`; None where there is neither.

    Raises:
        InputError: no such file, or a token that can be guessed.
    """
    if file is None and not environment:
        return None
    try:
        token = (environment or "") if file is None else file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InputError("the token's file cannot be read", file=file, got=reason) from error
    token = token.strip()
    if len(token) < _MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            "not a safe token",
            file=file or "NAFNET_TOKEN",
            expected=f"{_MIN_TOKEN_CHARS} or more printable characters of ASCII, no spaces",
            got=f"{len(token)} characters",
            fix="`openssl rand -hex 24` makes one",
        )
    return digest_of(token)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name, which may mean anything
        return False


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened at, which Ray would tell in paragraphs.

    Raises:
        InputError: no such address here.
        CapabilityError: another program listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host.strip("[]"), port))
        except (socket.gaierror, OverflowError) as error:
            raise InputError("no such address", got=f"{host}:{port}") from error
        except OSError as error:
            raise CapabilityError(
                "cannot listen there",
                got=f"{host}:{port}: {error.strerror}",
                fix="Choose another --port or --host",
            ) from error
